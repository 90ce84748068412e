"""Which units wait for which: the order that plans schedule by, and that executors keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Protocol, TypeVar, runtime_checkable

#: Names of the stages, level by level. What there is to do in a level can be listed once those before it are finished.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("prune",),
    ("read", "benchmark"),
    ("frames",),
    ("diagnose",),
    ("figures", "tables"),
    ("report",),
)
_LEVEL = {stage: number for number, level in enumerate(LEVELS) for stage in level}
#: Stages whose units wait only for the units that make the variants that they use.
_BY_VARIANT = LEVELS[1]


@runtime_checkable
class Step(Protocol):
    """What says of a unit when it can start."""

    @property
    def stage(self) -> str:
        """Name of its stage."""

    @property
    def makes(self) -> frozenset[str]:
        """Names of the variants that it makes."""

    @property
    def uses(self) -> frozenset[str]:
        """Names of the variants that it needs."""


@runtime_checkable
class Named(Protocol):
    """Anything with the name of a stage."""

    name: str


_Stage = TypeVar("_Stage", bound=Named)


def waits(steps: Sequence[Step]) -> list[frozenset[int]]:
    """Return which of some steps each of them waits for, as numbers into the sequence.

    What reads variants waits for the units that make them; everything later waits for all of the levels before it.
    """
    makers = {made: number for number, step in enumerate(steps) for made in step.makes}
    before = [frozenset(n for n, step in enumerate(steps) if _LEVEL[step.stage] < at) for at in range(len(LEVELS))]
    return [
        frozenset(makers[used] for used in step.uses if used in makers)
        if step.stage in _BY_VARIANT
        else before[_LEVEL[step.stage]]
        for step in steps
    ]


def levels(stages: Iterable[_Stage]) -> Iterator[list[_Stage]]:
    """Yield stages together whose units do not wait for each other, in the given order.

    >>> from types import SimpleNamespace as Stage
    >>> [[stage.name for stage in level] for level in levels([Stage(name="prune"), Stage(name="report")])]
    [['prune'], ['report']]
    """
    stages = list(stages)
    assert all(stage.name in _LEVEL for stage in stages), "a stage without a place in LEVELS"
    for _, together in groupby(stages, key=lambda stage: _LEVEL[stage.name]):
        yield list(together)
