"""Intervals of smooth statistics that duplicated segments would bias."""

from __future__ import annotations

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
