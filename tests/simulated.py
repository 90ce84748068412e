"""Simulated studies in which it is known what is true, and how often tests and intervals say so.

A score is what its segment costs in any model, what suits the set there, what the draw adds, and the rest; sets may
differ in what they do to all languages alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.metrics.mask_overlap import within_and_between
from analysis.stats.crossed import crossed_contrasts
from analysis.stats.intervals import share_difference_interval, share_interval, unit_interval
from analysis.stats.permutation import interactions, pairings_of_many


@dataclass(frozen=True)
class Design:
    """A kind of study.

    Attributes
    ----------
    sets, draws, segments
        How many; there is a language to each set.
    quality
        Standard deviation between sets in all languages, that of draws being 0.1.
    common
        Whether a draw adds the same in all languages.
    uneven
        Whether the first set's draws vary five times as much as the others'.
    """

    sets: int
    draws: int
    segments: int
    quality: float = 0.0
    common: bool = False
    uneven: bool = False

    def __str__(self) -> str:
        words = [f"{self.draws} draws, {self.sets} sets, {self.segments} segments"]
        words += [f"quality {10 * self.quality:g} × draws"] if self.quality else []
        words += ["draws common to languages"] if self.common else []
        words += ["one set varies 5 ×"] if self.uneven else []
        return ", ".join(words)


def studies(design: Design, runs: int, rng: np.random.Generator):
    """Return scores ``[runs, draws, segments]`` by set and language, and ``[runs, sets]`` qualities."""
    blocks = design.sets
    shape = runs, design.draws, design.segments
    hard = [rng.standard_normal((runs, 1, design.segments)) for _ in range(blocks)]
    quality = design.quality * rng.standard_normal((runs, design.sets))
    scores = []
    for i in range(design.sets):
        spread = 0.5 if design.uneven and i == 0 else 0.1
        same = rng.standard_normal((runs, design.draws, 1))
        own = []
        for k in range(blocks):
            drawn = same if design.common else rng.standard_normal((runs, design.draws, 1))
            suits = 0.3 * rng.standard_normal((runs, 1, design.segments))
            rest = 0.3 * rng.standard_normal(shape)
            own.append(hard[k] + quality[:, i, None, None] + suits + spread * drawn + rest)
        scores.append(own)
    return scores, quality


def rates(design: Design, runs: int, seed: int = 0, at_once: int = 50) -> dict[str, float]:
    """Return how often each interval holds the truth, and how often each test finds what is not there."""
    rng = np.random.default_rng(seed)
    seen: dict[str, list[np.ndarray]] = {}
    one, two = np.eye(design.sets)[0], np.eye(design.sets)[1]
    alone = np.eye(design.sets)
    against = alone - (1 - alone) / (design.sets - 1)
    for _ in range(runs // at_once):
        scores, quality = studies(design, at_once, rng)
        first = [own[:1] for own in scores]
        pair = crossed_contrasts(first, one - two, np.ones(1))
        truth = quality[:, 0] - quality[:, 1]
        seen.setdefault("two sets: interval", []).append((pair.low <= truth) & (truth <= pair.high))
        if not design.quality:
            seen.setdefault("two sets: test", []).append(pair.p_value < 0.05)
        own = crossed_contrasts(scores, against[0], against[0])
        seen.setdefault("own set, one language: interval", []).append((own.low <= 0) & (own.high >= 0))
        together = crossed_contrasts(scores, np.full(design.sets, 1 / design.sets), against)
        seen.setdefault("own sets, all languages: interval", []).append((together.low <= 0) & (together.high >= 0))
        means = np.stack([np.stack([of.mean(axis=(1, 2)) for of in by], axis=1) for by in scores], axis=1)
        seen.setdefault("own set, one language: test", []).append(np.array([interactions(m)[0] < 0.05 for m in means]))
        seen.setdefault("own sets, all languages: test", []).append(pairings_of_many(means) < 0.05)
        if design.sets > 3:  # the first two languages' scores as those of two categories
            halves = [own[:2] for own in scores]
            signs = np.array([1.0, -1.0])
            category = crossed_contrasts(halves, one, signs)
            seen.setdefault("two categories, one set: interval", []).append((category.low <= 0) & (category.high >= 0))
            both = crossed_contrasts(halves, one - two, signs)
            seen.setdefault("two categories by two sets: interval", []).append((both.low <= 0) & (both.high >= 0))
    return {name: float(np.mean(np.concatenate(found))) for name, found in seen.items()}


def accuracy_rates(draws: int, templates: int, pairs: int, runs: int, seed: int = 0, sets: int = 4) -> dict[str, float]:
    """Return how often the interval of two sets' difference in accuracy holds 0, pairs being right or wrong."""
    rng = np.random.default_rng(seed)
    ease = 0.8 + rng.standard_normal((runs, 1, templates, 1))
    scores = []
    for _ in range(sets):
        suits = 0.4 * rng.standard_normal((runs, 1, templates, 1))
        drawn = 0.1 * rng.standard_normal((runs, draws, 1, 1))
        item = rng.standard_normal((runs, draws, templates, pairs))
        scores.append([(ease + suits + drawn + item > 0).mean(axis=-1)])
    found = crossed_contrasts(scores, np.array([1.0, -1.0, *np.zeros(sets - 2)]), np.ones(1))
    return {
        "interval": float(np.mean((found.low <= 0) & (found.high >= 0))),
        "test": float(np.mean(found.p_value < 0.05)),
    }


def share_rate(share: float, units: int, size: int, alike: float, runs: int, seed: int = 0) -> float:
    """Return how often the interval of a share holds it; `alike` is the intraclass correlation within a template."""
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(runs):
        chances = np.full(units, share)
        if alike and 0 < share < 1:
            chances = rng.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), units)
        _, low, high = share_interval(rng.binomial(size, chances).astype(float), np.full(units, float(size)))
        held.append(low <= share <= high)
    return float(np.mean(held))


def change_rate(up: float, down: float, units: int, size: int, alike: float, runs: int, seed: int = 0) -> float:
    """Return how often the interval of a change holds it, of items that become right and wrong with given chances."""
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(runs):
        chances = np.tile([up, down, 1 - up - down], (units, 1))
        if alike:
            chances = rng.dirichlet(np.array([up, down, 1 - up - down]) * (1 / alike - 1), units)
        outcomes = rng.multinomial(size, chances).astype(float)
        _, low, high = share_difference_interval(outcomes[:, 0], outcomes[:, 1], np.full(units, float(size)))
        held.append(low <= up - down <= high)
    return float(np.mean(held))


def recovery_rate(units: int, shape: float, runs: int, seed: int = 0) -> float:
    """Return how often the interval of a recovered share holds it; a drop's coefficient of variation is 1/√shape."""
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(runs):
        lost = rng.gamma(shape, 1, units)
        data = np.stack([lost * rng.beta(2, 6, units), lost], axis=1)

        def share(weights: np.ndarray, data: np.ndarray = data) -> np.ndarray:
            sums = weights @ data
            return sums[..., :1] / sums[..., 1:]

        _, low, high = unit_interval(share, units, resamples=1000)
        held.append(low[0] <= 0.25 <= high[0])
    return float(np.mean(held))


def overlap_rates(sets: int, draws: int, runs: int, seed: int = 0, uneven: bool = False) -> dict[str, float]:
    """Return how often intervals of overlaps within and between sets hold what draws without end would come to.

    An overlap is that of the two sets, plus what each draw adds to all its pairs (standard deviation 0.1; 0.5 for the
    first set's if `uneven`) and to those with one set (0.05), plus what only this pair has (0.05).
    """
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(sets), draws)
    upper = np.triu_indices(sets, 1)
    held: dict[str, list[bool]] = {}
    for _ in range(runs):
        alike = 0.3 * rng.standard_normal((sets, sets))
        alike = (alike + alike.T) / 2
        spread = np.where(uneven & (of == 0), 0.5, 0.1)
        general = spread * rng.standard_normal(len(of))
        special = 0.05 * rng.standard_normal((len(of), sets))
        rest = np.triu(0.05 * rng.standard_normal((len(of), len(of))), 1)
        pairs = alike[of][:, of] + general[:, None] + general + special[:, of] + special[:, of].T + rest + rest.T
        within, between = np.diag(alike).mean(), alike[upper].mean()
        truth = {"same": within, "different": between, "difference": within - between}
        for name, (_, low, high) in within_and_between(pairs, [str(k) for k in of])._asdict().items():
            if np.isfinite(low):
                held.setdefault(name, []).append(low <= truth[name] <= high)
    return {name: float(np.mean(found)) for name, found in held.items()}
