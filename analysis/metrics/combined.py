"""The same effect in several studies: of several models, or of one model on other text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control
from scipy.stats import t as student

from ..frames import FRAMES, RECIPE_COLUMNS
from ..stats.meta import pooled

#: Frames whose effects are combined: those that compare, with an interval over draws and what was asked.
COMBINED = ("contrasts", "task_contrasts", "recipe_contrasts")
#: Columns of these frames that do not say which effect it is.
_NOT_KEYS = frozenset({"shared_text", "at_chance"})
#: What says which effect a row is of.
KEYS = [
    "frame",
    *RECIPE_COLUMNS[1:],
    "calibration",
    *dict.fromkeys(key for name in COMBINED for key in FRAMES[name].keys if key not in _NOT_KEYS),
    "metric",
]
_ESTIMATES = ["value", "low", "high", "p_value"]
_BETWEEN = ["tau", "i_squared", "p_alike"]
#: The columns of what :func:`combine` returns.
COLUMNS = [*KEYS, "study", "studies", *_ESTIMATES, "p_adjusted", *_BETWEEN]


def combine(studies: Mapping[str, Mapping[str, pd.DataFrame]]) -> pd.DataFrame:
    """Return every effect that two studies or more have: of each of them, and of all together.

    An effect is a row of :data:`COMBINED` with an interval: the same comparison, in the same recipe, language, category
    and metric; the model may be another. Effects are pooled by random effects (:func:`analysis.stats.meta.pooled`),
    from estimates and the standard errors that their intervals stand for; the studies are taken to be independent,
    which those with calibration or evaluation text in common are not quite.

    Parameters
    ----------
    studies
        Name of each study to its frames.

    Returns
    -------
    DataFrame
        Columns :data:`COLUMNS`: ``frame`` and what else says which effect it is; ``study``, empty for all together;
        ``studies``, their number; ``value``, ``low``, ``high``, ``p_value`` and, of all together, ``p_adjusted``
        (Benjamini & Hochberg, over all effects of a frame and metric, those of all languages apart), ``tau``, the
        standard deviation between studies, ``i_squared`` and ``p_alike`` (Cochran's Q).
    """
    parts = [_effects(name, frame, frames[frame]) for name, frames in studies.items() for frame in COMBINED]
    there = [part for part in parts if len(part)]
    if not there:
        return pd.DataFrame(columns=COLUMNS)
    every = pd.concat(there, ignore_index=True)
    rows: list[pd.DataFrame] = []
    for _, own in every.groupby(KEYS, dropna=False, sort=False):
        own = own.drop_duplicates("study")
        if len(own) < 2:
            continue
        found = pooled(own["value"].to_numpy(), own["error"].to_numpy())
        together = own.iloc[:1].drop(columns="study").assign(**found._asdict())
        rows += [own.assign(studies=len(own)), together.assign(studies=len(own))]
    if not rows:
        return pd.DataFrame(columns=COLUMNS)
    return _corrected(pd.concat(rows, ignore_index=True)).reindex(columns=COLUMNS)


def _effects(study: str, name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the effects of one frame that have an error, by what :data:`KEYS` says of them."""
    rows = frame[frame["low"].notna() & frame["df"].notna()]
    half = (rows["high"] - rows["low"]).to_numpy() / 2
    # an interval of no width stands for a difference of nothing at all: there is no error to weigh it by
    rows, half = rows[half > 0], half[half > 0]
    df = rows["df"].to_numpy()
    known = {key: rows[key].astype(object) for key in KEYS if key in rows.columns}
    found = pd.DataFrame({**known, **{column: rows[column] for column in _ESTIMATES}})
    for key in KEYS:
        if key not in found.columns:
            found[key] = None
    return found.assign(frame=name, study=study, error=half / student.ppf(0.975, df))


def _corrected(rows: pd.DataFrame) -> pd.DataFrame:
    """Return effects with the p-values of those of all studies together corrected within each family."""
    adjusted = np.full(len(rows), np.nan)
    together = rows["study"].isna()
    family: list[Any] = ["frame", "metric", rows["language"].isna()]
    for _, own in rows[together].groupby(family, sort=False):
        adjusted[own.index] = false_discovery_control(own["p_value"].to_numpy(np.float64))
    return rows.assign(p_adjusted=adjusted)
