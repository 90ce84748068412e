"""Signal: how far pruning moves the output of every projection and the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE, Readings
from probes.readers.signal import SIGNAL_SITES

from ..frames import of_recipe, tidy
from ..plots import style as figures
from ..stats.bootstrap import segment_interval


def analyze(readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``signal``: error and signal-to-noise ratio by layer and role (``residual`` for the stream).

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; the dense model has no rows.
    columns
        Variant to the columns that describe it.
    """
    rows = []
    for (variant, language), read in readings.items():
        if variant == DENSE:
            continue
        segments = len(read.error)
        there = ~read.power.isnan().all(dim=0)  # a model without gates, or with experts, lacks some sites
        layer, site = (index.numpy() for index in there.nonzero(as_tuple=True))
        error = read.error[:, there].numpy()
        power = read.power[:, there].numpy()
        tokens = read.tokens.numpy().astype(np.float64)

        def of(
            weights: np.ndarray,
            error: np.ndarray = error,
            power: np.ndarray = power,
            tokens: np.ndarray = tokens,
        ) -> np.ndarray:
            lost = weights @ error
            with np.errstate(divide="ignore"):  # no error at all: an infinite ratio
                ratio = 10 * np.log10(weights @ power / lost)
            return np.concatenate([lost / (weights @ tokens)[..., None], ratio], axis=-1)

        value, low, high = segment_interval(of, segments)
        rows.append(
            {
                **columns[variant],
                "language": language,
                "layer": np.tile(layer, 2),
                "role": [SIGNAL_SITES[i] for i in site] * 2,
                "metric": ["error"] * len(site) + ["snr_db"] * len(site),
                "value": value,
                "low": low,
                "high": high,
                "n": segments,
            }
        )
    return tidy("signal", rows)


def plot(frame: pd.DataFrame, recipe: Mapping[str, Any], width: float = figures.PAGE_WIDTH) -> Figure:
    """Draw the residual stream's signal-to-noise ratio by layer, a panel a language, a line a calibration set."""
    shown = of_recipe(frame, {**recipe, "metric": "snr_db", "role": "residual"})
    panels = [
        figures.Panel(figures.language_title(lang), figures.set_lines(shown[shown["language"] == lang]))
        for lang in figures.in_order(shown["language"].unique())
    ]
    return figures.line_panels(
        panels,
        title=f"Signal left after pruning ({figures.recipe_label(recipe)})",
        x_label="layer",
        y_label="SNR of the residual stream (dB)",
        width=width,
    )


def plot_matrix(frame: pd.DataFrame, recipe: Mapping[str, Any], width: float = figures.PAGE_WIDTH) -> Figure:
    """Draw the residual stream's signal-to-noise ratio after the last block, by calibration set and language."""
    shown = of_recipe(frame, {**recipe, "metric": "snr_db", "role": "residual"})
    return figures.heatmaps(
        {"": figures.by_calibration(shown[shown["layer"] == shown["layer"].max()])},
        title=f"Signal left after the last block ({figures.recipe_label(recipe)})",
        colour_label="SNR (dB)",
        digits="{:.1f}",
        dark_is_high=False,
        width=width,
    )


def plot_roles(frame: pd.DataFrame, recipe: Mapping[str, Any], width: float = figures.PAGE_WIDTH) -> Figure:
    """Draw each role's signal-to-noise ratio by layer, mean over languages; a line a calibration set."""
    shown = of_recipe(frame, {**recipe, "metric": "snr_db"})
    keys = ["role", "calibration", "seed", "layer"]  # a mean over languages has no interval over segments
    means = shown.groupby(keys, observed=True, sort=False)["value"].mean().reset_index()
    panels = [
        figures.Panel(role, figures.set_lines(means[means["role"] == role]))
        for role in SIGNAL_SITES
        if role in set(means["role"])
    ]
    return figures.line_panels(
        panels,
        title=f"Signal left in each projection, mean over languages ({figures.recipe_label(recipe)})",
        x_label="layer",
        y_label="SNR of the output (dB)",
        width=width,
    )
