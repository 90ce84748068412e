"""Figures of what depends on category and calibration set together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.items import BUNDLED_ITEMS

from ..frames import ALL, labels, of_recipe
from ..metrics.contrasts import SIGNIFICANT
from . import charts, style
from .accuracy import AT_CHANCE

_EVERYWHERE = "all languages"
_TITLES = {
    "category": "Does pruning hurt one category more than another?",
    "own": "What calibrating on the evaluated language adds to the drop",
}
_UNITS = {"accuracy_drop": "drop in accuracy", "margin_drop": "drop in margin (nat)"}


def effects(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    contrast: str = "category",
    task: str = BUNDLED_ITEMS,
    metric: str = "accuracy_drop",
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw a contrast by language and over all languages, a panel a category.

    Parameters
    ----------
    contrast
        ``category``, over all calibration sets, or ``own``, where ``own_by_category`` is drawn beside it.
    """
    shown = of_recipe(frame, {**recipe, "task": task, "metric": metric, "part": ALL})
    shown = shown[shown["contrast"].astype(str).str.startswith(contrast)]
    if contrast == "category":
        shown = shown[shown["calibration"].isna()]
    panels = {}
    for category in labels.categories_of(shown):
        own = shown[shown["category"] == category]
        for other, rows in own.groupby(own["other_category"].astype(object).fillna(""), sort=True):
            title = f"{category} minus {other}" if other else category
            panels[title] = [_effect(row) for row in sorted(rows.to_dict("records"), key=_rank)]
    return charts.effect_panels(
        panels,
        title=f"{_TITLES[contrast]} ({labels.recipe_label(recipe)})",
        x_label=f"difference in {_UNITS[metric]}",
        width=width,
    )


def _rank(row: Mapping[Any, Any]) -> str:
    """Languages in their order, all of them last."""
    return "~" if pd.isna(row["language"]) else str(row["language"])


def _effect(row: Mapping[Any, Any]) -> charts.Effect:
    everywhere = pd.isna(row["language"])
    label = _EVERYWHERE if everywhere else str(row["language"])
    colour = style.BLACK if everywhere else style.colour(label)
    if row["at_chance"]:
        return charts.Effect(f"{label} ({AT_CHANCE})", float("nan"), float("nan"), float("nan"), colour, False)
    return charts.Effect(label, row["value"], row["low"], row["high"], colour, row["p_adjusted"] < SIGNIFICANT)
