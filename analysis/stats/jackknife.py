"""Intervals of smooth statistics that duplicated segments would bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import t

_Values = Float[np.ndarray, "..."]


def jackknife_interval(value: _Values, without: Float[np.ndarray, "units ..."]) -> tuple[_Values, _Values, _Values]:
    """Return an estimate with its 95 % interval, from the estimates without each unit in turn.

    A bootstrap draws segments twice, which makes means noisier, and so the subspaces of two halves less alike, and
    breaks the estimators that leave out each segment's product with itself. Leaving segments out does neither.
    """
    n = len(without)
    error = np.sqrt((n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    margin = t.ppf(0.975, n - 1) * error
    return value, np.asarray(value - margin), np.asarray(value + margin)


def nested_jackknife_interval(value: float, without: Sequence[Float[np.ndarray, " _"]]) -> tuple[float, float, float]:
    """Return an estimate with its 95 % interval over units that are nested in groups, from it without each unit.

    The variance is the sum of the groups' jackknife variances, as in stratified samples (Wolter 2007, chapter 4), and t
    quantiles have Satterthwaite's degrees of freedom. Groups themselves are taken as given.

    Parameters
    ----------
    value
        The estimate.
    without
        For each group, the estimate without each of its units.

    Returns
    -------
    value, low, high
        The interval is empty (nan) if some group has a single unit, or an estimate could not be made without some unit.
    """
    empty = value, float("nan"), float("nan")
    if not without or any(len(own) < 2 for own in without) or not all(np.isfinite(own).all() for own in without):
        return empty
    variances = np.array([(len(own) - 1) / len(own) * ((own - own.mean()) ** 2).sum() for own in without])
    spread = float((variances**2 / [len(own) - 1 for own in without]).sum())
    if not spread:
        return empty
    margin = float(t.ppf(0.975, variances.sum() ** 2 / spread) * np.sqrt(variances.sum()))
    return value, value - margin, value + margin
