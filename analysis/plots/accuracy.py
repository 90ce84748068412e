"""Figures of accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.items import BUNDLED_ITEMS

from ..frames import ALL, labels, of_recipe
from . import charts, style

#: What is written where the dense model only guesses.
AT_CHANCE = "chance"


def matrix(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    task: str = BUNDLED_ITEMS,
    metric: str = "twin_accuracy_change",
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the change by calibration set and evaluation language, a table a category.

    Cells in which the dense model only guesses are grey: nothing can be lost there.
    """
    shown = of_recipe(frame, {**recipe, "task": task, "metric": metric, "part": ALL})
    shown = shown[shown["language"].notna()]
    points, digits = (1, "{:.1f}") if metric.startswith("margin") else (100, "{:.0f}")
    tables, written = {}, {}
    for category in labels.categories_of(shown):
        rows = shown[shown["category"] == category]
        guessed = charts.by_calibration(rows.assign(value=rows["at_chance"].astype(float))) > 0
        tables[category] = (points * charts.by_calibration(rows)).mask(guessed)
        written[category] = tables[category].map(lambda v: "" if pd.isna(v) else digits.format(v))
    return charts.heatmaps(
        tables,
        title=f"{_TITLES[metric]} ({labels.recipe_label(recipe)})",
        colour_label=_LABELS[metric] + (" (points)" if points > 1 else ""),
        diverging=True,
        labels=written,
        width=width,
    )


def categories(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    task: str = BUNDLED_ITEMS,
    metric: str = "twin_accuracy_change",
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the change of each category over all languages with its interval, a panel a category."""
    shown = of_recipe(frame, {**recipe, "task": task, "metric": metric, "part": ALL})
    shown = shown[shown["language"].isna()] if shown["language"].isna().any() else shown
    panels = {}
    for category in labels.categories_of(shown):
        rows = shown[shown["category"] == category]
        panels[category + (" (at chance)" if rows["at_chance"].all() else "")] = effects = [
            charts.Effect(
                labels.set_label(row["calibration"], row["seed"]),
                row["value"],
                row["low"],
                row["high"],
                style.set_style(row["calibration"], row["seed"])[0],
                significant=row["low"] > 0 or row["high"] < 0,
            )
            for row in rows.to_dict("records")
        ]
        effects.sort(key=lambda effect: labels.calibration_rank(effect.label))
    return charts.effect_panels(
        panels,
        title=f"{_TITLES[metric]}, all languages ({labels.recipe_label(recipe)})",
        x_label=_LABELS[metric],
        legend=("interval excludes zero", "interval includes zero"),
        width=width,
    )


_TITLES = {
    "accuracy_change": "Change in accuracy",
    "twin_accuracy_change": "Change in minimal-pair accuracy",
    "margin_change": "Change in the margin of the right choice",
}
_LABELS = {
    "accuracy_change": "change in accuracy",
    "twin_accuracy_change": "change in minimal-pair accuracy",
    "margin_change": "change in margin (nat)",
}
