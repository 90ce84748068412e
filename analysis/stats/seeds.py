"""What another draw of the same calibration text changes: the margin that a difference between texts has to exceed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.stats import norm


def spread_between_draws(groups: Iterable[Sequence[Float[np.ndarray, " segments"]]]) -> float:
    """Return the root mean square of the mean differences between two draws of one set.

    Parameters
    ----------
    groups
        The scores of every draw of one set in one language; a set that was drawn once says nothing.

    Returns
    -------
    float
        In the unit of the scores; nan if no set was drawn twice.
    """
    found = [float((one - other).mean()) for draws in groups for one, other in combinations(draws, 2)]
    return float(np.sqrt(np.mean(np.square(found)))) if found else float("nan")


def seed_margin(spread: float, draws: int) -> float:
    """Return what 95 % of the differences between two draws stay below, if `draws` of each set are averaged."""
    return float(norm.ppf(0.975) * spread / np.sqrt(draws))
