"""95 % intervals of shares, of their differences, and of anything that is computed from independent units.

Units are what was sampled independently: the templates that items were made after, or segments of text. A percentile
bootstrap of a share collapses where nearly all answers are alike, and covers too little where units are few; these
intervals do neither (see ``docs/statistics.md`` for their simulated coverage).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.stats import DegenerateDataWarning, bootstrap, norm, t

#: Units from which the bootstrap is used; with fewer, the jackknife with t quantiles.
FEWEST_UNITS = 20
RESAMPLES = 2000

_Values = Float[np.ndarray, " values"]


def share_interval(
    right: Float[np.ndarray, " units"], asked: Float[np.ndarray, " units"], level: float = 0.95
) -> tuple[float, float, float]:
    """Estimate a share of items, with Wilson's interval at the effective number of items.

    Items of one unit are alike, so they count for fewer: ``n / (1 + (m − 1)ρ)``, where m is the mean size of a unit as
    an item sees it (Σm² / Σm) and ρ the intraclass correlation (Kish 1965), and t quantiles account for how few units
    there are (Korn & Graubard 1998). Where hardly any answer differs from the others ρ cannot be known, so one item's
    worth of perfect likeness is added to its estimate: if all are right, units count, and items do not.

    Parameters
    ----------
    right, asked
        Items that are right, and all items, of every unit. With one item a unit this is Wilson's interval itself.
    level
        How often the interval should hold the true share.

    Returns
    -------
    value, low, high
    """
    number, share = float(asked.sum()), float(right.sum() / asked.sum())
    rare = min(right.sum(), number - right.sum())
    effective, quantile = _effective(right - share * asked, asked, share * (1 - share), rare, level)
    if np.isnan(effective):
        return share, float("nan"), float("nan")
    added = quantile**2 / effective
    centre = (share + added / 2) / (1 + added)
    margin = np.sqrt(added * share * (1 - share) + added**2 / 4) / (1 + added)
    return share, min(share, float(centre - margin)), max(share, float(centre + margin))


def share_difference_interval(
    gained: Float[np.ndarray, " units"], lost: Float[np.ndarray, " units"], asked: Float[np.ndarray, " units"]
) -> tuple[float, float, float]:
    """Estimate how a share changes between two models that were asked the same items.

    Agresti & Min (2005): half an item is added to each of the four outcomes, so the interval has a width even if no
    answer changed. Items are counted as in :func:`share_interval`.

    Parameters
    ----------
    gained, lost, asked
        Items of every unit that became right, those that became wrong, and all.

    Returns
    -------
    value, low, high
    """
    number = float(asked.sum())
    up, down = float(gained.sum() / number), float(lost.sum() / number)
    change = up - down
    effective, quantile = _effective(
        gained - lost - change * asked, asked, up + down - change**2, gained.sum() + lost.sum()
    )
    if np.isnan(effective):
        return change, float("nan"), float("nan")
    total = effective + 2
    centre = effective * change / total
    margin = quantile * np.sqrt(((effective * (up + down) + 1) / total - centre**2) / total)
    return change, max(-1.0, min(change, float(centre - margin))), min(1.0, max(change, float(centre + margin)))


def unit_interval(
    statistic: Callable[[Float[np.ndarray, "*resamples units"]], Float[np.ndarray, "*resamples values"]],
    units: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[_Values, _Values, _Values]:
    """Estimate several values from sums over units, with intervals that hold for shares and ratios too.

    Efron's (1987) BCa bootstrap by scipy, at the level that makes up for the few units it draws from, as t quantiles do
    for a mean (Hesterberg 2015, section 3.3); with fewer than :data:`FEWEST_UNITS` units the jackknife's standard error
    and t quantiles.

    Parameters
    ----------
    statistic
        Turns weights of the units (how often each was drawn; all ones for the estimate itself) into values, as in
        :func:`analysis.stats.bootstrap.segment_interval`. It must not depend on the sum of the weights.
    units
        Number of units.
    resamples, seed
        Of the bootstrap. All values see the same draws, and so do all calls with one seed: comparisons are paired.

    Returns
    -------
    value, low, high
        The interval is empty (nan) for a single unit, and where leaving out any unit changes nothing: a sample in which
        nothing varies does not tell how much could.
    """
    value = np.asarray(statistic(np.ones((1, units)))[0], dtype=np.float64)
    empty = np.full_like(value, np.nan)
    if units < 2:
        return value, empty, empty.copy()
    without = np.asarray(statistic(1 - np.eye(units)), dtype=np.float64)  # [units, values]
    spread = without - without.mean(axis=0)
    varies = np.abs(spread).max(axis=0) > 1e-12 * np.maximum(np.abs(value), 1e-12)
    if units < FEWEST_UNITS:
        error = np.sqrt((units - 1) / units * (spread**2).sum(axis=0))
        margin = np.where(varies, t.ppf(0.975, units - 1) * error, np.nan)
        return value, value - margin, value + margin

    def of_draws(index: np.ndarray, axis: int = -1) -> np.ndarray:
        draws = np.atleast_2d(index)
        flat = (np.arange(len(draws))[:, None] * units + draws).ravel()
        weights = np.bincount(flat, minlength=len(draws) * units).reshape(-1, units)
        values = np.moveaxis(np.asarray(statistic(weights.astype(np.float64))), -1, 0)
        return values if index.ndim > 1 else values[:, 0]

    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        interval = bootstrap(
            (np.arange(units),),
            of_draws,
            n_resamples=resamples,
            confidence_level=1 - 2 * norm.cdf(-t.ppf(0.975, units - 1) * np.sqrt(units / (units - 1))),
            method="BCa",
            rng=np.random.default_rng(seed),
            vectorized=True,
            axis=-1,
        ).confidence_interval
    return value, np.where(varies, interval.low, np.nan), np.where(varies, interval.high, np.nan)


def _effective(
    rest: np.ndarray, asked: np.ndarray, variance: float, rare: float, level: float = 0.95
) -> tuple[float, float]:
    """Return the effective number of items, nan if it is unknown, and the quantile to use with it.

    Parameters
    ----------
    rest
        Sum over the items of every unit of their deviation from the mean.
    asked
        Items of every unit.
    variance
        Of one item.
    rare
        Number of items whose value is not the usual one: what an intraclass correlation is known from.
    level
        Of the interval.
    """
    tail = (1 + level) / 2
    units, number = np.count_nonzero(asked), float(asked.sum())
    size = float((asked**2).sum() / number)
    if size <= 1:
        return number, float(norm.ppf(tail))
    if units < 2:
        return float("nan"), float("nan")
    effect = units / (units - 1) * float((rest**2).sum()) / (number * variance) if variance > 0 else size
    correlation = (rare * (effect - 1) / (size - 1) + 1) / (rare + 1)
    return number / max(1 + (size - 1) * min(correlation, 1), 1 / size), float(t.ppf(tail, units - 1))
