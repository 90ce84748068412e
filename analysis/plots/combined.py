"""Figures of effects in several studies, and of all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..metrics.contrasts import SIGNIFICANT
from . import charts, style

#: What the effect of all studies together is called.
TOGETHER = "all studies (random effects)"


def forest(
    rows: pd.DataFrame, names: Sequence[str], *, title: str, x_label: str, width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw effects, a row each, in every study and in all together.

    Parameters
    ----------
    rows
        Of :func:`analysis.metrics.combined.combine`, of effects in one unit.
    names
        What each row's effect is called; rows of one effect have one name.
    title, x_label
        What to write.
    """
    studies = [str(study) for study in rows["study"].dropna().unique()]
    colours = {study: style.nth(i) for i, study in enumerate(studies)}
    by_effect: dict[str, list[Mapping[Any, Any]]] = {}
    for row, name in zip(rows.to_dict("records"), names, strict=True):
        by_effect.setdefault(name, []).append(row)
    return charts.grouped_effects(
        {"": {name: [_effect(row, colours) for row in own] for name, own in by_effect.items()}},
        title=title,
        x_label=x_label,
        legend=("interval excludes zero (all studies: p < 0.05, corrected)", "it does not"),
        width=width,
    )


def _effect(row: Mapping[Any, Any], colours: Mapping[str, str]) -> charts.Effect:
    together = pd.isna(row["study"])
    sure = row["p_adjusted"] < SIGNIFICANT if together else not row["low"] <= 0 <= row["high"]
    label, colour = (TOGETHER, style.BLACK) if together else (str(row["study"]), colours[str(row["study"])])
    return charts.Effect(label, row["value"], row["low"], row["high"], colour, bool(sure))
