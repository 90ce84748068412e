"""Units of work of a study, with their results, dependencies and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .context import Context

#: Share of a run's time taken by stages whose work is not measured in multiply-adds.
SHARES = {"frames": 0.04, "figures": 0.04, "tables": 0.003, "report": 0.005}
#: Called with the work done since it was last called, in multiply-adds.
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Output:
    """One result.

    Attributes
    ----------
    name
        Name of its record, such as ``readings/dense/en``.
    key
        Hash of everything that the result depends on, including the code.
    """

    name: str
    key: str


@dataclass(frozen=True)
class Unit:
    """A unit of work: plain data, from which a stage finds everything else in the context.

    Attributes
    ----------
    stage
        Name of the stage that runs it.
    title
        Description for the progress bar.
    outputs
        The results that it produces.
    work
        Multiply-adds.
    memory
        Peak memory in bytes, if known.
    """

    stage: str
    title: str
    outputs: tuple[Output, ...]
    work: float = 0.0
    memory: int = 0


@runtime_checkable
class Stage(Protocol):
    """A kind of unit."""

    name: str

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining units that can run now.

        This is called again once they are finished, since later units may depend on their results.

        Raises
        ------
        PrunescopeError
            If a unit cannot run, so that this is known before anything expensive starts.
        """

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Run one unit: write complete files, then the record of each result."""


@runtime_checkable
class Executor(Protocol):
    """Runs units; the only part that knows where they run."""

    def run(self, stage: Stage, units: Sequence[Unit]) -> None:
        """Run units of one stage, which do not depend on each other."""
