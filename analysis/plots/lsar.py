"""Figures of the language-specific and language-agnostic parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import labels, of_recipe
from ..metrics.lsar import RETRIEVAL_METRICS
from . import charts, style

_PARTS = {"specific": "language-specific", "agnostic": "language-agnostic"}


def layers(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, encoder: int = 0, width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw the error of both parts by layer, relative to their spread; a panel a language."""
    shown = of_recipe(frame, recipe)
    panels = []
    for language in labels.in_order(shown["language"].dropna().unique()):
        lines = []
        for part, colour in zip(_PARTS, style.TWO_COLOURS, strict=True):
            rows = shown[(shown["metric"] == f"{part}_error_centred") & (shown["language"] == language)]
            lines.append(charts.range_line(rows, "layer", _PARTS[part], colour))
        panels.append(charts.Panel(labels.language_title(language), lines))
    return charts.line_panels(
        panels,
        title=f"Error of the language-specific and language-agnostic parts ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="error relative to spread",
        log_y=True,
        width=width,
    )


def matrix(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the error of both parts, median over layers, by calibration set and evaluation language."""
    shown = of_recipe(frame, recipe)
    tables = {}
    for part, name in _PARTS.items():
        rows = shown[shown["metric"] == f"{part}_error_centred"]
        tables[f"{name} part"] = charts.by_calibration(rows, "median")
    return charts.heatmaps(
        tables,
        title=f"Error relative to spread, median over layers ({labels.recipe_label(recipe)})",
        colour_label="error relative to spread",
        digits="{:.2g}",
        width=width,
    )


def knowledge(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, encoder: int = 0, width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw how well translations are retrieved, dense and pruned, and the variance that each rank explains.

    Means over languages; bands: lowest to highest over calibration sets.
    """
    pruned, dense = of_recipe(frame, recipe), frame[frame["method"] == DENSE]
    named = {
        "agnostic_retrieval": ("language-agnostic part", style.TWO_COLOURS[1]),
        "whole_retrieval": ("whole state", style.GREY),
    }
    panels = []
    retrieval = dense[dense["metric"].isin(RETRIEVAL_METRICS)]
    if len(retrieval):
        lines = []
        for metric, (label, colour) in named.items():
            for rows, dash, model in ((dense, "-", "dense"), (pruned, "--", "pruned")):
                keys = ["calibration", "seed", "layer"]
                means = rows[rows["metric"] == metric].groupby(keys, observed=True)["value"].mean().reset_index()
                lines.append(charts.range_line(means, "layer", f"{label}, {model}", colour, dash))
        panels.append(charts.Panel("translation retrieved", lines, {"chance": 1 / float(retrieval["n"].max())}))
    shares = dense[dense["metric"] == "explained_share"]
    lines = [charts.range_line(shares, "rank", "between-language variance (band: layers)", style.GREEN)]
    panels.append(charts.Panel("variance explained by rank", lines, x_label="rank of the subspace"))
    return charts.line_panels(
        panels,
        title=f"What the agnostic part encodes ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="share",
        width=width,
        share=False,
    )
