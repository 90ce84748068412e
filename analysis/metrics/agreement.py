"""How well attribution agrees with exact patching, within one kind of component at a time.

Over all kinds together the agreement looks better than it is: that the whole stream recovers more than a random
subspace is known beforehand. Nor do the components that attribution ranks highest tell: they lack those that it has
missed. Only a random sample does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr

from probes.patching import RESTORE

from .halves import EVERY
from .recovery_frame import RANDOM_SAMPLE, main_metric

#: Which components of a kind are compared.
CHOSEN, RANDOM, WHOLE = "chosen by attribution", "drawn at random", "of all blocks"
_CURVES = ("residual", "specific", "agnostic")
#: At fewer a rank correlation says nothing.
_FEWEST = 4


class Agreement(NamedTuple):
    """Agreement over some components of one kind.

    Attributes
    ----------
    kind, over, n
        Kind, which of its components, and how many.
    rho, low, high
        Spearman's ρ with its 95 % interval (Bonett & Wright 2000).
    shared, top
        Of the `top` that attribution ranks highest, how many are among the `top` of exact patching.
    """

    kind: str
    over: str
    n: int
    rho: float
    low: float
    high: float
    shared: int
    top: int


def agreement(frame: pd.DataFrame) -> list[Agreement]:
    """Compare what attribution and exact patching say of the same components, on the same questions, kind by kind.

    Parameters
    ----------
    frame
        The frame ``recovery`` of one diagnosis.
    """
    restored = frame[(frame["direction"] == RESTORE) & (frame["estimated_on"].astype(str) == EVERY)]
    found = []
    for kind in ("weights", "output", "head", *_CURVES):
        rows = restored[restored["component"] == kind].copy()
        rows["role"] = rows["role"].astype(object).where(rows["role"].notna(), "")
        both = rows.pivot_table(index=["layer", "role"], columns="metric", values="value", observed=True)
        both = both.reindex(columns=[main_metric(frame, "restored"), "attributed_restored"]).dropna()
        if kind in _CURVES:
            found += _compared(kind, WHOLE, both)
            continue
        sample = rows[rows["sample"] == RANDOM_SAMPLE].set_index(["layer", "role"]).index
        whole = frame[(frame["component"] == kind) & frame["position"].notna()].copy()
        chosen = whole.astype({"role": object}).set_index(["layer", "role"]).index
        found += _compared(kind, RANDOM, both[both.index.isin(sample)])
        found += _compared(kind, CHOSEN, both[both.index.isin(chosen)])
    return found


def _compared(kind: str, over: str, both: pd.DataFrame) -> list[Agreement]:
    n = len(both)
    exact, estimate = both.iloc[:, 0], both.iloc[:, 1]
    if n < _FEWEST or exact.nunique() < 2 or estimate.nunique() < 2:
        return []
    rho = float(spearmanr(exact, estimate).statistic)
    # of ranks that agree wholly the interval would have no width: it is that of one pair of neighbours exchanged
    nearest = 1 - 12 / (n * (n**2 - 1))
    inner = float(np.clip(rho, -nearest, nearest))
    margin = norm.ppf(0.975) * np.sqrt((1 + inner**2 / 2) / (n - 3))
    low, high = (float(np.tanh(np.arctanh(inner) + sign * margin)) for sign in (-1, 1))
    low, high = min(low, rho), max(high, rho)
    top = min(10, n // 2)
    shared = len(set(exact.nlargest(top).index) & set(estimate.nlargest(top).index))
    return [Agreement(kind, over, n, rho, low, high, shared, top)]
