"""Figures of routing in mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import labels, of_recipe
from . import charts, style


def languages(frame: pd.DataFrame, *, width: float = style.COLUMN_WIDTH) -> Figure:
    """Draw how far the experts that two languages use are apart in the dense model, mean over layers."""
    rows = frame[(frame["method"] == DENSE) & (frame["metric"] == "language_distance") & frame["layer"].isna()]
    pairs = rows[["language", "other_language", "value"]].to_dict("records")
    names = labels.in_order({*rows["language"], *rows["other_language"]})
    table = pd.DataFrame(index=names, columns=names, dtype=float)
    for row in pairs:
        one, other = row["language"], row["other_language"]
        table.loc[one, other] = table.loc[other, one] = row["value"]
    return charts.heatmaps(
        {"": table},
        title="Distance between languages by the experts that they use (dense)",
        colour_label="total variation distance",
        x_label="language",
        y_label="language",
        low=0.0,
        width=width,
    )


def matrix(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the changed choices and the shift between experts by calibration set and language, mean over layers."""
    shown = of_recipe(frame, recipe)
    shown = shown[shown["layer"].isna()]
    titles = {"moved": "slots with another expert", "shift": "shift between experts"}
    return charts.heatmaps(
        {title: charts.by_calibration(shown[shown["metric"] == metric]) for metric, title in titles.items()},
        title=f"Routing against the dense model, mean over layers ({labels.recipe_label(recipe)})",
        colour_label="share of top-k slots",
        low=0.0,
        width=width,
    )


def layers(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the shift between experts by layer; a panel a language, a line a calibration set."""
    shown = of_recipe(frame, {**recipe, "metric": "shift"})
    shown = shown[shown["layer"].notna()]
    panels = [
        charts.Panel(labels.language_title(lang), charts.set_lines(shown[shown["language"] == lang]))
        for lang in labels.in_order(shown["language"].unique())
    ]
    return charts.line_panels(
        panels,
        title=f"Shift of routing between experts ({labels.recipe_label(recipe)})",
        x_label="layer",
        y_label="total variation distance",
        width=width,
    )
