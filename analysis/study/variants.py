"""The variants of a study: their names and keys, and how to make and open them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from probes import DENSE
from pruning import Variant
from pruning.code_version import code_version
from pruning.errors import RecipeError
from pruning.files import content_sha256
from pruning.memory import free_memory
from pruning.runner import VARIANTS, PruningRun, job_key
from pruning.variants.others import numel_of

from ..frames import dense_columns
from .configuration import StudyConfig
from .imports import StudyImports
from .model import StudyModel
from .records import Records
from .texts import StudyTexts


class StudyVariants:
    """Variants made by the study, and models pruned elsewhere.

    Parameters
    ----------
    study, folder, records, texts, model
        The study, its folder, and its records, texts and dense model.
    memory, device_memory
        Caps in bytes during pruning.
    tell
        Called with the pruning plan.
    described
        Whether the model is known by its configuration only; weights are then not downloaded, and nothing is timed.
    workers
        How many workers make them: there are at least as many waves if there are as many calibration sets.
    """

    def __init__(
        self,
        study: StudyConfig,
        folder: Path,
        records: Records,
        texts: StudyTexts,
        model: StudyModel,
        memory: int | None,
        device_memory: int | None,
        tell: Callable[[str], None],
        *,
        described: bool = False,
        workers: int = 1,
    ) -> None:
        self._study = study
        self._folder = folder
        self._records = records
        self._texts = texts
        self._model = model
        self._caps = memory, device_memory
        self._tell = tell
        self._described = described
        self._workers = workers
        self.jobs = {job.id: job for job in study.jobs()}
        self._others: dict[str, int] = {}
        self.imports = StudyImports(study, tell, weights=not described)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Hash of everything that each variant depends on, by name.

        Raises
        ------
        RecipeError
            If a recipe uses a diagnosis of another model.
        ModelError, StudyError
            If a model made elsewhere, or all of a collection, is not there.
        """
        imported = {name: self.imports.files(name) for name in self.imports.found}
        facts = self._model.facts
        for path, remedy in self._study.remedies().items():
            if facts.fingerprint and remedy.model_fingerprint != facts.fingerprint:
                raise RecipeError(
                    f"{path} is a diagnosis of a model other than {self._study.model_name}; "
                    "diagnose a variant of this one"
                )
        keys = {}
        for name, job in self.jobs.items():
            text = self._texts.of_calibration(job.calibration) if job.calibration else None
            keys[name] = job_key(job, facts.fingerprint, facts.dtype, text)
        code = code_version("pruning")
        return keys | {
            name: content_sha256([code, facts.fingerprint, facts.dtype, files]) for name, files in imported.items()
        }

    @property
    def names(self) -> list[str]:
        """Names of all variants that were not set aside."""
        aside = self.set_aside
        return [name for name in self.keys if name not in aside]

    @property
    def models(self) -> list[str]:
        """The dense model and all variants."""
        return [DENSE, *self.names]

    @property
    def set_aside(self) -> dict[str, str]:
        """Variants that could not be made or imported, with the reason."""
        facts = {name: self._records.facts(record_of(name), key) for name, key in self.keys.items()}
        aside = {name: str(found["set_aside"]) for name, found in facts.items() if found and "set_aside" in found}
        return aside | self.imports.left_out

    def key(self, model: str) -> str:
        """Return a string that identifies everything one model depends on, dense or variant."""
        return self._model.facts.fingerprint + self._model.facts.dtype if model == DENSE else self.keys[model]

    def finished(self, name: str) -> bool:
        """Whether a variant was made or set aside."""
        return self._records.finished(record_of(name), self.keys[name])

    def place(self, name: str) -> Path:
        """Return the folder of a variant."""
        return self._folder / VARIANTS / name

    def open(self, name: str) -> Variant:
        """Open a finished variant."""
        return Variant.open(self.place(name), self._model.facts.fingerprint)

    def replaced(self, names: Collection[str]) -> int:
        """Return the largest number of values that a finished variant has of its own beside the projections.

        Only models made elsewhere have such values.
        """
        return max(
            (self._replaced(name) for name in names if name in self.imports.found and self.finished(name)), default=0
        )

    def _replaced(self, name: str) -> int:
        if name not in self._others:
            self._others[name] = 0 if name in self.set_aside else numel_of(self.open(name).others)
        return self._others[name]

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the columns that describe each model in frames."""
        pruned = {name: self.open(name).columns() for name in self.names}
        return {DENSE: dense_columns(self._study.model_name)} | pruned

    @cached_property
    def pruning(self) -> PruningRun:
        """The run that makes the missing variants; its plan is shown."""
        memory, device_memory = self._caps
        anatomy = self._model.anatomy
        if memory is None:
            memory = free_memory()
        if device_memory is None and anatomy.device.type == "cuda":
            device_memory = free_memory(anatomy.device)
        run = PruningRun(
            anatomy,
            self._model.tokenizer,
            list(self.jobs.values()),
            self._texts.corpus,
            self._folder,
            memory=memory,
            device_memory=device_memory,
            name=self._study.model_name,
            fingerprint=self._model.facts.fingerprint,
            trial=not self._described,
            parts=self._workers,
        )
        if run.plan is not None:
            self._tell(str(run.plan))
        return run


def record_of(variant: str) -> str:
    """Return the name of a variant's record."""
    return f"{VARIANTS}/{variant}"
