"""What a study is made of: units of work, with the results that each leaves, what they depend on and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .context import Context

#: Called with the work done since it was last called, in multiply-adds.
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Output:
    """One result.

    Attributes
    ----------
    name
        Of its record, such as ``readings/dense/en``.
    key
        Hash of everything that the result depends on, the version of the code that makes it included.
    """

    name: str
    key: str


@dataclass(frozen=True)
class Unit:
    """A part of a study that is done in one go: plain data, by which a stage finds all else in the context.

    Attributes
    ----------
    stage
        Name of the stage that carries it out.
    title
        What it does, in words for the progress bar.
    outputs
        The results that are there when it is done.
    work
        Multiply-adds.
    memory
        Bytes at the most, where the stage can tell.
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
        """Return what is left to do and can be done now.

        It is asked again when these are done, since what comes next may depend on what they found.

        Raises
        ------
        PrunescopeError
            If something about them cannot be: told here, before anything expensive begins.
        """

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Carry out one unit: write whole files, then the record of each result."""


@runtime_checkable
class Executor(Protocol):
    """Decides where units run; nothing else knows."""

    def run(self, stage: Stage, units: Sequence[Unit]) -> None:
        """Carry out units of one stage, which do not depend on each other."""
