"""One layer of one model, in halves of its segments: its subspaces, and how they compare with the dense model's.

Halves and quarters are drawn over ids, so that translations of a segment are never apart. Everything is computed from
inner products of the segments, and from the means of languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from ..stats.alignment import debiased_cka, mean_directions, overlap_and_angle
from ..stats.discriminant import predicted_classes

#: From what a probe predicts the language of a segment; see the frame's definitions.
PARTS = ("whole", "own_specific", "own_agnostic", "dense_specific", "dense_agnostic", "transferred")
_QUARTERS = 4
#: Segments of a language that a quarter needs, to have a spread.
_ENOUGH_FOR_PROBE = 2
#: Segments that unbiased CKA needs, with one left out.
_ENOUGH_FOR_CKA = 5


# -- segments, in halves and quarters --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """The segments of all languages in one row: language, id and quarter of each, by number."""

    language: Int[np.ndarray, " rows"]
    unit: Int[np.ndarray, " rows"]
    quarter: Int[np.ndarray, " rows"]

    @classmethod
    def of(cls, ids: Sequence[Sequence[str]]) -> Segments:
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


class States:
    """One layer of one model: states around their mean over languages, their inner products, and the two halves."""

    def __init__(self, segments: Segments, states: Float[np.ndarray, "rows hidden"], rank: int) -> None:
        self.segments = segments
        means = [states[segments.language == number].mean(axis=0) for number in range(len(segments.counts))]
        self.states = states - np.mean(means, axis=0)
        self.rank = rank

    @cached_property
    def products(self) -> Float[np.ndarray, "rows rows"]:
        return self.states @ self.states.T

    @cached_property
    def halves(self) -> tuple[Half, Half]:
        return Half.of(self, 0), Half.of(self, 1)


@dataclass(frozen=True)
class Half:
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

    segments: Segments
    rows: Int[np.ndarray, " half"]
    states: Float[np.ndarray, "half hidden"]
    means: Float[np.ndarray, "languages hidden"]
    basis: Float[np.ndarray, "hidden rank"]
    directions: Float[np.ndarray, "draws languages rank"]

    @classmethod
    def of(cls, model: States, half: int) -> Half:
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

    def products_with(self, other: Half) -> Float[np.ndarray, "draws languages languages"]:
        """Return the inner products of both halves' centred means: of all segments, then without each unit of this."""
        language = self.segments.language[self.rows]
        share = 1 / (np.bincount(language) - 1)[language]
        products = self.means @ other.means.T
        moves = share[:, None] * (products[language] - self.states @ other.means.T)
        own = _numbered(self.segments.unit[self.rows])
        without = np.repeat(products[None], own.max() + 1, axis=0)
        np.add.at(without, (own, language), moves)
        return _centred(np.concatenate([products[None], without]))

    def cosines(self, other: Half) -> Float[np.ndarray, "draws rank rank"]:
        """Return the inner products of the two bases: of all segments, then without each unit of this half."""
        return self.directions.swapaxes(-1, -2) @ self.products_with(other) @ other.directions[0]


def _numbered(values: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    return np.unique(values, return_inverse=True)[1]


def _centred(products: Float[np.ndarray, "draws means means"]) -> Float[np.ndarray, "draws means means"]:
    rows = products - products.mean(axis=-2, keepdims=True)
    return rows - rows.mean(axis=-1, keepdims=True)


# -- the comparison with the dense model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """One layer of one model, compared with the dense one.

    Attributes
    ----------
    overlap
        Overlap and largest angle of its subspace with the dense one, and overlap with itself, of all segments and
        without each unit, ``[3, 1 + units]``; None with too few segments.
    between
        Variance between its languages, of all segments and without each unit, ``[1 + units]``; None likewise.
    right
        Whether each segment's language was predicted from each of :data:`PARTS`, ``[parts, rows]``; None likewise.
    cka
        For each language, of all segments, then without each; None for the dense model itself, or too few segments.
    """

    overlap: Float[np.ndarray, "3 draws"] | None
    between: Float[np.ndarray, " draws"] | None
    right: Float[np.ndarray, "parts rows"] | None
    cka: list[tuple[float, np.ndarray]] | None


def compared(dense: States, model: States) -> Found:
    """Compare one layer of a model with that of the dense one, or the dense one with itself."""
    segments = model.segments
    cka = None
    if model is not dense and segments.counts.min() >= _ENOUGH_FOR_CKA:
        cka = []
        for number in range(len(segments.counts)):
            own = np.ix_(*[np.flatnonzero(segments.language == number)] * 2)
            cka.append(debiased_cka(dense.products[own], model.products[own]))
    if not segments.enough:
        return Found(None, None, None, cka)
    overlap = np.concatenate([overlaps(dense, model), overlaps(model, model)[:1]])
    return Found(overlap, between_languages(model), predicted_right(dense, model), cka)


def overlaps(dense: States, model: States) -> Float[np.ndarray, "2 draws"]:
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


def between_languages(model: States) -> Float[np.ndarray, " draws"]:
    """Return the sum over languages of their means' squared distance from the centre, of all and without each unit.

    One half's means times the other's: noise in the means, which is independent, adds nothing on average.
    """
    found = np.zeros(1 + model.segments.units)
    for one, other in (model.halves, model.halves[::-1]):
        own = np.trace(one.products_with(other), axis1=-2, axis2=-1)
        found[0] = own[0]
        found[1 + np.unique(model.segments.unit[one.rows])] = own[1:]
    return found


def predicted_right(dense: States, model: States) -> Float[np.ndarray, "parts rows"]:
    """Return whether each segment's language is predicted from each of :data:`PARTS`: 1 or 0.

    Subspaces are of one half of the segments; in the other, the discriminant is fitted on one quarter and tested on the
    other, and both are swapped.
    """
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
