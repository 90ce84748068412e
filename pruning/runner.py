"""Pruning from the first look at the model to variants in a folder: the plan, the waves, and going on after a kill.

The one way to make variants, whoever asks: :func:`prune` for Python, and :class:`PruningRun` for what carries out one
wave after the other, such as a study.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .code_version import code_version
from .engine import Job, check_fits, planned_jobs, sweep
from .engine.plan import Plan, make_plan
from .engine.streams import Progress
from .engine.sweep import sweep_work
from .engine.workspace import Workspace, begun, clear
from .errors import DiskError, ModelError, VariantError
from .files import content_sha256, put_in_place, write_json
from .models.anatomy import Anatomy
from .recipes import Recipe
from .text.calibration import CalibrationSet, CalibrationText, calibration_fingerprint
from .text.sources import Corpus
from .variants.store import VariantRecord, is_variant
from .variants.variant import Variant

VARIANTS, SCRATCH, SET_ASIDE = "variants", "scratch", "set_aside.json"


class SetAsideWarning(UserWarning):
    """A variant could not be made, and the others were."""


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
    """Make pruned variants: one for each recipe and calibration set, those of a set together, in their order.

    With a folder, each variant goes into ``FOLDER/variants/ID`` block by block while it is made, what is there already
    is not made again, and a run that was killed goes on where it was. Without, all are made at once and held in memory.

    Parameters
    ----------
    model, tokenizer
        As :func:`pruning.load_model` gives them; the model is unchanged afterwards.
    recipes
        What to make. One that needs no text makes one variant, whatever the calibration sets.
    corpus, calibration
        Where the text is, and how much of which languages to take; needed unless no recipe is calibrated.
    folder
        Where to put the variants. Those that are returned are read from there when they are asked for.
    memory, device_memory
        Caps in bytes on resident memory, and on that of the GPU that the model is on. With a folder, hidden states move
        off the device or to disk, and variants are made in waves, as caps ask for it.
    name
        What to call the model in frames; its ``name_or_path`` by default.
    batch_tokens
        Tokens that go through a block at a time.
    progress
        Told of the tokens as they go through a block.

    Returns
    -------
    list
        The variants. One that cannot be made, because its scores are not finite for example, is missing, and a
        ``SetAsideWarning`` says why.

    Raises
    ------
    TextError
        If there is too little text.
    RecipeError, ModelError
        If a recipe does not fit this model, a cap is too small, or no variant at all can be made.
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
        Of these very jobs: the same after a kill.
    jobs
        What is made.
    tokens
        That go through blocks, as the progress counts them.
    """

    name: str
    jobs: tuple[Job, ...]
    tokens: int

    def __str__(self) -> str:
        """Return in words what is made."""
        sets = [f"{job.calibration.name} (seed {job.calibration.seed})" for job in self.jobs if job.calibration]
        sets = list(dict.fromkeys(sets))
        methods = ", ".join(dict.fromkeys(job.recipe.method for job in self.jobs))
        if not sets:
            return f"{methods}, without text"
        which = sets[0] if len(sets) == 1 else f"{len(sets)} calibration sets"
        return f"{len(self.jobs)} variant{'s' * (len(self.jobs) > 1)}: {methods}; {which}"


def job_key(job: Job, model_fingerprint: str, dtype: str, text_fingerprint: str | None) -> str:
    """Return a hash of everything that a variant depends on, the version of the code that makes it included.

    Parameters
    ----------
    job
        What is made.
    model_fingerprint, dtype
        Of the dense model.
    text_fingerprint
        Of the calibration text, if there is some.
    """
    return content_sha256(
        {
            "code": code_version("pruning"),
            "model": model_fingerprint,
            "dtype": dtype,
            "recipe": job.recipe.model_dump(mode="json"),
            "set": job.calibration.model_dump(mode="json") if job.calibration else None,
            "text": text_fingerprint,
        }
    )


class PruningRun:
    """Variants to be made of one model: what is finished, what is left and what it will take, a wave at a time.

    Parameters
    ----------
    anatomy, tokenizer
        Of the dense model.
    jobs
        All that is wanted, finished or not; names must be unique.
    corpus
        Of the calibration text.
    folder
        With ``variants/ID`` for each finished variant and ``scratch`` for those that are being made; ``None`` keeps
        everything in memory.
    memory, device_memory, name, batch_tokens
        As for :func:`prune`.

    Attributes
    ----------
    anatomy, fingerprint
        Of the dense model.
    jobs, keys
        Every variant's job, and a hash of everything that the variant depends on.
    plan
        What it will take to make what is left, to be printed; ``None`` if nothing is.
    set_aside
        Name of every variant that cannot be made to the reason.

    Raises
    ------
    RecipeError, TextError
        If a recipe does not fit the model, a cap is too small, or there is too little text.
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
    ) -> None:
        self.anatomy = anatomy
        self.jobs = {job.id: job for job in jobs}
        self.folder = folder
        self.fingerprint = anatomy.fingerprint()
        self._name = name or str(anatomy.model.name_or_path)
        self._corpus = corpus
        self._batch_tokens = batch_tokens
        self._held: dict[str, Variant] = {}
        for job in self.jobs.values():
            check_fits(self.anatomy, job.recipe)
        self._texts = {
            job.id: calibration_fingerprint(corpus, job.calibration)
            for job in self.jobs.values()
            if corpus and job.calibration
        }
        self.keys = {variant: self._key(job) for variant, job in self.jobs.items()}
        self.set_aside = {v: reason for v, (key, reason) in self._on_record().items() if self.keys.get(v) == key}
        if self.set_aside.keys() == self.jobs.keys():
            self.set_aside = {}  # nothing would be left: they are tried again
        pending = self.pending
        sets = [job.calibration for job in self.jobs.values() if job.calibration]
        self.text: CalibrationText | None = None
        if pending and sets and corpus is not None:
            self.text = CalibrationText.draw(tokenizer, corpus, sets)
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
            )

    @property
    def pending(self) -> list[Job]:
        """The jobs that are left: neither finished nor set aside."""
        return [job for v, job in self.jobs.items() if v not in self.set_aside and not self.finished(v)]

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        """What is left, as it was planned, those that a killed run was in the middle of first."""
        waves = self.plan.waves if self.plan else ()
        return tuple(Wave(self._wave_name(jobs), jobs, sweep_work(self.anatomy, jobs, self.text)) for jobs in waves)

    def place(self, variant: str) -> Path:
        """Return the folder of a variant."""
        assert self.folder is not None
        return self.folder / VARIANTS / variant

    def finished(self, variant: str) -> bool:
        """Whether a variant is there, made of all that it would be made of now."""
        if self.folder is None:
            return variant in self._held
        try:
            return Variant.open(self.place(variant), self.fingerprint).record.key == self.keys[variant]
        except VariantError:
            return False

    def open(self, variant: str) -> Variant:
        """Return a finished variant; from a folder, masks and values are read when they are asked for.

        Raises
        ------
        VariantError
            If it is not there, or damaged.
        """
        return self._held[variant] if self.folder is None else Variant.open(self.place(variant), self.fingerprint)

    def run(self, wave: Wave, progress: Progress = lambda tokens: None) -> list[str]:
        """Carry out one wave, and return the names of the variants that it made.

        Raises
        ------
        ModelError
            If no job at all can be carried out, of this wave or of those before it.
        DiskError
            If the disk is full or the folder cannot be used; what is finished stays, and so does what was begun.
        """
        self._check_places(wave)
        workspace = self._workspace(wave)
        swept = sweep(
            self.anatomy,
            wave.jobs,
            self.text,
            batch_tokens=self._batch_tokens,
            workspace=workspace,
            progress=progress,
        )
        made = [job for job in wave.jobs if job not in swept.set_aside]
        for job in made:
            if not self.finished(job.id):  # else it was put in its place before a kill
                masks, values = workspace.results(job.id)
                record = self.record(job, workspace.remarks(job.id))
                if self.folder is None:
                    self._held[job.id] = Variant(record, masks, values)
                else:
                    record.save(workspace.place(job.id))
                    self.place(job.id).parent.mkdir(parents=True, exist_ok=True)
                    put_in_place(workspace.place(job.id), self.place(job.id))
        self._note_set_aside({job.id: reason for job, reason in swept.set_aside.items()})
        workspace.close()
        return [job.id for job in made]

    def close(self) -> None:
        """Remove what waves have left that were begun and are no longer wanted, once everything is made."""
        for folder in self._scratch():
            clear(folder)
        if self.folder is not None:
            with suppress(OSError):  # not there, or somebody put something into it
                (self.folder / SCRATCH).rmdir()

    def record(self, job: Job, remarks: Sequence[str] = ()) -> VariantRecord:
        """Return what is to be said of the variant that a job makes."""
        return VariantRecord(
            id=job.id,
            model=self._name,
            model_fingerprint=self.fingerprint,
            recipe=job.recipe,
            calibration=job.calibration,
            text_fingerprint=self._texts.get(job.id),
            remarks=tuple(remarks),
            key=self.keys[job.id],
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
            return {}  # none, or damaged: they are tried again

    def _note_set_aside(self, reasons: dict[str, str]) -> None:
        self.set_aside |= reasons
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
        """Raise ``DiskError`` if something that is not ours is where a variant is to go."""
        for job in wave.jobs if self.folder is not None else ():
            place = self.place(job.id)
            if place.exists() and not (place.is_dir() and (is_variant(place) or not any(place.iterdir()))):
                raise DiskError(
                    f"{place} has something in it that prunescope did not write; move it away, or choose another folder"
                )

    def _begun(self, pending: Sequence[Job]) -> list[tuple[Job, ...]]:
        """Return the waves that a killed run was in the middle of, if they are still wanted as they were."""
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
