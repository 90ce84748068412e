"""What a study will cost, before it is run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console

from pruning.correction import NONE
from pruning.errors import StudyError

from ..configuration import StudyConfig
from ..context import Context
from ..model import ModelFacts
from ..order import waits
from ..run import needing_the_whole
from .estimates import Estimate, estimates
from .pace import Figures, Pace, Trial
from .schedule import Task

#: A cap that nothing exceeds, on the memory of a machine elsewhere about which nothing is said.
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class StudyPlan:
    """What is left of a study, and what it will need.

    Attributes
    ----------
    study, folder
        The study, and the folder for its results.
    estimates
        What is left, unit by unit, in order.
    facts
        Facts about the model.
    loading
        Seconds in which each worker loads the model first; 0 if nothing needs it.
    basis
        What the times are based on, as a sentence without its full stop.
    free
        Free bytes on the disk of the folder.
    remarks
        What else there is to know, in sentences.
    """

    study: StudyConfig
    folder: Path
    estimates: tuple[Estimate, ...]
    facts: ModelFacts
    loading: float
    basis: str
    free: int
    remarks: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long one worker takes for everything."""
        return self.loading + sum(one.seconds for one in self.estimates)

    @property
    def kept(self) -> int:
        """Bytes that the results will take on disk."""
        return sum(one.kept for one in self.estimates)

    @property
    def scratch(self) -> int:
        """Most bytes that one worker needs on disk for a while."""
        return max((one.scratch for one in self.estimates), default=0)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The units as tasks for workers that have loaded the model, each with those that it waits for."""
        names = _unique([one.title for one in self.estimates])
        return tuple(
            Task(name, one.seconds, one.memory, frozenset(names[number] for number in before))
            for name, one, before in zip(names, self.estimates, waits(self.estimates), strict=True)
        )


_MEASURING = ("prune", "read", "benchmark")


def _unique(titles: Sequence[str]) -> list[str]:
    """Return titles, numbered where one occurs again."""
    seen: dict[str, int] = {}
    names = []
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
        names.append(title if seen[title] == 1 else f"{title} ({seen[title]})")
    return names


def plan_study(
    study: StudyConfig,
    folder: Path,
    console: Console | None = None,
    *,
    memory: int | None = None,
    device_memory: int | None = None,
    figures: Figures | None = None,
    workers: int = 1,
) -> StudyPlan:
    """Estimate what a study, or what is left of it, will need; nothing is written to its folder.

    Parameters
    ----------
    study, folder
        As for :func:`analysis.study.run.run_study`; the folder need not exist.
    console
        Console for progress; standard error by default.
    memory, device_memory
        Caps in bytes on the memory of one worker and of its device. By default what is free on this machine; with
        figures, none.
    figures
        Speed of a machine elsewhere: the model's weights are then not loaded, and need not be there. By default, a
        batch of text is timed on this machine.
    workers
        How many workers there will be: units are cut for as many.

    Raises
    ------
    PrunescopeError
        If text, model, recipe or folder cannot be used, or a cap is too small.
    """
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file; choose a folder for the study (--out)")
    said = console or Console(stderr=True)
    if figures is not None:
        memory = _UNLIMITED if memory is None else memory
        if device_memory is None and study.device.partition(":")[0] not in ("auto", "cpu", "mps"):
            device_memory = _UNLIMITED
    context = Context(
        study,
        folder,
        memory,
        device_memory,
        needing_the_whole(study, only_prune=False),
        lambda words: said.print(words, highlight=False, markup=False, soft_wrap=True),
        written=False,
        described=figures is not None,
        workers=workers,
    )
    context.model.check_device()
    context.texts.check()
    pace: Pace = Trial(context) if figures is None else figures.of(context)
    found = tuple(estimates(context, pace))
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
    return StudyPlan(
        study,
        folder,
        found,
        context.model.facts,
        pace.loading() if any(one.stage in _MEASURING for one in found) else 0.0,
        str(pace),
        free,
        tuple(_remarks(context, found)),
    )


def _remarks(context: Context, found: Sequence[Estimate]) -> Iterator[str]:
    if context.described and not context.model.facts.fingerprint and context.records.everything():
        yield (
            f"{context.folder} has results, but no facts about this model on such a machine, so that it cannot be "
            "told which of them are finished: all units are counted"
        )
    making = {name for one in found for name in one.makes}
    recipes = [job.recipe for name, job in context.variants.jobs.items() if name in making]
    steps = dict.fromkeys(step for recipe in recipes for step in (recipe.refinement, recipe.correction) if step != NONE)
    if steps:
        yield f"Pruning takes longer than this: the time of {' and '.join(steps)} is not counted"
