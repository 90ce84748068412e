"""Power: how many segments (or templates) and draws it takes to see an effect of a given size.

The variances of a finished study are put into simulated ones, which go through the very tests that the study's frames
are made by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import chi2

from .crossed import OWN_VARIANCE, crossed_contrasts
from .permutation import pairings_of_many

#: What is compared: two sets in one language, two categories in one set, or all languages' own sets with the others.
Comparison = Literal["sets", "category", "own"]
SIGNIFICANT = 0.05
#: Of the draws' variance, which few draws tell badly, also its upper limit at this level is tried.
UPPER = 0.8
#: Numbers that are drawn at once.
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Components:
    """Where the scores of a study vary.

    Attributes
    ----------
    sets
        Number of sets.
    draws
        Covariance between languages (or categories) of what a draw changes.
    unit, unit_by_set, residual
        Variances between units (segments or templates) in all sets alike, of what suits a set, and of the rest.
    df
        Degrees of freedom that the variance of draws is known with.
    draw_means
        Covariance of the means of draws, which contains that of the residual.
    units
        Number of units that the study has of each.
    """

    sets: int
    draws: Float[np.ndarray, "blocks blocks"]
    unit: float
    unit_by_set: float
    residual: float
    df: int
    draw_means: Float[np.ndarray, "blocks blocks"]
    units: int

    @classmethod
    def of(cls, scores: Sequence[Sequence[Float[np.ndarray, "_ _"]]]) -> Components:
        """Estimate the components from a study, by set and block (language or category), each ``[draws, units]``.

        Raises
        ------
        ValueError
            If no set was drawn twice: nothing then tells what another draw would change.
        """
        blocks = len(scores[0])
        df = sum(len(own[0]) - 1 for own in scores)
        if not df:
            raise ValueError("no set was drawn twice")
        means = [np.stack([of.mean(axis=1) for of in own], axis=1) for own in scores]  # [draws, blocks] of each set
        draw_means = sum((own - own.mean(axis=0)).T @ (own - own.mean(axis=0)) for own in means) / df
        residual, unit, by_set = [], [], []
        for k in range(blocks):
            drawn = [own[k] for own in scores]
            rest = [of - of.mean(axis=0) - of.mean(axis=1, keepdims=True) + of.mean() for of in drawn]
            freedom = sum((of.shape[0] - 1) * (of.shape[1] - 1) for of in drawn)
            residual.append(sum(float((of**2).sum()) for of in rest) / max(freedom, 1))
            of_sets = np.stack([of.mean(axis=0) for of in drawn])  # [sets, units]
            share = residual[-1] * float(np.mean([1 / len(of) for of in drawn]))
            total = float(of_sets.mean(axis=0).var(ddof=1))
            apart = of_sets - of_sets.mean(axis=0) - of_sets.mean(axis=1, keepdims=True) + of_sets.mean()
            freedom = (of_sets.shape[0] - 1) * (of_sets.shape[1] - 1)
            interaction = float((apart**2).sum()) / freedom if freedom else share
            by_set.append(max(interaction - share, 0.0))
            unit.append(max(total - interaction / len(of_sets), 0.0))
        units = min(own.shape[1] for own in scores[0])
        error = float(np.mean(residual))
        found = cls(len(scores), draw_means, float(np.mean(unit)), float(np.mean(by_set)), error, df, draw_means, units)
        return replace(found, draws=found._of_draws(1.0))

    def at_upper_limit(self) -> Components:
        """Return the same with draws that vary as much as the upper limit of their variance says."""
        return replace(self, draws=self._of_draws(float(self.df / chi2.ppf(1 - UPPER, self.df))))

    def _of_draws(self, factor: float) -> np.ndarray:
        """Return the covariance that is left of the draw means' without the residual, and is one."""
        less = factor * self.draw_means - np.eye(len(self.draw_means)) * self.residual / self.units
        values, vectors = np.linalg.eigh(less)
        return (vectors * np.maximum(values, 0)) @ vectors.T


def power(
    components: Components,
    comparison: Comparison,
    effect: float,
    *,
    draws: int,
    units: int,
    runs: int = 1000,
    seed: int = 0,
) -> float:
    """Return how often a test at 5 % finds an effect, among simulated studies.

    Parameters
    ----------
    components
        Of a finished study: by set and language; for ``category`` by set and the two categories. The units of languages
        are taken to be independent. Where they are translations, what suits a set at a unit in all languages alike
        cancels in ``own``, so that its power is greater than this; the other comparisons are of one language.
    comparison
        ``sets``: one set is worse than another in one language. ``category``: one category loses more, in one set.
        ``own``: every language's own set suits it, by the permutation test over all languages.
    effect
        Size of the difference, in the metric's unit.
    draws, units
        Of each set, and of each language (or category).
    runs, seed
        Number of simulated studies.
    """
    rng = np.random.default_rng(seed)
    if comparison == "own":
        return float(np.mean(pairings_of_many(_means(components, draws, units, runs, rng, effect)) < SIGNIFICANT))
    compared, blocks = (1, 2) if comparison == "category" else (2, 1)
    # the other sets only count where the variance of draws is pooled over all
    sets = compared if draws >= OWN_VARIANCE else max(components.sets, compared)
    components = replace(components, sets=sets)
    first = np.eye(sets)[0]
    set_weights = first - np.eye(sets)[1] if comparison == "sets" else first
    block_weights = np.array([1.0]) if comparison == "sets" else np.array([1.0, -1.0])
    at_once = max(1, _AT_ONCE // (sets * blocks * draws * units))
    found: list[np.ndarray] = []
    for start in range(0, runs, at_once):
        number = min(at_once, runs - start)
        scores = simulate(components, draws, units, number, rng, blocks=blocks)
        scores[0][0] = scores[0][0] + effect
        found.append(crossed_contrasts(scores, set_weights, block_weights).p_value < SIGNIFICANT)
    return float(np.mean(np.concatenate(found)))


def simulate(
    components: Components, draws: int, units: int, runs: int, rng: np.random.Generator, *, blocks: int
) -> list[list[Float[np.ndarray, "runs draws units"]]]:
    """Draw studies without any effect, by set and block.

    Parameters
    ----------
    components, draws, units, runs, rng
        As for :func:`power`.
    blocks
        The first so many languages or categories.
    """
    covariance = components.draws[:blocks, :blocks]
    everywhere = [np.sqrt(components.unit) * rng.standard_normal((runs, 1, units)) for _ in range(blocks)]
    scores = []
    for _ in range(components.sets):
        drawn = _normal(covariance, (runs, draws), rng)
        scores.append(
            [
                everywhere[k]
                + np.sqrt(components.unit_by_set) * rng.standard_normal((runs, 1, units))
                + drawn[..., k, None]
                + np.sqrt(components.residual) * rng.standard_normal((runs, draws, units))
                for k in range(blocks)
            ]
        )
    return scores


def _means(
    components: Components, draws: int, units: int, runs: int, rng: np.random.Generator, effect: float
) -> Float[np.ndarray, "runs sets languages"]:
    """Draw the mean of every set in every language, own languages better by an effect."""
    number = len(components.draws)
    own = components.unit_by_set / units + components.residual / (draws * units)
    covariance = components.draws / draws + np.eye(number) * own
    return _normal(covariance, (runs, number), rng) + effect * np.eye(number)


def _normal(covariance: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return rng.standard_normal((*shape, len(covariance))) @ root.T
