"""Perplexity: how well each model predicts held-out text of each language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE, Readings

from ..frames import of_recipe, tidy
from ..plots import style as figures
from ..stats.bootstrap import segment_interval


def analyze(readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``perplexity``.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; the dense model is the variant ``"dense"``.
    columns
        Variant to the columns that describe it.
    """
    rows = []
    for (variant, language), read in readings.items():
        data = np.stack([read.nll, read.predicted, read.utf8_bytes], axis=1).astype(np.float64)

        def of(weights: np.ndarray, data: np.ndarray = data) -> np.ndarray:
            nll, predicted, utf8 = np.moveaxis(weights @ data, -1, 0)
            return np.stack([np.exp(nll / predicted), nll / np.log(2) / utf8], axis=-1)

        value, low, high = segment_interval(of, len(data))
        row = {**columns[variant], "language": language, "n": len(data)}
        row |= {"metric": ["perplexity", "bits_per_byte"], "value": value, "low": low, "high": high}
        rows.append(row)
    return tidy("perplexity", rows)


def plot(frame: pd.DataFrame, width: float = figures.PAGE_WIDTH) -> Figure:
    """Draw the perplexity of every model in every language, coloured by the rise over the dense model."""
    shown = frame[frame["metric"] == "perplexity"].copy()
    shown["variant"] = figures.variant_labels(shown)
    shown = shown.iloc[sorted(range(len(shown)), key=lambda i: figures.variant_rank(shown.iloc[i]))]
    table = shown.pivot_table(index="variant", columns="language", values="value", sort=False, observed=True)
    table = table[figures.in_order(table.columns)]
    return figures.heatmaps(
        {"": np.log2(table / table.loc[DENSE])},
        labels={"": table.map(figures.three_digits)},
        title="Perplexity",
        colour_label="doublings of the dense perplexity",
        low=0,
        y_label="pruned with",
        width=width,
    )


def plot_matrix(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    metric: str = "perplexity",
    width: float = figures.PAGE_WIDTH,
) -> Figure:
    """Draw perplexity or bits per byte by calibration set and evaluation language, with intervals.

    Perplexities of different languages do not compare, so colour shows the rise over the dense model; bits per byte do.
    """
    shown = frame[frame["metric"] == metric]
    dense = shown[shown["method"] == DENSE].set_index("language")["value"]
    pruned = of_recipe(shown, recipe)
    value, low, high = (
        figures.by_calibration(pruned.assign(value=pruned[column])) for column in ("value", "low", "high")
    )
    written = figures.three_digits if metric == "perplexity" else "{:.2f}".format
    texts = value.map(written) + "\n" + low.map(written) + "–" + high.map(written)
    rise = np.log2(value / dense.reindex(value.columns)) if metric == "perplexity" else value
    names = {
        "perplexity": ("Perplexity", "doublings of the dense perplexity"),
        "bits_per_byte": ("Bits per byte", "bits per byte of UTF-8 text"),
    }
    title, label = names[metric]
    return figures.heatmaps(
        {"": rise},
        labels={"": texts},
        title=f"{title} with 95 % intervals ({figures.recipe_label(recipe)})",
        colour_label=label,
        low=0 if metric == "perplexity" else None,
        height=0.32,
        width=width,
    )
