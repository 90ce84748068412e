"""The stage that turns readings into tidy frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from probes import DENSE, StoredReadings
from probes.scoring import ChoiceScores
from pruning.code_version import code_version
from pruning.files import content_sha256

from ..frames import joined, read_frame, write_frame
from ..metrics import (
    accuracy,
    code_agreement,
    contrasts,
    geometry,
    lape,
    lsar,
    mask_overlap,
    perplexity,
    routing,
    signal,
    task_contrasts,
)
from . import benchmark
from .context import Context
from .read import (
    fitting_key,
    questions_file,
    questions_key,
    readings_finished,
    readings_key,
    stored_readings,
    subspaces,
)
from .units import Advance, Output, Unit

FOLDER = "frames"
#: Share of a run's total time that a frame takes, to estimate the remaining time.
SHARE = 0.004

Analyzed = Mapping[str, pd.DataFrame]


class MakeFrames:
    """A unit is a frame, or two from one analysis."""

    name = "frames"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining frames."""
        found = []
        for names in _ANALYSES:
            if not all(frame_finished(context, name) for name in _MADE_FROM.get(names, ())):
                continue
            outputs = tuple(Output(f"{FOLDER}/{name}", frame_key(context, name)) for name in names)
            if not all(context.records.finished(output.name, output.key) for output in outputs):
                title = f"making the frame{'s' * (len(names) > 1)} {' and '.join(names)}"
                found.append(Unit(self.name, title, outputs))
        return found

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Make the frames of a unit, and record each."""
        began = time.monotonic()
        names = tuple(output.name.partition("/")[2] for output in unit.outputs)
        frames = _ANALYSES[names](context)
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
    elif name == "task_contrasts":
        inputs += [frame_key(context, other) for other in _MADE_FROM[name,]]
    elif name in ("mask_overlap", "sparsity"):
        inputs += [context.variants.key(model) for model in models]
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
    return all(frame_finished(context, name) for name in NAMES) and all(
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
        if name not in NAMES:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = read_frame(self._folder / f"{name}.parquet")
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


# -- analyses -------------------------------------------------------------------------------------------------------


def _perplexity(context: Context) -> Analyzed:
    return {"perplexity": perplexity.analyze(_readings(context), context.variants.columns())}


def _signal(context: Context) -> Analyzed:
    return {"signal": signal.analyze(_readings(context), context.variants.columns())}


def _subspaces(context: Context) -> Analyzed:
    return {
        "subspaces": lsar.analyze(_readings(context), context.variants.columns(), subspaces(context), _ids(context))
    }


def _geometry(context: Context) -> Analyzed:
    rank = context.study.evaluation.rank
    return {"geometry": geometry.analyze(_readings(context), context.variants.columns(), _ids(context), rank)}


def _ids(context: Context) -> dict[str, list[str]]:
    return {language: [s.id for s in segments] for language, segments in context.texts.heldout.items()}


def _mask_overlap(context: Context) -> Analyzed:
    variants = [context.variants.open(name) for name in context.variants.names]
    columns = context.variants.columns()
    masks = {variant.id: variant.masks for variant in variants if variant.masks}
    parts = [mask_overlap.analyze(masks, columns, {variant.id: variant.record.text for variant in variants})]
    codes = {variant.id: variant.codes for variant in variants if variant.codes}
    parts.append(code_agreement.analyze(codes, columns, {variant.id: variant.record.text for variant in variants}))
    if any(variant.values for variant in variants):
        parts.append(mask_overlap.agreement(variants, context.model.anatomy))
    return {"mask_overlap": joined("mask_overlap", parts)}


def _routing(context: Context) -> Analyzed:
    return {"routing": routing.analyze(_readings(context), context.variants.columns(), _ids(context))}


def _neurons(context: Context) -> Analyzed:
    by_language, selection = lape.analyze(_readings(context), context.variants.columns())
    return {"language_neurons": by_language, "neuron_selection": selection}


def _distributions(context: Context) -> Analyzed:
    quantiles, shifts = lape.distributions(_readings(context), context.variants.columns())
    return {"neuron_entropy": quantiles, "neuron_shift": shifts}


def _contrasts(context: Context) -> Analyzed:
    text = {name: context.variants.open(name).record.text for name in context.variants.names}
    frame = contrasts.analyze(_readings(context), context.variants.columns(), subspaces(context), text, _ids(context))
    return {"contrasts": frame}


def _items(context: Context) -> Analyzed:
    scores = {
        (model, language): ChoiceScores.open(questions_file(context, model, language))
        for model in context.variants.models
        for language in context.texts.items
    }
    own = accuracy.item_frame(scores, context.texts.items, context.variants.columns(), context.texts.task)
    items = joined("items", [own, *benchmark.answers(context)])
    return {"items": items, "accuracy": accuracy.analyze(items)}


def _task_contrasts(context: Context) -> Analyzed:
    frames = StudyFrames(context)
    return {"task_contrasts": task_contrasts.analyze(frames["items"], frames["perplexity"])}


def _sparsity(context: Context) -> Analyzed:
    opened = {name: context.variants.open(name).masks for name in context.variants.names}
    masks = {name: own for name, own in opened.items() if own}  # quantized models have none
    return {"sparsity": mask_overlap.sparsity(masks, context.variants.columns())}


def _readings(context: Context) -> StoredReadings:
    return stored_readings(context, context.variants.models)


_ANALYSES: dict[tuple[str, ...], Callable[[Context], Analyzed]] = {
    ("perplexity",): _perplexity,
    ("signal",): _signal,
    ("subspaces",): _subspaces,
    ("geometry",): _geometry,
    ("mask_overlap",): _mask_overlap,
    ("routing",): _routing,
    ("language_neurons", "neuron_selection"): _neurons,
    ("neuron_entropy", "neuron_shift"): _distributions,
    ("contrasts",): _contrasts,
    ("items", "accuracy"): _items,
    ("task_contrasts",): _task_contrasts,
    ("sparsity",): _sparsity,
}
#: Frames that are made from others.
_MADE_FROM: dict[tuple[str, ...], tuple[str, ...]] = {("task_contrasts",): ("items", "perplexity")}
#: Names of all frames of a study, in order.
NAMES = tuple(name for names in _ANALYSES for name in names)
