"""The stage that turns readings into tidy frames."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from probes import DENSE, ChoiceScores, Item, LensMargins, LensReadings, StoredReadings
from pruning import Anatomy, Segment, Variant
from pruning.code_version import code_version
from pruning.files import content_sha256

from ..frames import Frames, read_frame, write_frame
from ..frames.added import added_frames
from ..metrics.lsar import LSAR
from . import benchmark
from .analyses import MADE_FROM, Measured, all_analyses, frame_names, made_from
from .context import Context
from .read import (
    fitting_key,
    lens_key,
    lens_margins,
    lens_readings,
    margins_key,
    questions_file,
    questions_key,
    readings_finished,
    readings_key,
    stored_readings,
    subspaces,
)
from .units import Advance, Output, Unit

FOLDER = "frames"
#: Frames of the variants themselves, which can be made before anything is read.
OF_VARIANTS = ("mask_overlap", "sparsity")
#: Share of a run's total time that a frame takes, to estimate the remaining time.
SHARE = 0.004


class MakeFrames:
    """A unit is a frame, or two from one analysis.

    Parameters
    ----------
    only
        Names of frames to make; all by default.
    """

    name = "frames"

    def __init__(self, only: Collection[str] | None = None) -> None:
        self._only = None if only is None else frozenset(only)
        self._work = float(only is not None)  # the stage's share of the time is that of all frames

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining frames."""
        found = []
        for names in all_analyses():
            if not (self._only is None or self._only.issuperset(names)) or not all(
                frame_finished(context, name) for name in made_from(names)
            ):
                continue
            outputs = tuple(Output(f"{FOLDER}/{name}", frame_key(context, name)) for name in names)
            there = [
                context.records.finished(output.name, output.key) for output in outputs
            ]  # of each, for what it sets aside
            if not all(there):
                title = f"making the frame{'s' * (len(names) > 1)} {' and '.join(names)}"
                found.append(Unit(self.name, title, outputs, work=self._work))
        return found

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Make the frames of a unit, and record each."""
        began = time.monotonic()
        names = tuple(output.name.partition("/")[2] for output in unit.outputs)
        frames = all_analyses()[names](StudyMeasured(context))
        for output, name in zip(unit.outputs, names, strict=True):
            path = write_frame(context.folder / FOLDER, name, frames[name])
            context.records.finish(output.name, output.key, [path], time.monotonic() - began)
        advance(unit.work)


def frame_key(context: Context, name: str) -> str:
    """Return a hash of everything that a frame depends on."""
    code = code_version("analysis.metrics", "analysis.stats", "analysis.frames")
    models, languages = context.variants.models, context.study.languages
    inputs: list[object] = [code, name, context.study.model_name, models]
    if name in ("items", "accuracy"):
        inputs += [questions_key(context, model, lang) for model in models for lang in context.texts.items]
        inputs += [key for _, key, _, _ in benchmark.results(context)]
        inputs.append(context.texts.task)
    elif name == "lens":
        used = models if context.study.lens.tokens else ()
        inputs += [lens_key(context, model, lang) for model in used for lang in languages]
    elif name == "lens_margins":
        asked = context.texts.items if context.study.lens.tokens else ()
        inputs += [margins_key(context, model, lang) for model in models for lang in asked]
        inputs.append(context.texts.task)
    elif (name,) in MADE_FROM:
        inputs += [frame_key(context, other) for other in made_from((name,))]
    elif name in OF_VARIANTS:
        inputs += [context.variants.key(model) for model in models]
    elif name in added_frames():
        inputs += [added_frames()[name].code, *(frame_key(context, other) for other in made_from((name,)))]
    else:
        inputs += [readings_key(context, model, lang) for model in models for lang in languages]
        inputs += [fitting_key(context, lang) for lang in languages]
        inputs += [list(languages), context.study.evaluation.rank]
    return content_sha256(inputs)


def frame_finished(context: Context, name: str) -> bool:
    """Whether a frame is there and up to date."""
    return context.records.finished(f"{FOLDER}/{name}", frame_key(context, name))


def frames_finished(context: Context) -> bool:
    """Whether all frames and the dense model's readings are finished."""
    return all(frame_finished(context, name) for name in frame_names()) and all(
        readings_finished(context, DENSE, language) for language in context.study.languages
    )


class StudyFrames(Mapping[str, pd.DataFrame]):
    """The frames of a study, each read on access.

    Parameters
    ----------
    context
        Context of a study whose frames are finished.
    """

    def __init__(self, context: Context) -> None:
        self._folder = context.folder / FOLDER
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in frame_names():
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = read_frame(self._folder / f"{name}.parquet")
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(frame_names())

    def __len__(self) -> int:
        return len(frame_names())


@dataclass(frozen=True)
class StudyMeasured(Measured):
    """What a study has measured, as its folder has it."""

    context: Context

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Columns that describe each model."""
        return self.context.variants.columns()

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants that were not set aside."""
        return {name: self.context.variants.open(name) for name in self.context.variants.names}

    @property
    def anatomy(self) -> Anatomy:
        """Anatomy of the dense model, which is loaded."""
        return self.context.model.anatomy

    @property
    def readings(self) -> StoredReadings:
        """All readings of held-out text."""
        return stored_readings(self.context, self.context.variants.models)

    @property
    def lens(self) -> dict[tuple[str, str], LensReadings]:
        """Predictions after each block; none without a lens."""
        return lens_readings(self.context)

    @property
    def margins(self) -> dict[tuple[str, str], LensMargins]:
        """Margins of choices after each block; none without a lens."""
        return lens_margins(self.context)

    @property
    def subspaces(self) -> list[LSAR]:
        """Subspaces of the dense model."""
        return subspaces(self.context)

    @property
    def rank(self) -> int | None:
        """Their rank, if the study states it."""
        return self.context.study.evaluation.rank

    @property
    def heldout(self) -> dict[str, list[Segment]]:
        """The held-out segments, by language."""
        return self.context.texts.heldout

    @property
    def items(self) -> dict[str, list[Item]]:
        """The items, by language."""
        return self.context.texts.items

    @property
    def scores(self) -> dict[tuple[str, str], ChoiceScores]:
        """Scores on the items."""
        return {
            (model, language): ChoiceScores.open(questions_file(self.context, model, language))
            for model in self.context.variants.models
            for language in self.context.texts.items
        }

    @property
    def task(self) -> str:
        """Name of the items in frames."""
        return self.context.texts.task

    @property
    def answers(self) -> Iterator[pd.DataFrame]:
        """Answers to the harness's questions."""
        return benchmark.answers(self.context)

    @property
    def frames(self) -> Frames:
        """The finished frames."""
        return StudyFrames(self.context)
