"""The stage that draws the figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain

from probes import DENSE, Readings
from pruning.code_version import code_version
from pruning.files import content_sha256

from ..frames import Frames, read_frame
from ..plots import save
from ..report import (
    KINDS,
    ReportFacts,
    ReportFigure,
    ReportTable,
    crossing_figures,
    diagnosis_figures,
    figures_of_group,
    figures_of_kind,
    kinds_of_group,
    map_figures,
    study_figures,
)
from .analyses import NAMES
from .configuration import StudyConfig
from .context import Context
from .diagnose import Diagnosis, across_languages, diagnoses
from .diagnosis_request import DiagnosisRequest
from .frames import StudyFrames, frame_finished, frame_key, frames_finished
from .read import readings_file
from .units import Advance, Output, Unit

FOLDER = "figures"
#: The frame of figures that need nothing else.
MASKS = "mask_overlap"
KINDS_OF_MASKS = frozenset(kinds_of_group(MASKS))
#: Share of a run's total time that figures take, to estimate the remaining time.
SHARE = 0.04


class DrawFigures:
    """A unit is a figure."""

    name = "figures"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining figures; none before the frames are finished."""
        if not frames_finished(context):
            return []
        return self._left(context, figure_keys(context))

    def _left(self, context: Context, keys: Mapping[str, str]) -> Sequence[Unit]:
        outputs = [Output(f"{FOLDER}/{name}", key) for name, key in keys.items()]
        return [
            Unit(self.name, "drawing " + output.name.partition("/")[2], (output,))
            for output in outputs
            if not context.records.finished(output.name, output.key)
        ]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Draw a figure, and record it."""
        (output,) = unit.outputs
        name = output.name.partition("/")[2]
        self._draw(context, output, figure_named(context, name))

    def _draw(self, context: Context, output: Output, figure: ReportFigure) -> None:
        began = time.monotonic()
        files = save(figure.draw(), context.folder / FOLDER, figure.name)
        context.records.finish(output.name, output.key, files, time.monotonic() - began)


class DrawFirstFigures(DrawFigures):
    """A unit is a figure of the masks, which can be drawn before anything is read."""

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining figures of the masks; none before their frame is finished."""
        if frames_finished(context) or not frame_finished(context, MASKS):
            return []
        left = self._left(
            context, {one.name: _key_of_masks(context, one.name, one.caption) for one in mask_figures(context)}
        )
        return [replace(unit, work=1.0) for unit in left]  # the stage's share of the time is that of all figures

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Draw a figure, record it, and say where the first one is."""
        drawn = {figure.name: figure for figure in mask_figures(context)}
        (output,) = unit.outputs
        self._draw(context, output, drawn[output.name.partition("/")[2]])
        if output.name == f"{FOLDER}/{next(iter(drawn))}":
            context.tell(f"a first figure: {context.folder / FOLDER}/{next(iter(drawn))}.png")


def mask_figures(context: Context) -> Iterator[ReportFigure]:
    """Yield the figures of the masks, for which only their frame need be there."""
    yield from figures_of_group({MASKS: StudyFrames(context)[MASKS]}, None, MASKS)


def figures(context: Context) -> Iterator[ReportFigure]:
    """Yield every figure of a study, in the order of the report."""
    yield from study_figures(StudyFrames(context), report_facts(context))
    yield from _of_diagnoses(context)


def _of_diagnoses(context: Context) -> Iterator[ReportFigure]:
    for diagnosis in diagnoses(context):
        yield from figures_of(diagnosis)
    for request, group in across_languages(context):
        yield from figures_across(request, group)


def figure_named(context: Context, name: str) -> ReportFigure:
    """Return one figure of a study; only the frames that figures of its kind show or mention are read for it."""
    frames, facts = StudyFrames(context), report_facts(context)
    kinds = [kind for kind in KINDS if _may_be(name, kind)]
    likely = (figure for kind in kinds for figure in figures_of_kind(frames, facts, kind))
    return next(figure for figure in chain(likely, _of_diagnoses(context)) if figure.name == name)


def _may_be(name: str, kind: str) -> bool:
    """Whether a figure of this name may be of a kind: kind, task and recipe make up the name."""
    return f"{name}-".startswith(f"{kind}-")


def figures_of(diagnosis: Diagnosis) -> Iterator[ReportFigure]:
    """Yield the figures of one diagnosis."""
    request = diagnosis.request
    what = {name: getattr(request, name) for name in ("name", "variant", "language", "category")}
    yield from diagnosis_figures(read_frame(diagnosis.frame), section=request.title, **what)
    if request.sources:
        yield from crossing_figures(read_frame(diagnosis.crossing), section=request.title, **what)


def figures_across(request: DiagnosisRequest, group: Mapping[str, Diagnosis]) -> Iterator[ReportFigure]:
    """Yield the figures of diagnoses that differ in language alone."""
    yield from map_figures(
        {language: read_frame(diagnosis.frame) for language, diagnosis in group.items()},
        section=request.title_of_all,
        name=request.name,
        variant=request.variant,
        category=request.category,
    )


def figure_keys(context: Context) -> dict[str, str]:
    """Return a hash of everything that each figure depends on, by name."""
    code = code_version("analysis.plots", "analysis.report", "analysis.frames")
    of_frames = content_sha256([code, [frame_key(context, name) for name in NAMES]])
    found = {
        name: _key_of_masks(context, name, caption)
        if any(_may_be(name, kind) for kind in KINDS_OF_MASKS)
        else content_sha256([of_frames, name, caption])
        for name, caption in captions_of(context, of_frames, study_figures).items()
    }
    for diagnosis in diagnoses(context):
        found |= {figure.name: content_sha256([code, diagnosis.key, figure.name]) for figure in figures_of(diagnosis)}
    for request, group in across_languages(context):
        of_each = [diagnosis.key for diagnosis in group.values()]
        found |= {f.name: content_sha256([code, of_each, f.name]) for f in figures_across(request, group)}
    return found


def _key_of_masks(context: Context, name: str, caption: str) -> str:
    code = code_version("analysis.plots", "analysis.report", "analysis.frames")
    return content_sha256([code, frame_key(context, MASKS), name, caption])


def captions_of(
    context: Context, of_frames: str, listed: Callable[[Frames, ReportFacts], Iterable[ReportFigure | ReportTable]]
) -> dict[str, str]:
    """Return the captions of figures or tables by name.

    Parameters
    ----------
    context
        Of a study whose frames are finished.
    of_frames
        A hash of all that the frames depend on.
    listed
        Lists the figures or tables that there are.
    """
    facts = report_facts(context)
    key = content_sha256([of_frames, listed.__name__, repr(facts)])
    if key not in context.captions:
        context.captions[key] = {one.name: one.caption for one in listed(StudyFrames(context), facts)}
    return context.captions[key]


def report_facts(context: Context) -> ReportFacts:
    """Return the facts of the report that are not in the frames."""
    study = context.study
    return facts_of(
        study,
        {lang: Readings.open(readings_file(context, DENSE, lang)) for lang in study.languages},
        {
            name: f"{checkpoint.source}{_found(context, name)}"
            for name, (checkpoint, _) in context.variants.imports.found.items()
            if name in context.variants.names
        },
        context.variants.set_aside,
    )


def facts_of(
    study: StudyConfig, dense: Mapping[str, Readings], imported: Mapping[str, str], set_aside: Mapping[str, str]
) -> ReportFacts:
    """Return the facts of a report.

    Parameters
    ----------
    study
        The study.
    dense
        Language to the dense model's readings.
    imported, set_aside
        As of :class:`analysis.report.ReportFacts`.
    """
    first = next(iter(dense.values()))
    return ReportFacts(
        model=study.model_name,
        languages=study.languages,
        sets=study.calibration_sets(),
        recipes=study.all_recipes(),
        imported=imported,
        set_aside=set_aside,
        segments=study.evaluation.segments,
        fit_segments=study.evaluation.fit_segments,
        rank=study.evaluation.rank or len(study.languages) - 1,
        skip_first=study.evaluation.skip_first,
        heldout_tokens={lang: int(own.tokens[0].sum()) for lang, own in dense.items()},
        blocks=len(first.pooled),
        neurons=first.n_neurons,
        versions=versions(),
    )


def _found(context: Context, name: str) -> str:
    found = context.variants.open(name).record.found
    return f" ({found})" if found else ""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    return {name: version(name) for name in ("prunescope", "torch", "transformers", "nnsight", "numpy", "scipy")}
