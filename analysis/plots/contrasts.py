"""Figures of contrasts between calibration sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..frames import labels, of_recipe
from ..metrics.contrasts import OTHERS, SIGNIFICANT
from . import charts, style

_WORDS = {
    "log_perplexity": "log perplexity (nat)",
    "snr_db": "SNR of the residual stream after the last block (dB)",
    "specific_error_db": "error of the language-specific part (dB)",
    "agnostic_error_db": "error of the language-agnostic part (dB)",
    "specific_minus_agnostic_db": "error of the language-specific part over that of the agnostic one (dB)",
}


def effects(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    metric: str = "log_perplexity",
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw how every calibration set differs from the evaluated language's own, a panel a language.

    Languages without a set of their own are compared with the set that comes first.
    """
    shown = of_recipe(frame, {**recipe, "metric": metric})
    shown = shown[shown["other_calibration"] != OTHERS]
    sets = {*shown["calibration"].astype(str), *shown["other_calibration"].astype(str)}
    ordered = sorted(sets, key=labels.calibration_rank)
    panels = {}
    for language in labels.in_order(shown["language"].unique()):
        reference = language if language in sets else ordered[0]
        here = shown[shown["language"] == language]
        involved = (here["calibration"] == reference) | (here["other_calibration"] == reference)
        effects = [_effect(row, reference) for row in here[involved].to_dict("records")]
        effects.sort(key=lambda effect: labels.calibration_rank(effect.label))
        panels[f"{labels.language_title(language)}, relative to {reference}"] = effects
    title = f"Effect of the calibration set ({labels.recipe_label(recipe)})"
    return charts.effect_panels(panels, title=title, x_label=f"difference in {_WORDS[metric]}", width=width)


def _effect(row: Mapping[Any, Any], reference: str) -> charts.Effect:
    """Return how the set that is compared with the reference differs from it, whichever of them the row subtracts."""
    turned = row["calibration"] == reference
    name = str(row["other_calibration" if turned else "calibration"])
    value, low, high = (-row["value"], -row["high"], -row["low"]) if turned else (row["value"], row["low"], row["high"])
    return charts.Effect(name, value, low, high, style.colour(name), row["p_adjusted"] < SIGNIFICANT)
