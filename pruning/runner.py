"""Making pruned variants: planning, running wave by wave, and resuming after a kill.

All variants are made here: with :func:`prune` from Python, or with :class:`PruningRun` by callers that run the waves
themselves, such as a study.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .code_version import code_version
from .engine import Job, check_fits, planned_jobs, sweep
from .engine.jobs import check_calibrated, choices
from .engine.plan import Plan, make_plan
from .engine.recovering import recovering, recovery_work
from .engine.streams import Progress
from .engine.sweep import sweep_work
from .engine.workspace import Workspace, begun, clear
from .errors import DiskError, ModelError, RecipeError, VariantError
from .files import content_sha256, put_in_place, write_json
from .methods.registry import added_code
from .models.anatomy import Anatomy
from .projections import Key
from .recipes import Recipe
from .text.calibration import CalibrationSet, CalibrationText, calibration_fingerprint
from .text.sources import Corpus
from .variants.owner import DenseModel
from .variants.store import VariantRecord, is_variant
from .variants.variant import Variant

VARIANTS, SCRATCH, SET_ASIDE = "variants", "scratch", "set_aside.json"


class SetAsideWarning(UserWarning):
    """A variant could not be made; the others were."""


def prune(
    model: Any,
    tokenizer: Any,
    recipes: Recipe | Sequence[Recipe],
    corpus: Corpus | None = None,
    calibration: CalibrationSet | Sequence[CalibrationSet] = (),
    *,
    folder: Path | str | None = None,
    memory: int | None = None,
    device_memory: int | None = None,
    name: str | None = None,
    batch_tokens: int = 2048,
    progress: Progress = lambda tokens: None,
) -> list[Variant]:
    """Make pruned variants: one per recipe and calibration set, grouped by set, in the given order.

    With a folder, variants are written to ``FOLDER/variants/ID`` block by block; variants that already exist are not
    made again, and a killed run resumes where it stopped. Without one, all are made at once and held in memory.

    Parameters
    ----------
    model, tokenizer
        As returned by :func:`pruning.load_model`; the model is unchanged afterwards.
    recipes
        One or several recipes. A recipe that needs no text makes one variant, whatever the calibration sets.
    corpus, calibration
        The text, and the calibration sets to draw from it; optional if no recipe is calibrated.
    folder
        Where to write the variants. The returned variants are read from there on access.
    memory, device_memory
        Caps in bytes on resident memory, and on the memory of the model's GPU. To stay within them, and given a folder,
        hidden states are moved to host memory or disk, and variants are made in waves.
    name
        Name of the model in frames; its ``name_or_path`` by default.
    batch_tokens
        Tokens per batch.
    progress
        Called with the number of tokens that have just passed through a block.

    Returns
    -------
    list
        The variants. If one cannot be made, for example because its scores are not finite, it is left out, and a
        ``SetAsideWarning`` says why.

    Raises
    ------
    TextError
        If there is too little text, or held-out text is in that which a model is to be trained on.
    RecipeError, ModelError
        If a recipe does not fit this model, a cap is too small, or no variant can be made.
    DiskError
        If the disk is full or the folder cannot be used.
    """
    wanted = [recipes] if isinstance(recipes, Recipe) else list(recipes)
    sets = [calibration] if isinstance(calibration, CalibrationSet) else list(calibration)
    run = PruningRun(
        Anatomy(model),
        tokenizer,
        planned_jobs(wanted, sets),
        corpus,
        None if folder is None else Path(folder),
        memory=memory,
        device_memory=device_memory,
        name=name,
        batch_tokens=batch_tokens,
    )
    for wave in run.waves:
        run.run(wave, progress)
    run.close()
    for variant, reason in run.set_aside.items():
        warnings.warn(f"{variant} was set aside: {reason}", SetAsideWarning, stacklevel=2)
    return [run.open(variant) for variant in run.jobs if variant not in run.set_aside]


@dataclass(frozen=True)
class Wave:
    """Jobs that go through the model together.

    Attributes
    ----------
    name
        A hash of the jobs, so that a killed wave is found again.
    jobs
        The jobs.
    tokens
        Number of tokens that pass through blocks, as the progress counts them.
    """

    name: str
    jobs: tuple[Job, ...]
    tokens: int

    def __str__(self) -> str:
        """Describe the wave for the progress bar."""
        sets = list(dict.fromkeys(job.calibration.title for job in self.jobs if job.calibration))
        methods = ", ".join(dict.fromkeys(job.recipe.method for job in self.jobs))
        if not sets:
            return f"{methods}, without text"
        which = sets[0] if len(sets) == 1 else f"{len(sets)} calibration sets"
        return f"{len(self.jobs)} variant{'s' * (len(self.jobs) > 1)}: {methods}; {which}"


def job_key(job: Job, model_fingerprint: str, dtype: str, text_fingerprint: str | None) -> str:
    """Return a hash of everything that a variant depends on, including the code.

    Parameters
    ----------
    job
        The job.
    model_fingerprint, dtype
        Fingerprint and dtype of the dense model.
    text_fingerprint
        Fingerprint of the calibration text, if any.
    """
    added = added_code(job.recipe.method)
    return content_sha256(
        {
            "code": code_version("pruning"),
            "model": model_fingerprint,
            "dtype": dtype,
            "recipe": job.recipe.model_dump(mode="json"),
            "set": job.calibration.model_dump(mode="json") if job.calibration else None,
            "text": text_fingerprint,
        }
        | ({} if added is None else {"code of the method": added})
    )


class PruningRun:
    """Makes variants of one model, wave by wave: knows which are finished, which are left, and what they will need.

    Parameters
    ----------
    anatomy, tokenizer
        Anatomy and tokenizer of the dense model.
    jobs
        All requested variants, finished or not; names must be unique.
    corpus
        The text to calibrate with.
    folder
        Folder with finished variants in ``variants/ID`` and unfinished ones in ``scratch``; ``None`` keeps everything
        in memory.
    memory, device_memory, name, batch_tokens
        As for :func:`prune`.
    fingerprint
        Of the dense model, if it is known; all blocks are read to find it out.
    trial
        Whether to time a block, so that the plan says how long the variants will take.
    parts
        How many waves there are at least, if there are as many calibration sets, for several processes.

    Attributes
    ----------
    anatomy, fingerprint
        Anatomy and fingerprint of the dense model.
    jobs, keys
        Job of every variant, and a hash of everything that the variant depends on, by name.
    plan
        What the remaining variants will need, for printing; ``None`` if all are finished.
    set_aside
        Names of variants that cannot be made, with the reason.

    Raises
    ------
    RecipeError, TextError
        If a recipe does not fit the model, a cap is too small, there is too little text, or held-out text is in that
        which a model is to be trained on.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokenizer: Any,
        jobs: Sequence[Job],
        corpus: Corpus | None,
        folder: Path | None,
        *,
        memory: int | None = None,
        device_memory: int | None = None,
        name: str | None = None,
        batch_tokens: int = 2048,
        fingerprint: str | None = None,
        trial: bool = True,
        parts: int = 1,
    ) -> None:
        self.anatomy = anatomy
        self.jobs = {job.id: job for job in jobs}
        self.folder = folder
        self.fingerprint = anatomy.fingerprint() if fingerprint is None else fingerprint
        self._name = name or str(anatomy.model.name_or_path)
        self._corpus = corpus
        self._batch_tokens = batch_tokens
        self._held: dict[str, Variant] = {}
        self._exponents: dict[Key, float] = {}
        for recipe in dict.fromkeys(job.recipe for job in jobs):
            check_fits(self.anatomy, recipe)
            self._check_subspaces(recipe)
        check_calibrated(jobs, corpus)
        self._texts = {
            job.id: calibration_fingerprint(corpus, job.calibration)
            for job in self.jobs.values()
            if corpus and job.calibration
        }
        self.keys = {variant: self._key(job) for variant, job in self.jobs.items()}
        self.set_aside = {v: reason for v, (key, reason) in self._on_record().items() if self.keys.get(v) == key}
        if self.set_aside.keys() == self.jobs.keys():
            self.set_aside = {}  # all of them: try again
        pending = self.pending
        sets = [job.calibration for job in self.jobs.values() if job.calibration]
        self.text: CalibrationText | None = None
        if pending and sets and corpus is not None:
            self.text = CalibrationText.draw(tokenizer, corpus, sets)
            trained = [job.calibration for job in pending if job.recipe.recovers and job.calibration]
            places = dict.fromkeys((*part, one.length) for one in trained for part in one.parts())
            for language, items, length in places:
                corpus.check_apart(language, self.text.read[language, items, length], items)
        self.plan: Plan | None = None
        if pending:
            self.plan = make_plan(
                self.anatomy,
                pending,
                self.text,
                memory=memory,
                device_memory=device_memory,
                batch_tokens=batch_tokens,
                begun=self._begun(pending),
                in_folder=folder is not None,
                trial=trial,
                there=self._chosen(pending),
                parts=parts,
            )

    @property
    def pending(self) -> list[Job]:
        """The remaining jobs: neither finished nor set aside."""
        return [job for v, job in self.jobs.items() if v not in self.set_aside and not self.finished(v)]

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        """The remaining waves; unfinished waves of a killed run come first."""
        return tuple(self._wave(jobs) for jobs in (self.plan.waves if self.plan else ()))

    def wave(self, variants: Sequence[str]) -> Wave:
        """Return the wave that makes some variants, by their names, whoever planned it."""
        return self._wave(tuple(self.jobs[variant] for variant in variants))

    def _wave(self, jobs: tuple[Job, ...]) -> Wave:
        return Wave(self._wave_name(jobs), jobs, self._work(jobs))

    def place(self, variant: str) -> Path:
        """Return the folder of a variant."""
        assert self.folder is not None
        return self.folder / VARIANTS / variant

    def finished(self, variant: str) -> bool:
        """Whether a variant exists and everything that it depends on is unchanged."""
        if self.folder is None:
            return variant in self._held
        try:
            return Variant.open(self.place(variant), self.fingerprint).record.key == self.keys[variant]
        except VariantError:
            return False

    def open(self, variant: str) -> Variant:
        """Return a finished variant; from a folder, masks and values are read on access.

        Raises
        ------
        VariantError
            If it is missing or damaged.
        """
        return self._held[variant] if self.folder is None else Variant.open(self.place(variant), self.fingerprint)

    def run(self, wave: Wave, progress: Progress = lambda tokens: None) -> list[str]:
        """Run one wave, and return the names of the variants that it made.

        Raises
        ------
        ModelError
            If all variants, of this wave and the previous ones, were set aside.
        DiskError
            If the disk is full or the folder cannot be used; finished and unfinished variants are kept.
        """
        self._check_places(wave)
        workspace = self._workspace(wave)
        there = self._chosen(wave.jobs)
        swept = sweep(
            self.anatomy,
            choices(wave.jobs, there),
            self.text,
            batch_tokens=self._batch_tokens,
            workspace=workspace,
            progress=progress,
            exponents=self._exponents,
        )
        reasons = {job.id: swept.set_aside[job.choice] for job in wave.jobs if job.choice in swept.set_aside}
        owner = DenseModel(self.anatomy.model)  # its copy of the dense weights is shared, and freed in the end
        for job in sorted(wave.jobs, key=lambda job: not job.recipe.recovers):  # others move what these start from
            if job.id in reasons or self.finished(job.id):  # finished: it was moved there before a kill
                if job.recipe.recovers:
                    progress(recovery_work(self.anatomy, [job]))
                continue
            if job.choice in there:
                start = self.open(job.choice.id)
                variant = replace(start, record=self.record(job, start.record.remarks))
            else:
                name = job.choice.id
                variant = Variant(self.record(job, workspace.remarks(name)), *workspace.results(name))
            if job.recipe.recovers:
                reasons |= self._recover(owner, variant, progress)
            elif self.folder is None:
                self._held[job.id] = variant
            else:
                variant.record.save(workspace.place(job.id))
                self.place(job.id).parent.mkdir(parents=True, exist_ok=True)
                put_in_place(workspace.place(job.id), self.place(job.id))
        self._note_set_aside(reasons)
        workspace.close()
        return [job.id for job in wave.jobs if job.id not in reasons]

    def _recover(self, owner: DenseModel, variant: Variant, progress: Progress) -> dict[str, str]:
        """Fine-tune a variant and keep the result; return why this failed, by name, if it did."""
        assert self.text is not None
        try:
            with recovering(owner, variant, self.text, progress) as recovered:
                if self.folder is None:
                    self._held[variant.id] = replace(recovered, values=dict(recovered.values))
                else:
                    self.place(variant.id).parent.mkdir(parents=True, exist_ok=True)
                    recovered.save(self.place(variant.id))
        except ModelError as error:
            return {variant.id: str(error)}
        return {}

    def _chosen(self, jobs: Sequence[Job]) -> set[Job]:
        """Return the choices, for jobs that fine-tune in the end, that are among the finished variants."""
        found = {job.choice for job in jobs if job.recipe.recovers}
        return {choice for choice in found if self.jobs.get(choice.id) == choice and self.finished(choice.id)}

    def _work(self, jobs: Sequence[Job]) -> int:
        chosen = choices(jobs, self._chosen(jobs))
        return sweep_work(self.anatomy, chosen, self.text) + recovery_work(self.anatomy, jobs)

    def close(self) -> None:
        """Remove temporary files, including those of waves that are no longer needed."""
        for folder in self._scratch():
            clear(folder)
        if self.folder is not None:
            with suppress(OSError):  # missing, or it holds other files
                (self.folder / SCRATCH).rmdir()

    def record(self, job: Job, remarks: Sequence[str] = ()) -> VariantRecord:
        """Return the record of the variant that a job makes."""
        return VariantRecord(
            id=job.id,
            model=self._name,
            model_fingerprint=self.fingerprint,
            recipe=job.recipe,
            calibration=job.calibration,
            text_fingerprint=self._texts.get(job.id),
            text=self.text.drawn.get(job.calibration, ()) if self.text and job.calibration else (),
            remarks=tuple(remarks),
            key=self.keys[job.id],
        )

    def _check_subspaces(self, recipe: Recipe) -> None:
        """Raise ``RecipeError`` if a recipe's subspaces are of another model."""
        if recipe.subspaces and self.fingerprint and recipe.subspaces.model_fingerprint != self.fingerprint:
            raise RecipeError(
                f"{recipe.subspaces.path} has the subspaces of a model other than {self._name}; write those of a study "
                "of this one with prunescope subspaces"
            )

    def _key(self, job: Job) -> str:
        return job_key(job, self.fingerprint, str(self.anatomy.model.dtype), self._texts.get(job.id))

    # -- what cannot be made -----------------------------------------------------------------------------------

    def _on_record(self) -> dict[str, tuple[str, str]]:
        """Return which variants were set aside in the folder, with their keys and the reasons."""
        if self.folder is None:
            return {}
        try:
            content = json.loads((self.folder / SET_ASIDE).read_text(encoding="utf-8"))
            return {str(v): (str(said["key"]), str(said["reason"])) for v, said in content.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # missing or damaged: try them again

    def _note_set_aside(self, reasons: dict[str, str]) -> None:
        elsewhere = {v: reason for v, (key, reason) in self._on_record().items() if self.keys.get(v) == key}
        self.set_aside = elsewhere | self.set_aside | reasons  # other processes may have set some aside meanwhile
        nothing_left = self.set_aside.keys() == self.jobs.keys()
        if reasons and self.folder is not None:
            said = {v: {"key": key, "reason": r} for v, (key, r) in self._on_record().items() if v not in self.jobs}
            if not nothing_left:
                said |= {v: {"key": self.keys[v], "reason": reason} for v, reason in self.set_aside.items()}
            if said:
                write_json(self.folder / SET_ASIDE, said)
            else:
                (self.folder / SET_ASIDE).unlink(missing_ok=True)
        if nothing_left:
            self.close()
            raise ModelError(next(iter(self.set_aside.values())))

    # -- scratch folders of waves ------------------------------------------------------------------------------

    def _wave_name(self, jobs: Iterable[Job]) -> str:
        return content_sha256(sorted(self.keys[job.id] for job in jobs))[:16]

    def _workspace(self, wave: Wave) -> Workspace:
        assert self.plan is not None
        if self.folder is None:
            return Workspace(model=self.fingerprint, states=self.plan.states)
        return Workspace(
            self.folder / SCRATCH / wave.name,
            wave.name,
            model=self.fingerprint,
            jobs=[job.id for job in wave.jobs],
            states=self.plan.states,
            finished=[job.id for job in wave.jobs if self.finished(job.id)],
        )

    def _check_places(self, wave: Wave) -> None:
        """Raise ``DiskError`` if the folder of a variant holds files that prunescope did not write."""
        for job in wave.jobs if self.folder is not None else ():
            place = self.place(job.id)
            if place.exists() and not (place.is_dir() and (is_variant(place) or not any(place.iterdir()))):
                raise DiskError(
                    f"{place} holds files that prunescope did not write; move them away, or choose another folder"
                )

    def _begun(self, pending: Sequence[Job]) -> list[tuple[Job, ...]]:
        """Return the unfinished waves of a killed run that are still requested unchanged."""
        waves = []
        for folder in self._scratch():
            names = begun(folder)
            if names and all(name in self.jobs for name in names):
                wave = tuple(self.jobs[name] for name in names)
                if self._wave_name(wave) == folder.name and set(wave) & set(pending):
                    waves.append(wave)
        return waves

    def _scratch(self) -> Iterator[Path]:
        if self.folder is not None:
            yield from sorted((self.folder / SCRATCH).glob("*"))
