"""The drop of a pruned model in every metric, and what patching restores of it, with intervals over templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from probes.patching import RESTORE, Direction
from probes.scoring import ChoiceScores, Question

from ..stats import share_difference_interval, unit_interval
from .halves import BOTH, EVERY, HALVES, halves

#: What is measured of a question, higher is better, and how its drop is called.
LOST = {"margin": "margin_lost", "accuracy": "accuracy_lost", "loss": "loss_added"}

Beyond = Sequence[ChoiceScores | None] | None


class Estimate(NamedTuple):
    """Values with 95 % intervals, each ``[components, metrics]``; empty (nan) intervals where none can be given."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Drop:
    """The drop in every metric, and what is restored of it.

    Templates are resampled: questions made after one pattern are not independent.

    Parameters
    ----------
    questions
        What was scored.
    templates, strata
        Of each question, as for :func:`analysis.metrics.halves.halves`.
    dense, pruned
        Scores of the two models.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        templates: Sequence[str],
        strata: Sequence[str],
        dense: ChoiceScores,
        pruned: ChoiceScores,
    ) -> None:
        is_text = all(question.choices == 1 for question in questions)
        self.metrics = ("loss",) if is_text else ("margin", "accuracy", "loss")
        half = halves(templates, strata)
        self._there = {EVERY: np.ones(len(half), dtype=bool), **{name: half == i for i, name in enumerate(HALVES)}}
        self._templates = np.asarray(templates)
        self._paired = np.array([question.differing is not None for question in questions])
        self.dense, self.pruned = self._values(dense), self._values(pruned)
        self._lost = {on: self._means((self.dense - self.pruned)[None], on) for on in self._there}

    @cached_property
    def pairs(self) -> Drop:
        """The same on the questions that are one of a minimal pair alone."""
        if self._paired.all():
            return self
        found = copy(self)
        found._there = {on: there & self._paired for on, there in self._there.items()}
        found._lost = {on: found._means((self.dense - self.pruned)[None], on) for on in self._there}
        return found

    def n(self, on: str) -> int:
        """Number of questions that an estimate rests on."""
        return int(self._there[EVERY if on == BOTH else on].sum())

    def lost(self, on: str = EVERY) -> Estimate:
        """Return the mean drop in every metric, ``[1, metrics]``."""
        return self._lost[on]

    def significant(self, on: str = EVERY) -> Bool[np.ndarray, " metrics"]:
        """Return which metrics have dropped: those whose interval lies above 0; for both halves, in each of them."""
        if on == BOTH:
            return self.significant(HALVES[0]) & self.significant(HALVES[1])
        low = self._lost[on].low[0]
        return (self._lost[on].value[0] > 0) & (low > 0)

    def restored(
        self, scores: Sequence[ChoiceScores], direction: Direction, on: str = EVERY, *, beyond: Beyond = None
    ) -> Estimate:
        """Return the mean change that each patch makes: what it restores or, in the other direction, takes away.

        Parameters
        ----------
        scores
            With each component patched.
        direction, on
            In which model, and on which questions.
        beyond
            For each component, scores with another one patched, whose change is subtracted; None subtracts nothing.
        """
        if on == BOTH:
            return _averaged([self.restored(scores, direction, half, beyond=beyond) for half in HALVES])
        return self._means(self._changes(scores, direction, beyond), on)

    def recovered(
        self, scores: Sequence[ChoiceScores], direction: Direction, on: str = EVERY, *, beyond: Beyond = None
    ) -> Estimate:
        """Return the share of the drop that :meth:`restored` is, nan in metrics without a significant drop."""
        if on == BOTH:
            return _averaged([self.recovered(scores, direction, half, beyond=beyond) for half in HALVES])
        change = self._changes(scores, direction, beyond)
        there = self.significant(on)
        shape = (len(scores), len(self.metrics))
        result = Estimate(*(np.full(shape, np.nan) for _ in range(3)))
        if not there.any():
            return result
        unit, units = self._units(on)
        changes = _sums(change[:, self._there[on]][..., there], unit, units)  # [units, components, metrics]
        lost = _sums((self.dense - self.pruned)[self._there[on]][None][..., there], unit, units)[:, 0]
        whole = changes.sum(axis=0) / lost.sum(axis=0)

        def share(weights: np.ndarray) -> np.ndarray:
            total = (weights @ lost)[:, None]
            nothing = np.abs(total) < 1e-12  # such a draw says nothing, and counts as the estimate itself
            found = (weights @ changes.reshape(units, -1)).reshape(len(weights), *whole.shape)
            return np.where(nothing, whole, found / np.where(nothing, 1.0, total)).reshape(len(weights), -1)

        for filled, part in zip(result, unit_interval(share, units), strict=True):
            filled[:, there] = part.reshape(whole.shape)
        return result

    def beyond_sum(self, together: ChoiceScores, alone: Mapping[str, Sequence[ChoiceScores]]) -> dict[str, Estimate]:
        """Return what several patches restore together beyond the sum of what each does, in the metric ranked by.

        Parameters
        ----------
        together
            Scores of all questions with the patches of each half made together.
        alone
            Half to the scores with each of the patches made alone that the other half's questions are asked with.

        Returns
        -------
        dict
            Half, or both, to the estimate on its questions, ``[1, 1]``.
        """
        found = {}
        for half in HALVES:
            (other,) = set(HALVES) - {half}
            single = self._changes(alone[other], RESTORE, None).sum(axis=0)
            both = self._changes([together], RESTORE, None)[0]
            found[half] = self._means((both - single)[None, :, :1], half, shares=False)
        return {**found, BOTH: _averaged([found[half] for half in HALVES])}

    def total(self, effect: Float[np.ndarray, " questions"], on: str) -> float:
        """Return the sum over a half's questions, or all."""
        return float(effect[self._there[on]].sum())

    def _values(self, scores: ChoiceScores) -> np.ndarray:
        """Return every metric of every question, ``[questions, metrics]``."""
        of = {"margin": scores.margin, "accuracy": scores.correct, "loss": scores.right}
        return np.stack([of[metric] for metric in self.metrics], axis=1)

    def _changes(self, scores: Sequence[ChoiceScores], direction: Direction, beyond: Beyond) -> np.ndarray:
        """Return what each patch changes in every question, ``[components, questions, metrics]``."""

        def change(own: ChoiceScores) -> np.ndarray:
            return self._values(own) - self.pruned if direction == RESTORE else self.dense - self._values(own)

        others = beyond or [None] * len(scores)
        return np.stack(
            [
                change(own) if other is None else change(own) - change(other)
                for own, other in zip(scores, others, strict=True)
            ]
        )

    def _units(self, on: str) -> tuple[np.ndarray, int]:
        names, unit = np.unique(self._templates[self._there[on]], return_inverse=True)
        return unit, len(names)

    def _means(self, change: np.ndarray, on: str, *, shares: bool = True) -> Estimate:
        """Return means of ``[components, questions, metrics]``; accuracy's intervals are those of shares, if wanted."""
        unit, units = self._units(on)
        change = change[:, self._there[on]]
        size = np.bincount(unit, minlength=units).astype(np.float64)
        sums = _sums(change, unit, units)
        if not units:
            empty = np.full(sums.shape[1:], np.nan)
            return Estimate(empty, empty, empty)
        found = unit_interval(lambda w: (w @ sums.reshape(units, -1)) / (w @ size)[:, None], units)
        value, low, high = (np.array(part).reshape(sums.shape[1:]) for part in found)
        if shares and "accuracy" in self.metrics:
            at = self.metrics.index("accuracy")
            for own, rows in enumerate(change[..., at]):
                gained, lost = (np.bincount(unit, rows == sign, units) for sign in (1, -1))
                value[own, at], low[own, at], high[own, at] = share_difference_interval(gained, lost, size)
        return Estimate(value, low, high)


def _sums(values: np.ndarray, unit: np.ndarray, units: int) -> np.ndarray:
    """Sum ``[components, questions, metrics]`` by unit: ``[units, components, metrics]``."""
    found = np.zeros((units, values.shape[0], values.shape[2]))
    np.add.at(found, unit, values.transpose(1, 0, 2))
    return found


def _averaged(halves: Sequence[Estimate]) -> Estimate:
    """Average two independent estimates; their intervals are combined by square-and-add (Donner & Zou 2012)."""
    first, second = halves
    value = (first.value + second.value) / 2
    below = np.hypot(first.value - first.low, second.value - second.low) / 2
    above = np.hypot(first.high - first.value, second.high - second.value) / 2
    return Estimate(value, value - below, value + above)
