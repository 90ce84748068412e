"""Figures of the signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.readers.signal import SIGNAL_SITES

from ..frames import labels, of_recipe
from . import charts, style


def layers(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the residual stream's signal-to-noise ratio by layer, a panel a language, a line a calibration set."""
    shown = of_recipe(frame, {**recipe, "metric": "snr_db", "role": "residual"})
    panels = [
        charts.Panel(labels.language_title(lang), charts.set_lines(shown[shown["language"] == lang]))
        for lang in labels.in_order(shown["language"].unique())
    ]
    return charts.line_panels(
        panels,
        title=f"SNR of the residual stream ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=labels.encoder_blocks(frame),
        y_label="SNR (dB)",
        width=width,
    )


def matrix(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the residual stream's signal-to-noise ratio after the last block, by calibration set and language."""
    shown = of_recipe(frame, {**recipe, "metric": "snr_db", "role": "residual"})
    return charts.heatmaps(
        {"": charts.by_calibration(shown[shown["layer"] == shown["layer"].max()])},
        title=f"SNR of the residual stream after the last block ({labels.recipe_label(recipe)})",
        colour_label="SNR (dB)",
        digits="{:.1f}",
        dark_is_high=False,
        width=width,
    )


def roles(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw each role's signal-to-noise ratio by layer, mean over languages; a line a calibration set."""
    shown = of_recipe(frame, {**recipe, "metric": "snr_db"})
    keys = ["role", "calibration", "seed", "layer"]  # a mean over languages has no interval over segments
    means = shown.groupby(keys, observed=True, sort=False)["value"].mean().reset_index()
    panels = [
        charts.Panel(role, charts.set_lines(means[means["role"] == role]))
        for role in SIGNAL_SITES
        if role in set(means["role"])
    ]
    return charts.line_panels(
        panels,
        title=f"SNR of each projection's output, mean over languages ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=labels.encoder_blocks(frame),
        y_label="SNR (dB)",
        width=width,
    )
