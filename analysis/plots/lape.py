"""Figures of language-specific neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import VARIANT_COLUMNS, labels, of_recipe
from ..metrics.lape import Probabilities, select
from . import charts, style


def layers(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw where the dense model's language neurons are, and where each calibration set keeps, loses and gains them."""
    counts = frame.groupby([*VARIANT_COLUMNS, "metric", "layer"], observed=True)["value"].sum().reset_index()
    dense = counts[(counts["method"] == DENSE) & (counts["metric"] == "kept")]
    titles = {"kept": "kept", "lost": "lost", "gained": "gained", "still_firing": "still firing"}
    panels = []
    for metric, title in titles.items():
        lines = charts.set_lines(of_recipe(counts[counts["metric"] == metric], recipe))
        if metric != "gained":
            reference = charts.range_line(dense, "layer", "dense model's own", style.BLACK, "--")
            lines.append(reference)
        panels.append(charts.Panel(title, lines))
    return charts.line_panels(
        panels,
        title=f"Language-specific neurons by layer, all languages ({labels.recipe_label(recipe)})",
        x_label="layer",
        y_label="neurons",
        width=width,
    )


def kept(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the share of the dense model's language neurons that each calibration set keeps, with ceiling and chance."""
    pruned = of_recipe(frame, recipe)
    table = charts.by_calibration(pruned[pruned["metric"] == "kept_share"])
    half = frame[(frame["metric"] == "other_half_share") & (frame["method"] == DENSE)].set_index("language")["value"]
    chance = pruned[pruned["metric"] == "kept_by_chance"].groupby("language", observed=True)["value"].mean()
    table.loc["dense, two halves of the text"] = half.reindex(table.columns)
    table.loc["drawn at random"] = chance.reindex(table.columns)
    return charts.heatmaps(
        {"": 100 * table},
        title=f"Language-specific neurons that are still selected after pruning ({labels.recipe_label(recipe)})",
        colour_label="kept (%)",
        digits="{:.0f}",
        low=0,
        high=100,
        x_label="language",
        dark_is_high=False,
        width=width,
    )


def entropy(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the distribution of LAPE over neurons, dense and pruned: all of it, and its lowest twentieth."""
    lape = frame[(frame["metric"] == "lape") & np.isfinite(frame["value"])]
    dense = lape[lape["method"] == DENSE]["value"].to_numpy()
    pruned = of_recipe(lape, recipe)
    sets = labels.sets_of(pruned)
    lowest = float(np.quantile(dense, 0.05))
    panels = []
    for title, top in (("all neurons", float(dense.max())), ("lowest LAPE", lowest)):
        edges = np.linspace(0, top or 1.0, 101)
        lines = [_cumulated("dense", dense, edges, style.BLACK, "-")]
        for calibration, seed in sets:
            own = pruned[(pruned["calibration"] == calibration) & (pruned["seed"] == seed)]["value"].to_numpy()
            label = labels.set_label(calibration, seed)
            lines.append(_cumulated(label, own, edges, *style.set_style(calibration, seed)))
        panels.append(charts.Panel(title, lines, whole_x=False))
    return charts.line_panels(
        panels,
        title=f"LAPE of all neurons that fire ({labels.recipe_label(recipe)})",
        x_label="LAPE (nat)",
        y_label="share of neurons below",
        share=False,
        width=width,
    )


def _cumulated(label: str, values: np.ndarray, edges: np.ndarray, colour: str, style: str) -> charts.Line:
    shares = np.searchsorted(np.sort(values), edges, side="right") / max(len(values), 1)
    return charts.Line(label, edges.tolist(), shares.tolist(), colour, style)


#: Neurons that a mean shift is drawn from at the least.
_FEW = 5
#: Firing probabilities between which neurons are averaged, on a logarithmic scale.
_BINS = np.logspace(-3, 0, 13)


def shift(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw how much less or more often neurons fire after pruning, by how often they fired before; a panel a language.

    Language-specific neurons of the dense model against all others; lines: means over calibration sets, bands: lowest
    to highest.
    """
    rates = frame[frame["metric"] == "firing_probability"]
    languages = labels.in_order(rates["language"].dropna().unique())
    dense = _as_array(rates[rates["method"] == DENSE], languages)
    members = select(dense).members
    shifts: dict[tuple[str, bool], list[np.ndarray]] = {}
    for _, own in of_recipe(rates, recipe).groupby(["calibration", "seed"], observed=True):
        pruned = _as_array(own, languages)
        for i, language in enumerate(languages):
            where = np.digitize(dense[..., i], _BINS) - 1
            for specific in (True, False):
                group = members[..., i] == specific
                of_bins = [group & (where == b) for b in range(len(_BINS) - 1)]
                means = [
                    np.log2(pruned[bin_, i].mean() / dense[bin_, i].mean())
                    if bin_.sum() >= _FEW and pruned[bin_, i].any()
                    else np.nan
                    for bin_ in of_bins
                ]
                shifts.setdefault((language, specific), []).append(np.array(means))
    middle = np.sqrt(_BINS[1:] * _BINS[:-1])
    panels = []
    for language in languages:
        lines = []
        for specific, label, colour in (
            (True, "language-specific neurons", style.TWO_COLOURS[0]),
            (False, "all others", style.GREY),
        ):
            stacked = np.stack(shifts[language, specific])
            there = ~np.isnan(stacked).any(axis=0)
            x, values = middle[there].tolist(), stacked[:, there]
            low, high = values.min(axis=0).tolist(), values.max(axis=0).tolist()
            lines.append(charts.Line(label, x, values.mean(axis=0).tolist(), colour, "-", low, high))
        ends = float(_BINS[0]), float(_BINS[-1])
        panels.append(charts.Panel(labels.language_title(language), lines, {"as often": 0.0}, log_x=True, x_range=ends))
    return charts.line_panels(
        panels,
        title=f"Shift of firing frequency by frequency before pruning ({labels.recipe_label(recipe)})",
        x_label="firing probability, dense",
        y_label="log2 of the ratio, pruned over dense",
        width=width,
    )


def _as_array(rates: pd.DataFrame, languages: Sequence[str]) -> Probabilities:
    """Return one model's rows as an array."""
    layers, neurons = int(rates["layer"].max()) + 1, int(rates["neuron"].max()) + 1
    parts = [rates.loc[rates["language"] == lang].sort_values(["layer", "neuron"])["value"] for lang in languages]
    return np.stack([part.to_numpy().reshape(layers, neurons) for part in parts], axis=-1)
