"""Figures of language-specific neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import VARIANT_COLUMNS, labels, of_recipe
from . import charts, style


def layers(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, encoder: int = 0, width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw where the dense model's language neurons are, and where each calibration set keeps, loses and gains them."""
    counts = frame.groupby([*VARIANT_COLUMNS, "metric", "layer"], observed=True)["value"].sum().reset_index()
    dense = counts[(counts["method"] == DENSE) & (counts["metric"] == "kept")]
    titles = {"kept": "kept", "lost": "lost", "gained": "gained", "still_firing": "still firing"}
    panels = []
    for metric, title in titles.items():
        lines = charts.set_lines(of_recipe(counts[counts["metric"] == metric], recipe))
        if metric != "gained":
            reference = charts.range_line(dense, "layer", "dense model", style.BLACK, "--")
            lines.append(reference)
        panels.append(charts.Panel(title, lines))
    return charts.line_panels(
        panels,
        title=f"Language-specific neurons by layer, all languages ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="neurons",
        width=width,
    )


def kept(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the share of the dense model's language neurons that each calibration set keeps, with ceiling and chance."""
    pruned = of_recipe(frame, recipe)
    table = charts.by_calibration(pruned[pruned["metric"] == "kept_share"])
    half = frame[(frame["metric"] == "other_half_share") & (frame["method"] == DENSE)].set_index("language")["value"]
    chance = pruned[pruned["metric"] == "kept_by_chance"].groupby("language", observed=True)["value"].mean()
    table.loc["dense, split halves"] = half.reindex(table.columns)
    table.loc["chance"] = chance.reindex(table.columns)
    return charts.heatmaps(
        {"": 100 * table},
        title=f"Language-specific neurons selected again after pruning ({labels.recipe_label(recipe)})",
        colour_label="selected again (%)",
        digits="{:.0f}",
        low=0,
        high=100,
        x_label="language",
        dark_is_high=False,
        width=width,
    )


def entropy(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the cumulative distribution of LAPE over neurons, dense and pruned: all of it, and its lowest 5 %."""
    dense = frame[frame["method"] == DENSE]
    pruned = of_recipe(frame, recipe)
    lowest = float(dense[dense["quantile"] == 0.05]["value"].iloc[0])
    panels = []
    for title, top in (("all neurons", float(dense["value"].max())), ("lowest 5 % (dense)", lowest)):
        edges = np.linspace(0, top or 1.0, 101)
        lines = [_cumulated("dense", dense, edges, style.BLACK, "-")]
        for calibration, seed in labels.sets_of(pruned):
            own = pruned[(pruned["calibration"] == calibration) & (pruned["seed"] == seed)]
            label = labels.set_label(calibration, seed)
            lines.append(_cumulated(label, own, edges, *style.set_style(calibration, seed)))
        panels.append(charts.Panel(title, lines, whole_x=False))
    return charts.line_panels(
        panels,
        title=f"Distribution of LAPE over neurons that fire ({labels.recipe_label(recipe)})",
        x_label="LAPE (nat)",
        y_label="cumulative share",
        share=False,
        width=width,
    )


def _cumulated(label: str, rows: pd.DataFrame, edges: np.ndarray, colour: str, dash: str) -> charts.Line:
    reached = rows.groupby("value")["quantile"].max()  # of neurons with the same LAPE the last
    shares = np.interp(edges, reached.index, reached, left=0, right=1)
    return charts.Line(label, edges.tolist(), shares.tolist(), colour, dash)


def shift(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the change in firing probability after pruning by dense firing probability; a panel a language.

    Language-specific neurons of the dense model against all others; lines: means over calibration sets, bands: lowest
    to highest.
    """
    shown = of_recipe(frame, recipe)
    sets = len(labels.sets_of(shown))
    panels = []
    for language in labels.in_order(shown["language"].unique()):
        lines = []
        for metric, label, colour in (
            ("specific_shift", "language-specific neurons", style.TWO_COLOURS[0]),
            ("other_shift", "all other neurons", style.GREY),
        ):
            rows = shown[(shown["language"] == language) & (shown["metric"] == metric)]
            rows = rows[rows.groupby("dense_firing")["value"].transform("size") == sets]
            lines.append(charts.range_line(rows, "dense_firing", label, colour))
        panels.append(
            charts.Panel(labels.language_title(language), lines, {"no change": 0.0}, log_x=10, x_range=(1e-3, 1.0))
        )
    return charts.line_panels(
        panels,
        title=f"Change in firing probability by dense firing probability ({labels.recipe_label(recipe)})",
        x_label="dense firing probability",
        y_label="log2 ratio, pruned / dense",
        width=width,
    )
