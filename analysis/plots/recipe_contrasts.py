"""Figures of what one recipe keeps more than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pruning.text.languages import language_name

from ..frames import labels
from ..metrics.contrasts import SIGNIFICANT
from ..metrics.recipe_contrasts import with_reference
from . import charts, style

_UNITS = {
    "accuracy": "difference in accuracy",
    "margin": "difference in margin (nat)",
    "log_perplexity": "difference in log perplexity (nat)",
    "snr_db": "difference in SNR (dB)",
}


def effects(
    frame: pd.DataFrame,
    *,
    metric: str = "log_perplexity",
    task: str | None = None,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw what every recipe has more than the reference, mean over calibration sets, a row a recipe.

    Parameters
    ----------
    frame
        The frame ``recipe_contrasts``.
    metric
        Of text, in all languages and in each; or of items, in a panel a category, all languages together.
    task
        Of items.
    """
    shown, reference = with_reference(frame[frame["metric"] == metric])
    shown = shown[shown["calibration"].isna()]
    if task is not None:
        shown = shown[shown["task"] == task]
    rows = shown.to_dict("records")
    short = labels.apart([*dict.fromkeys(map(labels.recipe_label, rows)), reference])
    panels: dict[str, dict[str, list[charts.Effect]]] = {}
    for category in labels.categories_of(shown):
        by_recipe: dict[str, list[Mapping[Any, Any]]] = {}
        for row in rows:
            if row["category"] == category:
                by_recipe.setdefault(short[labels.recipe_label(row)], []).append(row)
        panels[str(category)] = {name: _row(of, each=task is None) for name, of in by_recipe.items()}
    return charts.grouped_effects(panels, title=f"Against {reference}", x_label=_UNITS[metric], width=width)


def _row(rows: Sequence[Mapping[Any, Any]], *, each: bool) -> list[charts.Effect]:
    """Return the effects of one recipe: of all languages and, if that is wanted or there is only one, of each."""
    whole = [row for row in rows if pd.isna(row["language"])]
    single = [row for row in rows if not pd.isna(row["language"])]
    return [_effect(row) for row in [*whole, *(single if each or not whole else ())] if not row["at_chance"]]


def _effect(row: Mapping[Any, Any]) -> charts.Effect:
    everywhere = pd.isna(row["language"])
    label = "all languages" if everywhere else language_name(row["language"])
    colour = style.BLACK if everywhere else style.colour(str(row["language"]))
    return charts.Effect(label, row["value"], row["low"], row["high"], colour, bool(row["p_adjusted"] < SIGNIFICANT))
