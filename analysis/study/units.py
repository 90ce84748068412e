"""Units of work of a study, with their results, dependencies and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from probes import DENSE

from .context import Context
from .progress import WorkProgress

#: Share of a run's time taken by stages whose work is not measured in multiply-adds.
SHARES = {"frames": 0.04, "figures": 0.04, "tables": 0.003, "report": 0.005}
#: Called with the work done since it was last called, in multiply-adds.
Advance = Callable[[float], None]
_Answer = TypeVar("_Answer")


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

    @property
    def makes(self) -> frozenset[str]:
        """Names of the variants that it makes."""
        return self._models("variants")

    @property
    def uses(self) -> frozenset[str]:
        """Names of the variants that it reads or asks."""
        return self._models("readings", "questions", "lens", "margins", "benchmark") - {DENSE}

    def _models(self, *kinds: str) -> frozenset[str]:
        parts = [output.name.split("/") for output in self.outputs]
        return frozenset(part[1] for part in parts if part[0] in kinds)


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

    @property
    def failed(self) -> Mapping[Unit, str]:
        """Units that failed for good, with what is said of each; what stops everything is raised instead."""

    def machines(self) -> Sequence[Mapping[str, Any]]:
        """The machines that units run on, as provenance describes them."""

    def ask(self, question: Callable[[Context], _Answer]) -> _Answer:
        """Return what can be known of a study only where its model is."""

    def run(self, stages: Sequence[Stage], units: Sequence[Unit], progress: WorkProgress) -> None:
        """Run units of some stages, which do not wait for each other."""
