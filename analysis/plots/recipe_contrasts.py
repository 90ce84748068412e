"""Figures of what one recipe keeps more than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pruning.text.languages import language_name

from ..frames import RECIPE_COLUMNS, labels
from ..metrics.contrasts import SIGNIFICANT
from ..metrics.recipe_contrasts import with_reference
from . import charts, style
from .accuracy import AT_CHANCE

_UNITS = {
    "accuracy": "difference in accuracy",
    "margin": "difference in margin (nat)",
    "log_perplexity": "difference in log perplexity (nat)",
    "snr_db": "difference in SNR (dB)",
}
_NONE = float("nan")
#: Inches that a panel takes at least: the names of recipes are long.
_PANEL = 2.6


def effects(
    frame: pd.DataFrame,
    *,
    metric: str = "log_perplexity",
    task: str | None = None,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw what every recipe has more than the reference, mean over calibration sets.

    Parameters
    ----------
    frame
        The frame ``recipe_contrasts``.
    metric
        Of text, in a panel for all languages and one for each; or of items, in a panel a category, all languages.
    task
        Of items.
    """
    shown, reference = with_reference(frame[frame["metric"] == metric])
    shown = shown[shown["calibration"].isna()]
    if task is not None:
        shown = shown[shown["task"] == task]
    recipes = [labels.recipe_label(row) for row in shown[list(RECIPE_COLUMNS)].to_dict("records")]
    short = labels.apart([*dict.fromkeys(recipes), reference])
    rows = [{**row, "label": short[name]} for row, name in zip(shown.to_dict("records"), recipes, strict=True)]
    panels: dict[str, list[Mapping[Any, Any]]] = {}
    if task is None:
        for row in sorted(rows, key=lambda row: not pd.isna(row["language"])):
            name = "all languages" if pd.isna(row["language"]) else language_name(row["language"])
            panels.setdefault(name, []).append(row)
    else:
        for category in labels.categories_of(shown):
            panels[category] = _everywhere([row for row in rows if row["category"] == category])
    return charts.effect_panels(
        {name: [_effect(row) for row in of] for name, of in panels.items()},
        title=f"Against {reference}",
        x_label=_UNITS[metric],
        least=_PANEL,
        width=width,
    )


def _everywhere(rows: Sequence[Mapping[Any, Any]]) -> list[Mapping[Any, Any]]:
    """Return the rows of all languages together; of the only one, if the dense model is able or asked in one alone."""
    whole = [row for row in rows if pd.isna(row["language"])]
    languages = dict.fromkeys(row["language"] for row in rows)
    return whole or [row for row in rows if row["language"] == next(iter(languages))]


def _effect(row: Mapping[Any, Any]) -> charts.Effect:
    label = str(row["label"])
    if row["at_chance"]:
        return charts.Effect(f"{label} ({AT_CHANCE})", _NONE, _NONE, _NONE, style.BLACK, False)
    significant = bool(row["p_adjusted"] < SIGNIFICANT)
    return charts.Effect(label, row["value"], row["low"], row["high"], style.BLACK, significant)
