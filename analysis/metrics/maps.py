"""How alike the maps of several diagnoses are: where a variant is damaged in which languages.

A map is what gradients estimate that restoring each component recovers. Two languages are compared by the rank
correlation of one's map on the first half of its questions with the other's on the second, and the other way round.
Of one language with itself that is the ceiling which the number of questions sets: two maps cannot be told apart by
more than each can from itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from probes.patching import RESTORE

from .halves import HALVES

#: Kinds of components that are compared.
KINDS = ("weights", "output", "head")
_FEWEST = 4


def likeness(frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return Spearman's ρ between the maps of languages, for every kind of component that they have.

    Parameters
    ----------
    frames
        Language to the frame ``recovery`` of one diagnosis in it; all of one variant and category.

    Returns
    -------
    dict
        Kind to a symmetric table, languages × languages, with the ceiling of each language on the diagonal.
    """
    found = {}
    for kind in KINDS:
        maps = {language: _maps(frame, kind) for language, frame in frames.items()}
        places = sorted(set.intersection(*(set(own.index) for own in maps.values())))
        if len(places) < _FEWEST:
            continue
        first, second = (
            np.stack([own.loc[places, half].to_numpy(np.float64) for own in maps.values()]) for half in HALVES
        )
        across = _rank_correlations(first, second)
        found[kind] = pd.DataFrame((across + across.T) / 2, index=list(maps), columns=list(maps))
    return found


def shared(frames: Mapping[str, pd.DataFrame], kind: str = "weights") -> pd.DataFrame:
    """Return the mean map over languages, and in how many languages each component recovers something in both halves.

    Parameters
    ----------
    frames
        As for :func:`likeness`.
    kind
        Of the components.

    Returns
    -------
    DataFrame
        By block and role: ``value`` (mean share of the language's largest effect) and ``languages``; the highest first.
    """
    each = {}
    for language, frame in frames.items():
        own = _maps(frame, kind)
        each[language] = own.div(own.abs().max(axis=0).replace(0, np.nan), axis=1)
    stacked = pd.concat(each)
    both = stacked[list(HALVES)]
    table = pd.DataFrame({"value": both.mean(axis=1), "languages": (both > 0).all(axis=1).astype(int)})
    table = table.groupby(level=[1, 2]).agg({"value": "mean", "languages": "sum"})
    return table.sort_values("value", ascending=False, kind="stable")


def summary(table: pd.DataFrame) -> tuple[float, float, float, float]:
    """Return the mean, lowest and highest ρ between two languages, and the mean of languages with themselves."""
    values = table.to_numpy()
    between = values[np.triu_indices(len(values), 1)]
    return float(between.mean()), float(between.min()), float(between.max()), float(np.diag(values).mean())


def _maps(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return what each component is estimated to restore, by block and role, a column a half."""
    rows = frame[(frame["direction"] == RESTORE) & (frame["metric"] == "attributed_restored")]
    rows = rows[rows["component"] == kind].astype({"role": object, "estimated_on": object})
    rows = rows[rows["estimated_on"].isin(HALVES)]
    table = rows.pivot_table(index=["layer", "role"], columns="estimated_on", values="value")
    return table.reindex(columns=list(HALVES))


def _rank_correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return ρ of every row of one with every row of the other."""
    joint = np.atleast_2d(spearmanr(np.concatenate([one, other]), axis=1).statistic)
    if joint.shape == (1, 1):
        joint = np.array([[1.0, joint[0, 0]], [joint[0, 0], 1.0]])
    return joint[: len(one), len(one) :]
