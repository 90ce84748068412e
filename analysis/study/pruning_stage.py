"""The first stage of a study: its pruned variants, each saved as soon as it is made."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from pruning import Anatomy, Corpus, Variant, load_model
from pruning.engine import Job, Workspace, check_fits, sweep
from pruning.engine.plan import Plan, make_plan
from pruning.engine.sweep import sweep_work
from pruning.errors import ModelError, RecipeError, VariantError
from pruning.files import content_sha256, write_json
from pruning.models.embedded import DEMO
from pruning.models.loading import checkpoint_bytes
from pruning.text.calibration import CalibrationText, calibration_fingerprint
from pruning.variants.variant import RECIPE_FILE, VariantRecord, variants_of

from .configuration import Study
from .records import Ledger

VARIANTS = "variants"
SCRATCH = "scratch"
WAVE_FILE = "wave.json"
#: A model is read from its shards if a memory cap is less than so many times its size on disk.
_ROOM = 6
#: Called with the work done: tokens through a block, times the weights of a block.
Advance = Callable[[float], None]


class Grid:
    """The variants of a study: those to be made, and models pruned elsewhere.

    Parameters
    ----------
    study, folder, ledger, corpus
        What to do, where, what is finished, and the text.
    anatomy, tokenizer
        Of the dense model.
    memory
        Cap on resident memory in bytes while pruning.

    Raises
    ------
    RecipeError, TextError
        If a recipe does not fit the model, or there is too little text.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        ledger: Ledger,
        corpus: Corpus,
        anatomy: Anatomy,
        tokenizer: Any,
        memory: int | None = None,
    ) -> None:
        self.study = study
        self.folder = folder
        self.ledger = ledger
        self.corpus = corpus
        self.anatomy = anatomy
        self.tokenizer = tokenizer
        self.jobs = {job.id: job for job in study.jobs()}
        self.fingerprint = anatomy.fingerprint()
        for path, remedy in study.remedies().items():
            if remedy.model_fingerprint != self.fingerprint:
                raise RecipeError(
                    f"{path} is a diagnosis of another model than {study.model_name}; diagnose a variant of this one"
                )
        for job in self.jobs.values():
            check_fits(anatomy, job.recipe)
        self.keys = {name: self._job_key(job) for name, job in self.jobs.items()}
        self.keys |= {name: self._import_key(name) for name in study.imported}
        pending = [job for job in self.jobs.values() if not self._finished(job.id)]
        sets = [job.calibration for job in self.jobs.values() if job.calibration]
        self.text = CalibrationText.draw(tokenizer, corpus, sets) if pending and sets else None
        self.plan: Plan | None = None
        if pending:
            self.plan = make_plan(anatomy, pending, self.text, memory=memory, begun=self._begun(pending))

    @property
    def names(self) -> list[str]:
        """Ids of all variants."""
        return list(self.keys)

    def place(self, variant: str) -> Path:
        """Return the folder of a variant."""
        return self.folder / VARIANTS / variant

    def open(self, variant: str) -> Variant:
        """Open a finished variant."""
        return Variant.open(self.place(variant), self.fingerprint)

    @property
    def work(self) -> float:
        """Work that is left."""
        waves = self.plan.waves if self.plan else ()
        return self._block_weights * sum(sweep_work(self.anatomy, wave, self.text) for wave in waves)

    def make(self, stage: Callable[[str], None], advance: Advance) -> None:
        """Make all variants that are missing."""
        for name, source in self.study.imported.items():
            if not self._finished(name):
                stage(f"taking over {name}")
                self._import(name, source)
        waves = self.plan.waves if self.plan else ()
        self._tidy(waves)
        for number, wave in enumerate(waves, start=1):
            stage(f"pruning {_words(wave)}" + (f" (wave {number} of {len(waves)})" if len(waves) > 1 else ""))
            self._sweep(wave, advance)
        self._tidy()

    def _sweep(self, wave: Sequence[Job], advance: Advance) -> None:
        assert self.plan is not None
        began = time.monotonic()
        scratch = self._scratch(wave)
        workspace = Workspace(scratch, scratch.name, spill=self.plan.spill)
        write_json(scratch / WAVE_FILE, [job.id for job in wave])
        try:
            results = sweep(
                self.anatomy,
                wave,
                self.text,
                workspace=workspace,
                progress=lambda tokens: advance(tokens * self._block_weights),
            )
        except (ModelError, RecipeError):  # it would end so again
            self._tidy()
            raise
        for job in wave:  # one at a time, since weights may be large
            if not self._finished(job.id):  # else it was saved before a kill
                made = {job: results(job)}
                (variant,) = variants_of(self.fingerprint, made, self.study.model_name, self.corpus)
                self._save(variant, (time.monotonic() - began) / len(wave))
        workspace.close()

    def _import(self, name: str, source: str) -> None:
        began = time.monotonic()
        stream = self.anatomy.streamed
        pruned, _ = load_model(source, dtype=self.study.dtype, device=self.study.device, stream=stream)
        try:
            variant = Variant.between(self.anatomy.model, pruned, name)
        except VariantError as error:
            raise VariantError(f"{source}: {error}") from error
        variant = replace(variant, record=variant.record.model_copy(update={"model": self.study.model_name}))
        self._check_unlike_others(variant)
        self._save(variant, time.monotonic() - began)

    def _check_unlike_others(self, variant: Variant) -> None:
        """Raise ``VariantError`` if frames could not tell a variant that is taken over from another one."""
        columns = variant.columns()
        for job in self.jobs.values():
            made = VariantRecord(
                id=job.id,
                model=self.study.model_name,
                model_fingerprint=self.fingerprint,
                recipe=job.recipe,
                calibration=job.calibration,
            )
            if made.columns(0.0) == columns:
                raise VariantError(
                    f'imported "{variant.id}" says that it is "{job.id}", which this study makes itself; '
                    f"leave one of them out, or remove the {RECIPE_FILE} beside that checkpoint"
                )
        for name in self.study.imported:
            if name != variant.id and self._finished(name) and self.open(name).columns() == columns:
                raise VariantError(
                    f'imported "{variant.id}" and "{name}" say that they are the same variant; '
                    f"leave one of them out, or remove the {RECIPE_FILE} beside its checkpoint"
                )

    # -- scratch folders of waves ------------------------------------------------------------------------------

    def _scratch(self, wave: Iterable[Job]) -> Path:
        key = content_sha256(sorted(self.keys[job.id] for job in wave))
        return self.folder / SCRATCH / key[:16]

    def _begun(self, pending: Sequence[Job]) -> list[tuple[Job, ...]]:
        """Return the waves that a killed run was in the middle of, if they are still wanted as they were."""
        waves = []
        for path in sorted((self.folder / SCRATCH).glob(f"*/{WAVE_FILE}")):
            try:
                wave = tuple(self.jobs[name] for name in json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError):  # damaged, or of a study that was changed since
                continue
            if self._scratch(wave) == path.parent and set(wave) & set(pending):
                waves.append(wave)
        return waves

    def _tidy(self, waves: Iterable[Iterable[Job]] = ()) -> None:
        """Remove what other waves than these have left, and the scratch folder when it is empty."""
        keep = {self._scratch(wave) for wave in waves}
        for folder in (self.folder / SCRATCH).glob("*"):
            if folder not in keep:
                shutil.rmtree(folder, ignore_errors=True)
        if not keep:
            shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)

    # -- saving ------------------------------------------------------------------------------------------------

    def _save(self, variant: Variant, seconds: float) -> None:
        place = self.place(variant.id)
        variant.save(place)
        self.ledger.finish(f"variant {variant.id}", self.keys[variant.id], sorted(place.iterdir()), seconds)

    def _finished(self, name: str) -> bool:
        return self.ledger.finished(f"variant {name}", self.keys[name])

    def _job_key(self, job: Job) -> str:
        text = calibration_fingerprint(self.corpus, job.calibration) if job.calibration else None
        calibration = job.calibration.model_dump(mode="json") if job.calibration else None
        return content_sha256(
            {**self._common, "recipe": job.recipe.model_dump(mode="json"), "set": calibration, "text": text}
        )

    def _import_key(self, name: str) -> str:
        source = Path(self.study.imported[name])
        found = [*source.glob("*.safetensors"), *source.glob(RECIPE_FILE)]
        files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found)
        return content_sha256({**self._common, "imported": str(source), "files": files})

    @property
    def _common(self) -> dict[str, str]:
        return {
            "prunescope": version("prunescope"),
            "model": self.fingerprint,
            "dtype": str(self.anatomy.model.dtype),
        }

    @property
    def _block_weights(self) -> float:
        return float(sum(outputs * inputs for outputs, inputs in map(self._shape_in_first, self.anatomy.roles(0))))

    def _shape_in_first(self, role: str) -> tuple[int, int]:
        return self.anatomy.shape(0, role)


def load_for_pruning(study: Study, memory: int | None, console: Console) -> tuple[Any, Any]:
    """Load a study's model, its weights left on disk if a memory cap may not leave room for them."""
    stream = False
    if memory is not None and not any(job.recipe.scoring.differentiates for job in study.jobs()):
        size = checkpoint_bytes(study.model)
        stream = size is None or _ROOM * size > memory
    tell_loading(study, console, ", its weights a block at a time" if stream else "")
    return load_model(study.model, dtype=study.dtype, device=study.device, stream=stream)


def tell_loading(study: Study, console: Console, note: str = "") -> None:
    """Say that the model is loaded."""
    note += " (converted on first use, about a minute)" if study.model == DEMO else ""
    console.print(f"loading the model {study.model_name}{note}", highlight=False, markup=False, soft_wrap=True)


def _words(wave: Sequence[Job]) -> str:
    sets = list(dict.fromkeys(f"{j.calibration.name} (seed {j.calibration.seed})" for j in wave if j.calibration))
    methods = ", ".join(dict.fromkeys(job.recipe.method for job in wave))
    if not sets:
        return f"{methods}, without text"
    which = sets[0] if len(sets) == 1 else f"{len(sets)} calibration sets"
    return f"{len(wave)} variant{'s' * (len(wave) > 1)}: {methods}; {which}"
