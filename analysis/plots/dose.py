"""Figures of dose and response: what remains at which sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import ALL, RECIPE_COLUMNS, TEXT, labels, of_recipe, series_of
from . import charts, style

_TEXT_TITLE = "text: log2 perplexity ratio"
#: Columns of words, which are compared between frames, of which each has its own categories.
_WORDS = ("model", "method", "pattern", "allocation", "scope", "propagation", "calibration")


def response(
    perplexity: pd.DataFrame,
    accuracy: pd.DataFrame,
    series: Mapping[str, Any],
    *,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw perplexity (over the dense model's, mean over languages) and accuracy by category against sparsity.

    A line a calibration set: its mean over draws, and their range.

    Parameters
    ----------
    perplexity, accuracy
        Frames.
    series
        Recipes that differ in sparsity alone (:func:`analysis.frames.series_of`).
    width
        In inches.
    """
    measured = {_TEXT_TITLE: _ratio(perplexity), **_by_category(accuracy)}
    panels = []
    for title, values in measured.items():
        own = of_recipe(values, series)
        dense = values[values["method"] == DENSE]["value"].mean()
        lines = []
        for calibration in sorted(own["calibration"].unique(), key=labels.calibration_rank):
            drawn = own[own["calibration"] == calibration]
            start = pd.DataFrame({"sparsity": 0.0, "seed": sorted(drawn["seed"].unique()), "value": dense})
            rows = pd.concat([start, drawn[["sparsity", "seed", "value"]]])
            label = labels.set_label(str(calibration), 0)
            lines.append(charts.range_line(rows, "sparsity", label, *style.set_style(str(calibration), 0)))
        panels.append(charts.Panel(title, lines, _chance(values), whole_x=False))
    return charts.line_panels(
        panels,
        title=f"What remains at which sparsity ({labels.recipe_label(series)})",
        x_label="sparsity",
        y_label="",
        share=False,
        width=width,
    )


def breaking(frame: pd.DataFrame, series: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the sparsity at which each category breaks, by calibration set and evaluation language.

    Parameters
    ----------
    frame
        The frame ``dose``.
    series
        Recipes that differ in sparsity alone (:func:`analysis.frames.series_of`).
    width
        In inches.
    """
    shown = of_recipe(frame, series)
    shown = shown[shown["language"].notna()]
    tables, written = {}, {}
    for category in [TEXT, *(c for c in labels.categories_of(shown) if c != TEXT)]:
        rows = shown[shown["category"] == category]
        if not len(rows):
            continue
        value, low, high = (charts.by_calibration(rows.assign(value=rows[name])) for name in ("value", "low", "high"))
        tables[category] = value.clip(upper=1.0)
        written[category] = value.map(_sparsity) + "\n" + low.map(_sparsity) + "–" + high.map(_sparsity)
    return charts.heatmaps(
        tables,
        title=f"Sparsity at which it breaks ({labels.recipe_label(series)})",
        colour_label="sparsity",
        labels=written,
        low=0.0,
        high=1.0,
        dark_is_high=False,
        height=0.32,
        width=width,
    )


def at_perplexity(perplexity: pd.DataFrame, accuracy: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw accuracy against perplexity, a line a series: means over calibration sets and draws at every sparsity.

    Parameters
    ----------
    perplexity, accuracy
        Frames.
    width
        In inches.
    """
    ratio = _ratio(perplexity)
    colours: dict[str, str] = {}
    panels = []
    for title, values in _by_category(accuracy).items():
        keys = [*RECIPE_COLUMNS, "calibration", "seed"]
        both = values.merge(ratio[[*keys, "value"]], on=keys, suffixes=("", "_text"))
        dense = both[both["method"] == DENSE]
        lines = []
        for recipe in series_of(both):
            own = of_recipe(both, recipe).groupby("sparsity")[["value_text", "value"]].mean()
            x, y = ([float(dense[name].mean()), *own[name]] for name in ("value_text", "value"))
            label = labels.recipe_label(recipe)
            lines.append(charts.Line(label, x, y, colours.setdefault(label, style.nth(len(colours)))))
        panels.append(charts.Panel(title, lines, _chance(values), whole_x=False))
    return charts.line_panels(
        panels,
        title="Accuracy at the same perplexity",
        x_label="log2 perplexity ratio to dense",
        y_label="accuracy",
        width=width,
    )


def _ratio(perplexity: pd.DataFrame) -> pd.DataFrame:
    """Return log2 of the perplexity over the dense model's, mean over languages, of every model."""
    shown = perplexity[perplexity["metric"] == "perplexity"].astype(dict.fromkeys(_WORDS, object))
    dense = shown[shown["method"] == DENSE].set_index("language")["value"]
    shown = shown.assign(value=np.log2(shown["value"] / shown["language"].map(dense).astype(float)))
    keys = [*RECIPE_COLUMNS, "calibration", "seed"]
    return shown.groupby(keys, sort=False, as_index=False)["value"].mean()


def _by_category(accuracy: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return accuracy over all languages by task and category, on minimal pairs where there are any."""
    found = {}
    shown = accuracy[accuracy["part"] == ALL].astype(dict.fromkeys(_WORDS, object))
    tasks = shown["task"].unique()
    for task in tasks:
        for category in labels.categories_of(shown[shown["task"] == task]):
            rows = shown[(shown["task"] == task) & (shown["category"] == category)]
            metric = "twin_accuracy" if (rows["metric"] == "twin_accuracy").any() else "accuracy"
            rows = rows[rows["metric"] == metric]
            rows = rows[rows["language"].isna()] if rows["language"].isna().any() else rows
            if rows["at_chance"].all():
                continue
            found[category if len(tasks) == 1 else f"{category} ({task})"] = rows
    return found


def _chance(values: pd.DataFrame) -> dict[str, float | int]:
    """Return the level of chance, where it is the same for all items: on minimal pairs."""
    return {"chance": 0.5} if "metric" in values and (values["metric"] == "twin_accuracy").all() else {}


def _sparsity(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"
