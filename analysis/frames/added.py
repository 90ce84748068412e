"""Frames that other packages add to every study (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pruning.errors import StudyError, unknown
from pruning.extensions import Extension, extensions

from .schema import COLUMNS, FRAMES, FrameSpec


@dataclass(frozen=True)
class AddedFrame:
    """A frame of another package, named by an entry point of its name in the group ``prunescope.metrics``.

    Attributes
    ----------
    spec
        Its columns, and its metrics with unit and definition.
    analyze
        ``analyze(measured)`` returns the frame, of an :class:`analysis.study.analyses.Measured`: what was read of the
        held-out text, the variants, the answers. :func:`analysis.frames.tidy` makes it from rows.
    """

    spec: FrameSpec
    analyze: Callable[[Any], pd.DataFrame]


def added_frames() -> dict[str, Extension]:
    """Return the frames that other packages add, each found as an :class:`AddedFrame`, by name."""
    return extensions("metrics", _check_added)


def spec_of(name: str) -> FrameSpec:
    """Return what a frame holds.

    Raises
    ------
    StudyError
        If there is no frame of this name.
    """
    if name in FRAMES:
        return FRAMES[name]
    if name in added_frames():
        added: AddedFrame = added_frames()[name].found
        return added.spec
    raise StudyError(unknown("frame", name, [*FRAMES, *added_frames()]))


def all_specs() -> dict[str, FrameSpec]:
    """Return what every frame holds, by name."""
    return FRAMES | {name: spec_of(name) for name in added_frames()}


def _check_added(name: str, found: object) -> None:
    if not isinstance(found, AddedFrame):
        raise StudyError("it should be an analysis.frames.AddedFrame")
    if name in FRAMES or not name.isidentifier():
        raise StudyError(f'"{name}" cannot be the name of another frame')
    for column in found.spec.columns:
        if column not in COLUMNS:
            raise StudyError(unknown("column", column, COLUMNS))
