"""Geometry: was what tells languages apart rotated by pruning, or lost?

An error in a dense model's language-specific subspace, or languages found outside of it, would both be there after a
mere rotation. So each model is also looked at in its own subspace (LSAR, :mod:`analysis.metrics.lsar`), fitted in the
same way, and the two are compared: overlap of the subspaces, linear CKA, and what a linear probe reads off each part.

No text is read for it. The means of a model's subspace are those of one half of the held-out segments, and the other
half is judged in it; halves are then swapped. Fitted on the parallel text instead, the subspaces of 30 variants of an
8B model would cost another forward pass of all of them over it, and would hardly be less noisy: by default it has as
many segments.
Dense and pruned subspaces are fitted on opposite halves, so that the overlap of each model with itself, a half against
the other, is the ceiling that the number of segments sets: a pruned model with noisier means is not taken for a rotated
one. Within the judged half, the probe is fitted on one quarter and tested on the other. Halves and quarters are drawn
over ids: translations of a segment are never apart.

Everything is computed from inner products of the segments (700 × 700 for seven languages of 100 segments), and from the
means of languages, one layer of one model at a time. At 4096 dimensions that takes some 0.1 s on one core, 2.6 × the
product of the states with themselves, so 2 to 5 minutes for 31 models of 32 layers
(``tests/benchmarks/test_geometry_cost.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from probes import DENSE, Readings

from ..frames import VARIANT_COLUMNS, tidy
from ..stats.alignment import debiased_cka, mean_directions, overlap_and_angle
from ..stats.discriminant import predicted_classes
from ..stats.intervals import share_difference_interval, share_interval
from ..stats.jackknife import jackknife_interval

OVERLAPS = ("subspace_overlap", "largest_angle", "self_overlap", "subspace_overlap_change")
#: From what a probe predicts the language of a segment; see the frame's definitions.
PARTS = ("whole", "own_specific", "own_agnostic", "dense_specific", "dense_agnostic", "transferred")
#: The dense model's part that each is compared with: its own subspace is the dense one.
_BEFORE = (0, 1, 2, 1, 2, 1)
#: Changes of up to this much (of an overlap, or of a probe's accuracy) count as none; see :func:`verdicts`.
TOLERANCE = 0.05
#: What :func:`verdicts` says.
UNCHANGED, ROTATED_INSIDE, ROTATED, SCATTERED, LOST, UNDECIDED = VERDICTS = (
    "unchanged",
    "rotated inside",
    "rotated",
    "scattered",
    "lost",
    "undecided",
)
_QUARTERS = 4
#: Segments of a language that a quarter needs, to have a spread.
_ENOUGH_FOR_PROBE = 2
#: Segments that unbiased CKA needs, with one left out.
_ENOUGH_FOR_CKA = 5


def analyze(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, Sequence[str]],
    rank: int | None = None,
) -> pd.DataFrame:
    """Return the frame ``geometry``.

    With fewer than eight segments of a language, or a single language, there is nothing but CKA in it.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read of the held-out text.
    columns
        Variant to the columns that describe it.
    ids
        Language to the ids of the segments that were read; segments with one id are translations of each other.
    rank
        Of the subspaces; one less than there are languages by default.
    """
    languages = list(dict.fromkeys(language for _, language in readings))
    variants = list(dict.fromkeys(variant for variant, _ in readings))
    segments = _Segments.of([ids[language] for language in languages])
    rank = rank or len(languages) - 1
    layers = len(readings[DENSE, languages[0]].pooled)
    found: dict[str, list[_Found]] = {variant: [] for variant in variants}
    for layer in range(layers):

        def states(variant: str, layer: int = layer) -> _States:
            parts = [readings[variant, language].pooled_at(layer).double().numpy() for language in languages]
            return _States(segments, np.concatenate(parts), rank)

        dense = states(DENSE)
        for variant in variants:
            found[variant].append(_compared(dense, dense if variant == DENSE else states(variant)))
    rows = []
    for variant in variants:
        own = _Rows(columns[variant], languages, segments, np.arange(layers))
        own.add(found[variant], None if variant == DENSE else found[DENSE])
        if variant == DENSE and segments.enough:
            width = readings[DENSE, languages[0]].pooled.shape[-1]
            own.put("overlap_chance", (np.full(layers, rank / width),))
        rows += own.rows
    return tidy("geometry", rows)


# -- segments, in halves and quarters --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Segments:
    """The segments of all languages in one row: language, id and quarter of each, by number."""

    language: Int[np.ndarray, " rows"]
    unit: Int[np.ndarray, " rows"]
    quarter: Int[np.ndarray, " rows"]

    @classmethod
    def of(cls, ids: Sequence[Sequence[str]]) -> _Segments:
        names = dict.fromkeys(id for own in ids for id in own)
        number = dict(zip(names, range(len(names)), strict=True))
        quarters = np.random.default_rng(0).permutation(len(names)) % _QUARTERS
        unit = np.array([number[id] for own in ids for id in own])
        return cls(np.repeat(np.arange(len(ids)), [len(own) for own in ids]), unit, quarters[unit])

    @cached_property
    def counts(self) -> Int[np.ndarray, " languages"]:
        return np.bincount(self.language)

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    @cached_property
    def enough(self) -> bool:
        languages = len(self.counts)
        each = np.bincount(self.language * _QUARTERS + self.quarter, minlength=_QUARTERS * languages)
        return languages > 1 and bool((each >= _ENOUGH_FOR_PROBE).all())

    def of_half(self, half: int) -> Int[np.ndarray, " rows"]:
        return np.flatnonzero(self.quarter // 2 == half)


# -- one layer of one model --------------------------------------------------------------------------------------------


class _States:
    """One layer of one model: states around their mean over languages, their inner products, and the two halves."""

    def __init__(self, segments: _Segments, states: Float[np.ndarray, "rows hidden"], rank: int) -> None:
        self.segments = segments
        means = [states[segments.language == number].mean(axis=0) for number in range(len(segments.counts))]
        self.states = states - np.mean(means, axis=0)
        self.rank = rank

    @cached_property
    def products(self) -> Float[np.ndarray, "rows rows"]:
        return self.states @ self.states.T

    @cached_property
    def halves(self) -> tuple[_Half, _Half]:
        return _Half.of(self, 0), _Half.of(self, 1)


@dataclass(frozen=True)
class _Half:
    """The subspace of one half of the segments, and what it would be without each of them.

    Attributes
    ----------
    rows
        Its segments.
    means
        Of its languages, ``[languages, hidden]``.
    basis
        Orthonormal columns, ``[hidden, rank]``.
    directions
        The basis as combinations of centred means: of all segments, then without each unit of the half,
        ``[1 + units, languages, rank]``.
    """

    segments: _Segments
    rows: Int[np.ndarray, " half"]
    states: Float[np.ndarray, "half hidden"]
    means: Float[np.ndarray, "languages hidden"]
    basis: Float[np.ndarray, "hidden rank"]
    directions: Float[np.ndarray, "draws languages rank"]

    @classmethod
    def of(cls, model: _States, half: int) -> _Half:
        segments = model.segments
        rows = segments.of_half(half)
        states, language, unit = model.states[rows], segments.language[rows], segments.unit[rows]
        means = np.stack([states[language == number].mean(axis=0) for number in range(len(segments.counts))])
        products = means @ means.T
        # leaving out a segment moves its language's mean by (mean − segment) / (n − 1)
        share = 1 / (np.bincount(language) - 1)[language]
        to_means = states @ means.T
        moves = share[:, None] * (products[language] - to_means)
        one, other = np.nonzero(unit[:, None] == unit)
        between = (
            model.products[rows[one], rows[other]] - to_means[one, language[other]] - to_means[other, language[one]]
        )
        between = share[one] * share[other] * (between + products[language[one], language[other]])
        own = _numbered(unit)
        without = np.repeat(products[None], own.max() + 1, axis=0)
        np.add.at(without, (own, language), moves)
        np.add.at(without.swapaxes(1, 2), (own, language), moves)
        np.add.at(without, (own[one], language[one], language[other]), between)
        directions = mean_directions(_centred(np.concatenate([products[None], without])), model.rank)
        centred = means - means.mean(axis=0)
        return cls(segments, rows, states, means, centred.T @ directions[0], directions)

    def cosines(self, other: _Half) -> Float[np.ndarray, "draws rank rank"]:
        """Return the inner products of the two bases: of all segments, then without each unit of this half."""
        language = self.segments.language[self.rows]
        share = 1 / (np.bincount(language) - 1)[language]
        products = self.means @ other.means.T
        moves = share[:, None] * (products[language] - self.states @ other.means.T)
        own = _numbered(self.segments.unit[self.rows])
        without = np.repeat(products[None], own.max() + 1, axis=0)
        np.add.at(without, (own, language), moves)
        every = _centred(np.concatenate([products[None], without]))
        return self.directions.swapaxes(-1, -2) @ every @ other.directions[0]


def _numbered(values: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    return np.unique(values, return_inverse=True)[1]


def _centred(products: Float[np.ndarray, "draws means means"]) -> Float[np.ndarray, "draws means means"]:
    rows = products - products.mean(axis=-2, keepdims=True)
    return rows - rows.mean(axis=-1, keepdims=True)


# -- the comparison with the dense model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """One layer of one model, compared with the dense one.

    Attributes
    ----------
    overlap
        Overlap and largest angle of its subspace with the dense one, and overlap with itself, of all segments and
        without each unit, ``[3, 1 + units]``; None with too few segments.
    right
        Whether each segment's language was predicted from each of :data:`PARTS`, ``[parts, rows]``; None likewise.
    cka
        For each language, of all segments, then without each; None for the dense model itself, or too few segments.
    """

    overlap: Float[np.ndarray, "3 draws"] | None
    right: Float[np.ndarray, "parts rows"] | None
    cka: list[tuple[float, np.ndarray]] | None


def _compared(dense: _States, model: _States) -> _Found:
    segments = model.segments
    cka = None
    if model is not dense and segments.counts.min() >= _ENOUGH_FOR_CKA:
        cka = []
        for number in range(len(segments.counts)):
            own = np.ix_(*[np.flatnonzero(segments.language == number)] * 2)
            cka.append(debiased_cka(dense.products[own], model.products[own]))
    if not segments.enough:
        return _Found(None, None, cka)
    overlap = np.concatenate([_overlap(dense, model), _overlap(model, model)[:1]])
    return _Found(overlap, _predicted_right(dense, model), cka)


def _overlap(dense: _States, model: _States) -> Float[np.ndarray, "2 draws"]:
    """Return overlap and largest angle: means of the two ways to give one half to each model."""
    whole, without = [], np.zeros((2, model.segments.units))
    for half in (0, 1):
        before, after = dense.halves[half], model.halves[1 - half]
        for one, other in ((before, after), (after, before)):
            found = overlap_and_angle(one.cosines(other))
            units = np.unique(model.segments.unit[one.rows])
            without[:, units] += found[:, 1:] / 2
        whole.append(found[:, 0])
    return np.column_stack([np.mean(whole, axis=0), without])


def _predicted_right(dense: _States, model: _States) -> Float[np.ndarray, "parts rows"]:
    segments, hidden, rank = model.segments, model.states.shape[1], model.rank
    right = np.zeros((len(PARTS), len(segments.language)))
    for half in (0, 1):
        fitted_on = 1 - half
        own = model.states @ model.halves[fitted_on].basis
        before = dense.states @ dense.halves[fitted_on].basis
        after = model.states @ dense.halves[fitted_on].basis
        for quarter in (2 * half, 2 * half + 1):
            f, t = (np.flatnonzero(segments.quarter == number) for number in (quarter, quarter ^ 1))
            inside = (own[f] @ own[f].T, own[t] @ own[f].T)
            within_dense = (after[f] @ after[f].T, after[t] @ after[f].T)
            whole = (model.products[np.ix_(f, f)], model.products[np.ix_(t, f)])
            pairs = (
                (whole, hidden),
                (inside, rank),
                ((whole[0] - inside[0], whole[1] - inside[1]), hidden - rank),
                (within_dense, rank),
                ((whole[0] - within_dense[0], whole[1] - within_dense[1]), hidden - rank),
                ((before[f] @ before[f].T, after[t] @ before[f].T), rank),
            )
            for part, ((fitted, tested), width) in enumerate(pairs):
                right[part, t] = predicted_classes(fitted, tested, segments.language[f], width) == segments.language[t]
    return right


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """The rows of one model: at each layer, and of means over layers."""

    columns: Mapping[str, Any]
    languages: Sequence[str]
    segments: _Segments
    layers: np.ndarray

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def put(self, metric: str, estimate: Any, n: int | None = None, language: str | None = None) -> None:
        """Add a metric at each layer, or, for a scalar, its mean over layers."""
        value, *interval = (np.atleast_1d(each) for each in estimate)
        place: dict[str, Any] = {"metric": [metric] * len(value), "language": language, "n": n}
        if np.ndim(estimate[0]):
            place["layer"] = self.layers
        low_high = dict(zip(("low", "high"), interval, strict=False))
        self.rows.append({**self.columns, **place, "value": value, **low_high})

    def add(self, found: Sequence[_Found], dense: Sequence[_Found] | None) -> None:
        """Add everything that was found, and, of a pruned model, its change from the dense one."""
        units = self.segments.units
        if found[0].cka is not None:
            self._add_cka([one.cka for one in found if one.cka is not None])
        if found[0].overlap is None or found[0].right is None:
            return
        overlap = np.stack([one.overlap for one in found if one.overlap is not None], axis=-1)  # [3, draws, layers]
        right = np.stack([one.right for one in found if one.right is not None], axis=1)  # [parts, layers, rows]
        before = None
        if dense is not None:
            own = np.stack([one.overlap for one in dense if one.overlap is not None], axis=-1)
            overlap = np.concatenate([overlap, (overlap[0] - (overlap[2] + own[2]) / 2)[None]])
            before = np.stack([one.right for one in dense if one.right is not None], axis=1)[list(_BEFORE)]
        for metric, draws in zip(OVERLAPS, overlap, strict=False):
            for each in (draws, draws.mean(axis=-1)):
                self.put(metric, jackknife_interval(np.asarray(each[0]), each[1:]), units)
        for part, name in enumerate(PARTS if before is not None else PARTS[: max(_BEFORE) + 1]):
            self._add_decoding(f"{name}_decoding", right[part], None if before is None else before[part])

    def _add_decoding(
        self, metric: str, right: Float[np.ndarray, "layers rows"], before: Float[np.ndarray, "layers rows"] | None
    ) -> None:
        """Add the share of languages that a probe found, and its change; all layers together last."""
        segments, units = self.segments, self.segments.units
        for number, language in enumerate(self.languages):
            own = right[:, segments.language == number]
            shares = [share_interval(layer, np.ones(len(layer))) for layer in own]
            self.put(metric, np.transpose(shares), own.shape[1], language)
        of_units = np.eye(units)[segments.unit]
        asked = of_units.sum(axis=0)
        found = right @ of_units
        self.put(metric, np.transpose([share_interval(layer, asked) for layer in found]), units)
        self.put(metric, share_interval(found.sum(axis=0), asked * len(found)), units)
        if before is None:
            return
        gained, lost = (right > before) @ of_units, (right < before) @ of_units
        changes = [share_difference_interval(*layer, asked) for layer in zip(gained, lost, strict=True)]
        self.put(f"{metric}_change", np.transpose(changes), units)
        together = share_difference_interval(gained.sum(axis=0), lost.sum(axis=0), asked * len(found))
        self.put(f"{metric}_change", together, units)

    def _add_cka(self, cka: Sequence[Sequence[tuple[float, np.ndarray]]]) -> None:
        for number, language in enumerate(self.languages):
            draws = np.column_stack([np.append(*layer[number]) for layer in cka])  # [1 + segments, layers]
            self.put("cka", jackknife_interval(draws[0], draws[1:]), len(draws) - 1, language)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what pruning did to the languages of each pruned model, at each layer and (no layer) on average.

    A quantity counts as fallen if its whole 95 % interval lies below −:data:`TOLERANCE`, as kept if it lies above, and
    otherwise as unknown.

    ==================  ==============================================================================================
    ``lost``            languages are found less well in the model's own subspace, and in its whole state
    ``scattered``       less well in its own subspace, but as well as before in the whole state
    ``rotated``         as well as before in its own subspace, which overlaps less with the dense one than each with
                        itself
    ``rotated inside``  the subspace is kept, but the dense model's probe in it finds the languages less well
    ``unchanged``       none of all that
    ``undecided``       an interval is too wide to say
    ==================  ==============================================================================================

    Returns
    -------
    pandas.DataFrame
        The variant's columns, ``layer`` and ``verdict``, one of :data:`VERDICTS`.
    """
    keys = [*VARIANT_COLUMNS, "layer"]
    rows = frame[(frame["method"] != DENSE) & frame["language"].isna()]
    rows = rows.assign(layer=rows["layer"].astype(float).fillna(-1))
    metrics = {
        "own": "own_specific_decoding_change",
        "whole": "whole_decoding_change",
        "overlap": "subspace_overlap_change",
        "transferred": "transferred_decoding_change",
    }
    tables = {}
    for short, metric in metrics.items():
        of = rows[rows["metric"] == metric].set_index(keys)
        tables[short] = pd.Series(np.select([of["high"] < -TOLERANCE, of["low"] > -TOLERANCE], [-1, 1], 0), of.index)
    states = pd.DataFrame(tables)
    found = states.apply(_verdict, axis=1) if len(states) else pd.Series(dtype=str, index=states.index)
    result = found.rename("verdict").reset_index()
    result["layer"] = result["layer"].where(result["layer"] >= 0)
    return result


def _verdict(state: pd.Series) -> str:
    """Return the verdict from what fell (-1), was kept (1), or is unknown (0)."""
    if state["own"] < 0 and state["whole"]:
        return LOST if state["whole"] < 0 else SCATTERED
    if state["own"] > 0 and state["overlap"] < 0:
        return ROTATED
    if state["own"] > 0 and state["overlap"] > 0 and state["transferred"]:
        return ROTATED_INSIDE if state["transferred"] < 0 else UNCHANGED
    return UNDECIDED
