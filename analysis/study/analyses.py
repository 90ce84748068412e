"""The analyses: what was measured of models → tidy frames, wherever the measurements lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from probes import ChoiceScores, Item, LensMargins, LensReadings, Readings
from pruning import Anatomy, Segment, Variant
from pruning.errors import PrunescopeError, StudyError, first_line
from pruning.extensions import Extension

from ..frames import Frames, check, joined
from ..frames.added import added_frames
from ..metrics import (
    accuracy,
    code_agreement,
    contrasts,
    dose,
    geometry,
    lape,
    lens,
    lens_margins,
    lsar,
    mask_overlap,
    perplexity,
    recipe_contrasts,
    routing,
    signal,
    task_contrasts,
)
from ..metrics.lsar import LSAR

Analyzed = Mapping[str, pd.DataFrame]


class Measured(ABC):
    """What frames are made from; nothing is computed or opened before it is accessed.

    Attributes
    ----------
    columns
        Model (``"dense"`` first) to the columns that describe it.
    variants
        Every variant, by id.
    anatomy
        Of the dense model.
    readings
        ``(model, language)`` to what was read of the held-out text.
    lens
        ``(model, language)`` to the predictions after each block; none without a lens.
    margins
        ``(model, language)`` to the margins of choices after each block; none without a lens.
    subspaces
        Of the dense model after each block; those of rank `rank` (languages - 1, if that is ``None``).
    heldout
        Language to its held-out segments.
    items, scores, task
        Language to items; ``(model, language)`` to the scores on them; what to call them together.
    answers
        Answers to other questions, as parts of the frame ``items``.
    frames
        The frames that others are made from (:func:`made_from`).
    """

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """Columns that describe each model."""

    @property
    @abstractmethod
    def variants(self) -> Mapping[str, Variant]:
        """The variants."""

    @property
    @abstractmethod
    def anatomy(self) -> Anatomy:
        """Anatomy of the dense model."""

    @property
    @abstractmethod
    def readings(self) -> Mapping[tuple[str, str], Readings]:
        """What was read of the held-out text."""

    @property
    @abstractmethod
    def lens(self) -> Mapping[tuple[str, str], LensReadings]:
        """Predictions after each block."""

    @property
    @abstractmethod
    def margins(self) -> Mapping[tuple[str, str], LensMargins]:
        """Margins of choices after each block."""

    @property
    @abstractmethod
    def subspaces(self) -> list[LSAR]:
        """Subspaces of the dense model."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """Their rank, if it is stated."""

    @property
    @abstractmethod
    def heldout(self) -> Mapping[str, Sequence[Segment]]:
        """The held-out segments."""

    @property
    @abstractmethod
    def items(self) -> Mapping[str, Sequence[Item]]:
        """The items."""

    @property
    @abstractmethod
    def scores(self) -> Mapping[tuple[str, str], ChoiceScores]:
        """Scores on the items."""

    @property
    @abstractmethod
    def task(self) -> str:
        """Name of the items in frames."""

    @property
    @abstractmethod
    def answers(self) -> Iterable[pd.DataFrame]:
        """Answers to other questions."""

    @property
    @abstractmethod
    def frames(self) -> Frames:
        """The frames that others are made from."""


def _perplexity(of: Measured) -> Analyzed:
    return {"perplexity": perplexity.analyze(of.readings, of.columns)}


def _signal(of: Measured) -> Analyzed:
    return {"signal": signal.analyze(of.readings, of.columns)}


def _subspaces(of: Measured) -> Analyzed:
    return {"subspaces": lsar.analyze(of.readings, of.columns, of.subspaces, _ids(of))}


def _geometry(of: Measured) -> Analyzed:
    return {"geometry": geometry.analyze(of.readings, of.columns, _ids(of), of.rank)}


def _ids(of: Measured) -> dict[str, list[str]]:
    return {language: [segment.id for segment in segments] for language, segments in of.heldout.items()}


def _mask_overlap(of: Measured) -> Analyzed:
    variants, columns = list(of.variants.values()), of.columns
    text = {variant.id: variant.record.text for variant in variants}
    masks = {variant.id: variant.masks for variant in variants if variant.masks}
    parts = [mask_overlap.analyze(masks, columns, text)]
    codes = {variant.id: variant.codes for variant in variants if variant.codes}
    parts.append(code_agreement.analyze(codes, columns, text))
    if any(variant.values for variant in variants):
        parts.append(mask_overlap.agreement(variants, of.anatomy))
    return {"mask_overlap": joined("mask_overlap", parts)}


def _routing(of: Measured) -> Analyzed:
    return {"routing": routing.analyze(of.readings, of.columns, _ids(of))}


def _lens(of: Measured) -> Analyzed:
    return {"lens": lens.analyze(of.lens, of.columns)}


def _lens_margins(of: Measured) -> Analyzed:
    return {"lens_margins": lens_margins.analyze(of.margins, of.items, of.columns, of.task)}


def _neurons(of: Measured) -> Analyzed:
    by_language, selection = lape.analyze(of.readings, of.columns)
    return {"language_neurons": by_language, "neuron_selection": selection}


def _distributions(of: Measured) -> Analyzed:
    quantiles, shifts = lape.distributions(of.readings, of.columns)
    return {"neuron_entropy": quantiles, "neuron_shift": shifts}


def _contrasts(of: Measured) -> Analyzed:
    text = {name: variant.record.text for name, variant in of.variants.items()}
    return {"contrasts": contrasts.analyze(of.readings, of.columns, of.subspaces, text, _ids(of))}


def _items(of: Measured) -> Analyzed:
    own = accuracy.item_frame(of.scores, of.items, of.columns, of.task)
    items = joined("items", [own, *of.answers])
    return {"items": items, "accuracy": accuracy.analyze(items)}


def _task_contrasts(of: Measured) -> Analyzed:
    return {"task_contrasts": task_contrasts.analyze(of.frames["items"], of.frames["perplexity"])}


def _recipe_contrasts(of: Measured) -> Analyzed:
    return {"recipe_contrasts": recipe_contrasts.analyze(of.frames["items"], of.readings, of.columns, _ids(of))}


def _dose(of: Measured) -> Analyzed:
    return {"dose": dose.analyze(of.frames["items"], of.readings, of.columns)}


def _sparsity(of: Measured) -> Analyzed:
    masks = {name: variant.masks for name, variant in of.variants.items() if variant.masks}  # quantized have none
    return {"sparsity": mask_overlap.sparsity(masks, of.columns)}


#: The frames of each analysis, and what makes them.
ANALYSES: dict[tuple[str, ...], Callable[[Measured], Analyzed]] = {
    ("perplexity",): _perplexity,
    ("signal",): _signal,
    ("subspaces",): _subspaces,
    ("geometry",): _geometry,
    ("mask_overlap",): _mask_overlap,
    ("routing",): _routing,
    ("lens",): _lens,
    ("lens_margins",): _lens_margins,
    ("language_neurons", "neuron_selection"): _neurons,
    ("neuron_entropy", "neuron_shift"): _distributions,
    ("contrasts",): _contrasts,
    ("items", "accuracy"): _items,
    ("task_contrasts",): _task_contrasts,
    ("recipe_contrasts",): _recipe_contrasts,
    ("dose",): _dose,
    ("sparsity",): _sparsity,
}
#: Frames that are made from others.
MADE_FROM: dict[tuple[str, ...], tuple[str, ...]] = {
    ("task_contrasts",): ("items", "perplexity"),
    ("recipe_contrasts",): ("items",),
    ("dose",): ("items", "perplexity"),
}
#: Names of all frames that prunescope makes of a study, in order.
NAMES = tuple(name for names in ANALYSES for name in names)


def all_analyses() -> dict[tuple[str, ...], Callable[[Measured], Analyzed]]:
    """Return the frames of each analysis, and what makes them, those that other packages add at the end."""
    return ANALYSES | {(name,): partial(_added, name, added) for name, added in added_frames().items()}


def frame_names() -> tuple[str, ...]:
    """Return the names of all frames of a study, in order."""
    return (*NAMES, *added_frames())


def made_from(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the frames that those of an analysis are made from: for those of other packages all of prunescope's."""
    return MADE_FROM.get(names, ()) if names in ANALYSES else NAMES


def _added(name: str, added: Extension, of: Measured) -> Analyzed:
    """Return a frame that another package makes.

    Raises
    ------
    StudyError
        If the package raises an error, or returns something else.
    """
    try:
        return {name: check(name, added.found.analyze(of))}
    except PrunescopeError:
        raise
    except Exception as error:
        raise StudyError(f'the frame "{name}" of {added.package} cannot be made: {first_line(error)}') from error
