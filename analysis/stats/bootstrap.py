"""95 % intervals over segments, by scipy's percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

RESAMPLES = 1000


def segment_interval(
    statistic: Callable[[Float[np.ndarray, "*resamples segments"]], Float[np.ndarray, "*resamples values"]],
    segments: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " values"], Float[np.ndarray, " values"], Float[np.ndarray, " values"]]:
    """Estimate several values from sums over segments, with their intervals.

    Parameters
    ----------
    statistic
        Turns weights of the segments (how often each was drawn; all ones for the estimate itself) into values. It is
        called with many draws at once; sums over segments are then matrix products.
    segments
        Number of segments.
    resamples, seed
        Of the bootstrap. All values see the same draws, and so do all calls with one seed: comparisons are paired.

    Returns
    -------
    value, low, high
        The interval is that of the percentile bootstrap, and empty (nan) for a single segment.
    """
    value = statistic(np.ones((1, segments)))[0]
    if segments < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)

    def of_draws(index: np.ndarray, axis: int = -1) -> np.ndarray:
        draws = np.atleast_2d(index)
        flat = (np.arange(len(draws))[:, None] * segments + draws).ravel()
        weights = np.bincount(flat, minlength=draws.shape[0] * segments).reshape(-1, segments)
        values = np.moveaxis(statistic(weights.astype(np.float64)), -1, 0)
        return values if index.ndim > 1 else values[:, 0]

    with np.errstate(invalid="ignore"):
        interval = bootstrap(
            (np.arange(segments),),
            of_draws,
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
            vectorized=True,
            axis=-1,
        ).confidence_interval
    return value, np.asarray(interval.low), np.asarray(interval.high)


def mean_interval(
    values: Float[np.ndarray, "segments values"],
) -> tuple[Float[np.ndarray, " values"], Float[np.ndarray, " values"], Float[np.ndarray, " values"]]:
    """Estimate means over segments, with their intervals: :func:`segment_interval` of the plain mean."""
    return segment_interval(lambda weights: weights @ values / weights.sum(axis=-1)[..., None], len(values))
