"""From a study to its folder: variants, readings, frames, figures and report, a stage at a time.

A stage is keyed by a hash of all that it depends on and recorded when its files are whole. A run that is killed is
started again and does what is missing; a changed study redoes only what it touches.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors.torch import load_file, save_file

from probes import (
    DENSE,
    HeldoutStream,
    Item,
    Readings,
    Session,
    StoredReadings,
    first_twins,
    item_questions,
    plan_reading,
    pooled_states,
    read_streams,
)
from pruning import Anatomy, Corpus, Segment, load_model
from pruning.errors import StudyError
from pruning.files import content_sha256, disk_errors, remove_partials, whole_file, write_text
from pruning.runner import VARIANTS
from pruning.text.sources import fingerprint

from ..frames import STUDY_FRAMES, dense_columns, joined, read_frame, write_frame
from ..metrics import accuracy as tasks
from ..metrics import contrasts, lape, lsar, mask_overlap, perplexity, signal
from ..plots import save
from ..report import ReportFacts, diagnosis_findings, study_figures, write_report
from . import diagnoses, harness
from .configuration import Study
from .progress import WorkProgress
from .pruning_stage import Grid, load_for_pruning, tell_loading
from .questions import Asking
from .records import Ledger
from .study_file import load_study

STUDY_FILE = "study.toml"
REPORT_FILE = "report.html"
#: Share of a whole run's time that frames, figures and report take, for the time left.
_FRAMES_SHARE = 0.08


def run_study(
    study: Study, folder: Path, console: Console | None = None, *, memory: int | None = None, only_prune: bool = False
) -> Path:
    """Carry out a study, or what is left of it, and return the path of its report.

    Parameters
    ----------
    study
        What to do.
    folder
        Where to put everything; made if need be. What another study left there is used where it is the same.
    console
        Where to show progress; standard error by default.
    memory
        Cap in bytes on resident memory while pruning.
    only_prune
        Make the variants and nothing else, and return their folder. The model may then be larger than memory.

    Raises
    ------
    PrunescopeError
        If text, model, recipe or folder cannot be used; what was finished stays.
    """
    console = console or Console(stderr=True)
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file; give a folder for the study (--out)")
    with _alone_in(folder):
        if only_prune:
            return _prune_only(study, folder, Ledger(folder), console, memory)
        return _load(study, folder, console, memory).everything()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a study's folder, and clear away what a killed one has left half-written."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                remove_partials(folder)
                yield
        except Timeout as error:
            raise StudyError(
                f"another run is writing into {folder}; wait for it, or choose another folder (--out)"
            ) from error


def _load(study: Study, folder: Path, console: Console, memory: int | None) -> Run:
    ledger = Ledger(folder)
    texts = _Texts(study)
    tell_loading(study, console)
    model, tokenizer = load_model(study.model, dtype=study.dtype, device=study.device)
    if Anatomy(model).encoder_decoder:
        raise StudyError(
            f"{study.model_name} is an encoder-decoder, which can be pruned but not read: "
            "make its variants with prunescope prune"
        )
    run = Run(study, folder, ledger, texts, model, tokenizer, console, memory)
    write_text(folder / STUDY_FILE, study.to_toml())
    return run


def diagnose_study(folder: Path, request: diagnoses.Request, console: Console | None = None) -> tuple[Path, list[str]]:
    """Diagnose one variant of a study, and return the report's path and what was found, in words.

    Parameters
    ----------
    folder
        Of a study; what is left of it is done first.
    request
        What to diagnose.
    console
        Where to show progress; standard error by default.

    Raises
    ------
    PrunescopeError
        If there is no such study, variant, language or category.
    """
    console = console or Console(stderr=True)
    study = load_study(folder / STUDY_FILE)
    request = diagnoses.check(study, request)
    with _alone_in(folder):
        run = _load(study, folder, console, None)
        run.everything()
        place = diagnoses.carry_out(run, request, console)
        return run.everything(), diagnosis_findings(read_frame(place / "recovery.parquet"))


def _prune_only(study: Study, folder: Path, ledger: Ledger, console: Console, memory: int | None) -> Path:
    corpus = study.text.corpus()
    for calibration in study.calibration_sets():
        for language in calibration.languages:
            corpus.segments("calibration", language)
    model, tokenizer = load_for_pruning(study, memory, console)
    grid = Grid(study, folder, ledger, corpus, Anatomy(model), tokenizer, memory)
    write_text(folder / STUDY_FILE, study.to_toml())
    _tell_plan(grid, console)
    began = time.monotonic()
    with WorkProgress(grid.work, console) as progress:
        grid.make(progress.stage, progress.advance)
    _tell_set_aside(grid, console)
    ledger.describe(**_facts_of_run(study, grid, time.monotonic() - began))
    return folder / VARIANTS


def _tell_set_aside(grid: Grid, console: Console) -> None:
    for name, reason in grid.run.set_aside.items():
        console.print(f"set aside: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)


def _tell_plan(grid: Grid, console: Console) -> None:
    if grid.plan is not None:
        console.print(str(grid.plan), highlight=False, markup=False, soft_wrap=True)


class _Texts:
    """The text of a study, read before anything expensive begins, so that missing text shows at once."""

    def __init__(self, study: Study) -> None:
        evaluation = study.evaluation
        self.corpus: Corpus = study.text.corpus()
        self.heldout: dict[str, list[Segment]] = {
            lang: self.corpus.take("heldout", lang, evaluation.segments) for lang in study.languages
        }
        self.fitting = self.corpus.aligned("parallel", study.languages, evaluation.fit_segments)
        if study.tasks.harness:
            names = harness.named_tasks(study.tasks.harness, study.languages)
            harness.check_known(names, [Path(folder) for folder in study.tasks.folders])
        source = study.item_source()
        asked = study.languages if source else ()
        self.items: dict[str, list[Item]] = {
            lang: first_twins(source.items(lang), study.tasks.per_category) for lang in asked if source
        }
        self.task = source.task if source else ""
        for calibration in study.calibration_sets():
            for language in calibration.languages:
                self.corpus.segments("calibration", language)


class Run:
    """A study in its folder, with its model loaded: what is finished, and how to do the rest."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        ledger: Ledger,
        texts: _Texts,
        model: Any,
        tokenizer: Any,
        console: Console,
        memory: int | None = None,
    ) -> None:
        self.study = study
        self.folder = folder
        self.ledger = ledger
        self.texts = texts
        self.model = model
        self.tokenizer = tokenizer
        self.console = console
        self.anatomy = Anatomy(model)
        self.grid = Grid(study, folder, ledger, texts.corpus, self.anatomy, tokenizer, memory)
        self.fingerprint = self.grid.fingerprint
        self.session = Session(
            model,
            tokenizer,
            max_length=study.evaluation.max_length,
            batch_tokens=study.evaluation.batch_tokens,
            special_tokens=study.evaluation.special_tokens,
        )
        self.common = {
            "prunescope": version("prunescope"),
            "model": self.fingerprint,
            "dtype": str(model.dtype),
        }

    # -- keys ------------------------------------------------------------------------------------------------

    @cached_property
    def reading_key(self) -> str:
        """A hash of what everything that is read depends on."""
        config = self.study.evaluation
        fields = {"max_length", "batch_tokens", "special_tokens"}
        return content_sha256({**self.common, **config.model_dump(include=fields)})

    def _readings_key(self, variant: str, language: str) -> str:
        text = fingerprint(self.texts.heldout[language])
        return content_sha256([self.reading_key, text, self.grid.keys.get(variant, DENSE)])

    def diagnosis_key(self, variant: str, language: str) -> str:
        """Return a hash of all that a diagnosis of a variant in a language depends on."""
        items = self.asking.items_key(variant, language) if language in self.texts.items else ""
        readings = [self._readings_key(DENSE, lang) for lang in self.study.languages]
        return content_sha256([self._readings_key(variant, language), readings, self._fit_key, items])

    @cached_property
    def _fit_key(self) -> str:
        texts = {lang: fingerprint(segments) for lang, segments in self.texts.fitting.items()}
        return content_sha256([self.reading_key, texts])

    @cached_property
    def _frames_key(self) -> str:
        readings = [self._readings_key(v, lang) for v in self.models for lang in self.study.languages]
        names = [self.study.model_name, list(self.study.languages), self.models]
        return content_sha256(
            [readings, self._fit_key, self.study.evaluation.rank, names, self.asking.key, STUDY_FRAMES]
        )

    @cached_property
    def asking(self) -> Asking:
        """The stage that asks the models questions."""
        return Asking(self)

    # -- places ----------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """The dense model and all variants."""
        return [DENSE, *self.grid.names]

    def readings_file(self, variant: str, language: str) -> Path:
        return self.folder / "readings" / variant / f"{language}.safetensors"

    @property
    def _fit_file(self) -> Path:
        return self.folder / "readings" / DENSE / "fit.safetensors"

    # -- stages ----------------------------------------------------------------------------------------------

    def everything(self) -> Path:
        languages = self._pending_languages()
        questions = self.asking.pending()
        fit = not self.ledger.finished("fit", self._fit_key)
        work = self._work(languages, fit, questions)
        _tell_plan(self.grid, self.console)
        began = time.monotonic()
        with WorkProgress(sum(work.values()), self.console) as progress:
            self.grid.make(progress.stage, progress.advance)
            if self.grid.run.set_aside:  # which nobody knew when the work was counted
                _tell_set_aside(self.grid, self.console)
                languages = {lang: [v for v in some if v in self.models] for lang, some in languages.items()}
                questions = {lang: [v for v in some if v in self.models] for lang, some in questions.items()}
            if fit:
                progress.stage("reading the fitting text")
                self._fit(progress)
            for number, (language, variants) in enumerate(languages.items(), start=1):
                progress.stage(f"reading {language} with {len(variants) + 1} models ({number} of {len(languages)})")
                self._read(language, variants, progress)
            for number, (language, models) in enumerate(questions.items(), start=1):
                progress.stage(f"asking {len(models)} models in {language} ({number} of {len(questions)})")
                self.asking.ask(language, models, lambda tokens: progress.advance(tokens * self._body_work))
            if self.asking.harness_pending:
                progress.stage("asking the evaluation harness")
                self.asking.ask_harness()
            progress.stage("making frames")
            frames = self._frames()
            progress.advance(work["frames"] / 2)
            progress.stage("drawing figures")
            self._figures(frames)
            progress.advance(work["frames"] / 2)
            progress.stage("writing the report")
            report = self._report(frames)
        self.ledger.describe(**self._provenance(time.monotonic() - began))
        return report

    def _pending_languages(self) -> dict[str, list[str]]:
        """Return the variants that are still to be read, by language; the dense model is read along with them."""
        pending = {}
        for language in self.study.languages:
            missing = [v for v in self.models if not self._is_read(v, language)]
            if missing:
                pending[language] = [v for v in missing if v != DENSE]
        return pending

    def _is_read(self, variant: str, language: str) -> bool:
        return self.ledger.finished(f"readings {variant} {language}", self._readings_key(variant, language))

    def _fit(self, progress: WorkProgress) -> None:
        means = {}
        with self._timed() as clock:
            for language, segments in self.texts.fitting.items():
                states = pooled_states(
                    self.session, segments, lambda tokens: progress.advance(tokens * self._body_work)
                )
                means[language] = states.double().mean(dim=0)
        with whole_file(self._fit_file) as partial:
            save_file(means, partial)
        self.ledger.finish("fit", self._fit_key, [self._fit_file], clock.seconds)

    def _read(self, language: str, missing: list[str], progress: WorkProgress) -> None:
        variants = [self.grid.open(name) for name in missing]
        with self._timed() as clock:
            files = {name: self.readings_file(name, language) for name in (DENSE, *missing)}
            stream = HeldoutStream(self.session, self.texts.heldout[language], missing, files)
            plan = plan_reading(self.session, [stream], trial=False)
            opened = {variant.id: variant for variant in variants}
            read_streams(
                self.session, [stream], opened, plan, lambda tokens: progress.advance(tokens * self._read_work)
            )
        for name, path in files.items():
            stage = f"readings {name} {language}"
            self.ledger.finish(stage, self._readings_key(name, language), [path], clock.seconds / len(files))

    def _frames(self) -> dict[str, pd.DataFrame]:
        folder = self.folder / "frames"
        if not self.ledger.finished("frames", self._frames_key):
            with self._timed() as clock:
                files = [write_frame(folder, name, frame) for name, frame in self._analyzed().items()]
            self.ledger.finish("frames", self._frames_key, files, clock.seconds)
        return {name: read_frame(folder / f"{name}.parquet") for name in STUDY_FRAMES}

    def _analyzed(self) -> dict[str, pd.DataFrame]:
        variants = [self.grid.open(name) for name in self.grid.names]
        columns: dict[str, Mapping[str, Any]] = {DENSE: dense_columns(self.study.model_name)}
        columns |= {variant.id: variant.columns() for variant in variants}
        readings = StoredReadings(
            {
                (model, language): self.readings_file(model, language)
                for model in self.models
                for language in self.study.languages
            }
        )
        fitted = self.subspaces
        masks = {variant.id: variant.masks for variant in variants}
        ids = {language: [s.id for s in segments] for language, segments in self.texts.heldout.items()}
        asked = self.asking.frame(columns)
        language_neurons, neuron_selection = lape.analyze(readings, columns)
        neuron_entropy, neuron_shift = lape.distributions(readings, columns)
        overlap = [mask_overlap.analyze(masks, columns), mask_overlap.agreement(variants, self.anatomy)]
        return {
            "perplexity": perplexity.analyze(readings, columns),
            "signal": signal.analyze(readings, columns),
            "subspaces": lsar.analyze(readings, columns, fitted, ids),
            "mask_overlap": joined("mask_overlap", overlap),
            "language_neurons": language_neurons,
            "neuron_entropy": neuron_entropy,
            "neuron_shift": neuron_shift,
            "neuron_selection": neuron_selection,
            "items": asked,
            "accuracy": tasks.analyze(asked),
            "contrasts": contrasts.analyze(readings, columns, fitted),
            "sparsity": mask_overlap.sparsity(masks, columns),
        }

    @cached_property
    def subspaces(self) -> list[lsar.LSAR]:
        means = load_file(self._fit_file)
        return lsar.fit_layers({lang: means[lang][None] for lang in self.study.languages}, self.study.evaluation.rank)

    def _figures(self, frames: dict[str, pd.DataFrame]) -> None:
        key = content_sha256([self._frames_key, "figures"])
        if self.ledger.finished("figures", key):
            return
        folder = self.folder / "figures"
        files: list[Path] = []
        with self._timed() as clock:
            for shown in study_figures(frames, self._facts):
                files += save(shown.draw(), folder, shown.name)
        self.ledger.finish("figures", key, files, clock.seconds)

    def _report(self, frames: dict[str, pd.DataFrame]) -> Path:
        path = self.folder / REPORT_FILE
        found = dict(diagnoses.finished(self))
        key = content_sha256([self._frames_key, "report", [request.model_dump(mode="json") for request in found]])
        if not self.ledger.finished("report", key):
            with self._timed() as clock:
                shown = [*study_figures(frames, self._facts), *diagnoses.shown(found)]
                said = {request.title: diagnosis_findings(frame) for request, frame in found.items()}
                write_report(path, frames, shown, self.folder / "figures", self._facts, said)
            self.ledger.finish("report", key, [path], clock.seconds)
        return path

    @cached_property
    def _facts(self) -> ReportFacts:
        return ReportFacts(
            model=self.study.model_name,
            languages=self.study.languages,
            sets=self.study.calibration_sets(),
            recipes=self.study.all_recipes(),
            imported=self.study.imported,
            segments=self.study.evaluation.segments,
            fit_segments=self.study.evaluation.fit_segments,
            rank=self.study.evaluation.rank or len(self.study.languages) - 1,
            heldout_tokens={lang: self._tokens_read(lang) for lang in self.study.languages},
            blocks=len(self.anatomy.blocks),
            neurons=self._neurons(),
            versions=_versions(),
        )

    # -- work, time, facts ----------------------------------------------------------------------------------

    @cached_property
    def _body_work(self) -> float:
        return float(sum(outputs * inputs for outputs, inputs in (self.anatomy.shape(*key) for key in self.anatomy)))

    @cached_property
    def _read_work(self) -> float:
        return self._body_work + self.anatomy.vocabulary * self.anatomy.hidden_size

    def _work(
        self, languages: Mapping[str, list[str]], fit: bool, questions: Mapping[str, list[str]]
    ) -> dict[str, float]:
        fitting = sum(map(self._count, self.texts.fitting.values())) if fit else 0
        reading = sum(self._count(self.texts.heldout[lang]) * (len(v) + 1) for lang, v in languages.items())
        work = {"prune": self.grid.work, "fit": fitting * self._body_work, "read": reading * self._read_work}
        asking = {lang: item_questions(self.session, self.texts.items[lang]) for lang in questions}
        work["ask"] = self._body_work * sum(
            len(models) * sum(question.tokens for question in asking[lang]) for lang, models in questions.items()
        )
        work["frames"] = _FRAMES_SHARE * sum(work.values())
        return work

    def _count(self, segments: Iterable[Segment]) -> int:
        return sum(int(batch.real.sum()) for batch in self.session.batches(list(segments)))

    def _neurons(self) -> int:
        """Return how many MLP neurons were read in all."""
        return int(Readings.open(self.readings_file(DENSE, self.study.languages[0])).fired[0].numel())

    def _tokens_read(self, language: str) -> int:
        return int(Readings.open(self.readings_file(DENSE, language)).tokens.sum())

    @contextmanager
    def _timed(self) -> Iterator[_Clock]:
        clock = _Clock()
        began = time.monotonic()
        yield clock
        clock.seconds = time.monotonic() - began

    def _provenance(self, seconds: float) -> dict[str, Any]:
        facts = _facts_of_run(self.study, self.grid, seconds)
        facts["text"]["heldout"] = {lang: fingerprint(s) for lang, s in self.texts.heldout.items()}
        facts["text"]["parallel"] = {lang: fingerprint(s) for lang, s in self.texts.fitting.items()}
        return facts


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("prunescope", "torch", "transformers", "nnsight", "numpy", "scipy")}


def _facts_of_run(study: Study, grid: Grid, seconds: float) -> dict[str, Any]:
    """Return what it takes to know how variants were made."""
    sets = [job.calibration for job in grid.jobs.values() if job.calibration]
    languages = dict.fromkeys(language for calibration in sets for language in calibration.languages)
    return {
        "last_run_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(grid.anatomy.device),
            "dtype": str(grid.anatomy.model.dtype),
        },
        "model": {"name": study.model, "fingerprint": grid.fingerprint},
        "text": {"calibration": {lang: fingerprint(grid.corpus.segments("calibration", lang)) for lang in languages}},
        "set_aside": dict(grid.run.set_aside),
        "seeds": sorted({calibration.seed for calibration in sets}),
    }


@dataclass
class _Clock:
    seconds: float = 0.0
