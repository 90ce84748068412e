"""One effect in several studies: random-effects meta-analysis."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import chi2, t


class Pooled(NamedTuple):
    """The mean effect over the population that the studies are a sample of.

    Attributes
    ----------
    value, low, high
        With its 95 % interval.
    p_value
        Two-sided, that the mean is 0.
    tau
        Standard deviation of the studies' true effects, in the unit of the effect.
    i_squared
        Share of the variance between estimates that is not error (Higgins & Thompson).
    p_alike
        Of Cochran's Q: that all studies have one true effect.
    """

    value: float
    low: float
    high: float
    p_value: float
    tau: float
    i_squared: float
    p_alike: float


def pooled(values: Float[np.ndarray, " studies"], errors: Float[np.ndarray, " studies"]) -> Pooled:
    """Pool an effect of two studies or more.

    The variance between studies is that for which the weighted squares are as large as expected (Paule & Mandel,
    J. Res. NBS 1982). The interval has k − 1 degrees of freedom and the variance of Hartung and Knapp (Stat. Med.
    2001), which is never taken to be below the usual one (Röver, Knapp & Friede, BMC Med. Res. Methodol. 2015). With
    two studies it is wide, since two say little of a population of studies.

    Parameters
    ----------
    values, errors
        Estimates and their standard errors, above 0.

    Raises
    ------
    ValueError
        If there are fewer than two studies, or an error is not above 0.
    """
    if len(values) < 2 or not (errors > 0).all():
        raise ValueError("pooling needs two studies or more, with errors above 0")
    df = len(values) - 1

    def squares(between: float) -> float:
        weights = 1 / (errors**2 + between)
        mean = (weights * values).sum() / weights.sum()
        return float((weights * (values - mean) ** 2).sum())

    alike = squares(0.0)
    between = 0.0
    if alike > df:
        most = float(np.ptp(values) ** 2) or 1.0
        while squares(most) > df:
            most *= 2
        between = float(brentq(lambda at: squares(at) - df, 0.0, most))
    weights = 1 / (errors**2 + between)
    mean = float((weights * values).sum() / weights.sum())
    error = float(np.sqrt(max(squares(between) / df, 1.0) / weights.sum()))
    margin = float(t.ppf(0.975, df)) * error
    return Pooled(
        mean,
        mean - margin,
        mean + margin,
        float(2 * t.sf(abs(mean) / error, df)),
        float(np.sqrt(between)),
        max(0.0, (alike - df) / alike) if alike > 0 else 0.0,
        float(chi2.sf(alike, df)),
    )
