"""Figures of perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import labels, of_recipe
from . import charts, style


def all_models(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the perplexity of every model in every language, coloured by its ratio to the dense model's."""
    shown = frame[frame["metric"] == "perplexity"].copy()
    shown["variant"] = labels.variant_labels(shown)
    shown = shown.iloc[sorted(range(len(shown)), key=lambda i: labels.variant_rank(shown.iloc[i]))]
    table = shown.pivot_table(index="variant", columns="language", values="value", sort=False, observed=True)
    table = table[labels.in_order(table.columns)]
    return charts.heatmaps(
        {"": np.log2(table / table.loc[DENSE])},
        labels={"": table.map(labels.three_digits)},
        title="Perplexity",
        colour_label="log2 ratio to dense",
        low=0,
        y_label="model",
        width=width,
    )


def matrix(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    metric: str = "perplexity",
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw perplexity or bits per byte by calibration set and evaluation language, with intervals.

    Perplexities are not comparable between languages, so colour shows the ratio to the dense model; bits per byte are.
    """
    shown = frame[frame["metric"] == metric]
    dense = shown[shown["method"] == DENSE].set_index("language")["value"]
    pruned = of_recipe(shown, recipe)
    value, low, high = (
        charts.by_calibration(pruned.assign(value=pruned[column])) for column in ("value", "low", "high")
    )
    written = labels.three_digits if metric == "perplexity" else "{:.2f}".format
    texts = value.map(written) + "\n" + low.map(written) + "–" + high.map(written)
    rise = np.log2(value / dense.reindex(value.columns)) if metric == "perplexity" else value
    names = {
        "perplexity": ("Perplexity", "log2 ratio to dense"),
        "bits_per_byte": ("Bits per byte", "bits per byte of UTF-8 text"),
    }
    title, label = names[metric]
    return charts.heatmaps(
        {"": rise},
        labels={"": texts},
        title=f"{title} with 95 % intervals ({labels.recipe_label(recipe)})",
        colour_label=label,
        low=0 if metric == "perplexity" else None,
        height=0.32,
        width=width,
    )
