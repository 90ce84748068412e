"""Figures of the logit lens and the tuned lens: what models would predict after each block, and in which language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE
from probes.lens import LENSES, SHARED, UNSEEN

from ..frames import labels, of_recipe
from . import charts, style


def layers(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    lens: str = LENSES[0],
    encoder: int = 0,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the divergence from the dense model's final prediction by block; a panel a language."""
    kl = frame[(frame["metric"] == "kl") & (frame["lens"] == lens)]
    panels = []
    for language in labels.in_order(kl["language"].unique()):
        own = kl[kl["language"] == language]
        dense = _banded(own[own["method"] == DENSE], "dense", style.BLACK)
        panels.append(charts.Panel(labels.language_title(language), [*charts.set_lines(of_recipe(own, recipe)), dense]))
    return charts.line_panels(
        panels,
        title=f"Predictions after each block against the dense model's final ones: {lens} lens "
        f"({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="KL divergence (nat)",
        width=width,
    )


def tokens(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    lens: str = LENSES[0],
    encoder: int = 0,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the probability of tokens of the text's own language and of one other, dense and pruned, by block."""
    shares = frame[(frame["metric"] == "token_share") & (frame["lens"] == lens)]
    dense, pruned = shares[shares["method"] == DENSE], of_recipe(shares, recipe)
    panels = []
    for language in labels.in_order(shares["language"].unique()):
        before = dense[dense["language"] == language]
        after = pruned[pruned["language"] == language]
        lines = []
        for kind in (language, leading(before, language)):
            name = labels.language_title(kind)
            of_kind, of_pruned = (rows[rows["other_language"] == kind] for rows in (before, after))
            lines.append(_banded(of_kind, f"{name}, dense", style.colour(kind)))
            lines.append(charts.range_line(of_pruned, "layer", f"{name}, pruned", style.colour(kind), "--"))
        panels.append(charts.Panel(f"text: {labels.language_title(language)}", lines))
    return charts.line_panels(
        panels,
        title=f"Languages of the tokens predicted after each block: {lens} lens ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="probability",
        width=width,
    )


def languages(
    frame: pd.DataFrame, *, lens: str = LENSES[0], encoder: int = 0, width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw the probability of tokens of every language by block of the dense model; a panel a language of the text."""
    shares = frame[(frame["metric"] == "token_share") & (frame["lens"] == lens) & (frame["method"] == DENSE)]
    named = labels.in_order(set(shares["other_language"].astype(str)) - {SHARED, UNSEEN})
    panels = []
    for language in labels.in_order(shares["language"].unique()):
        own = shares[shares["language"] == language]
        lines = [
            _banded(own[own["other_language"] == kind], f"{labels.language_title(kind)} tokens", style.colour(kind))
            for kind in named
        ]
        panels.append(charts.Panel(f"text: {labels.language_title(language)}", lines))
    return charts.line_panels(
        panels,
        title=f"Languages of the tokens predicted after each block: {lens} lens (dense)",
        x_label="layer",
        encoder=encoder,
        y_label="probability",
        width=width,
    )


def margins(
    frame: pd.DataFrame,
    recipe: Mapping[str, Any],
    *,
    task: str,
    lens: str = LENSES[0],
    encoder: int = 0,
    width: float = style.PAGE_WIDTH,
) -> Figure:
    """Draw the share of pairs whose right choice is ahead for good, by block, of the frame ``lens_margins``.

    A panel a category; means over languages. Bands: lowest to highest over calibration sets.
    """
    shown = of_recipe(frame, {"metric": "ahead", "task": task, "lens": lens})
    panels = []
    for category in labels.categories_of(shown):
        own = shown[shown["category"] == category]
        lines = []
        for rows, label, colour in (
            (own[own["method"] == DENSE], "dense", style.BLACK),
            (of_recipe(own, recipe), "pruned", style.TWO_COLOURS[0]),
        ):
            keys = ["calibration", "seed", "layer"]
            means = rows.groupby(keys, observed=True)["value"].mean().reset_index()
            lines.append(charts.range_line(means, "layer", label, colour))
        panels.append(charts.Panel(category, lines, y_range=(0.0, 1.02)))
    return charts.line_panels(
        panels,
        title=f"Pairs decided for good after each block, {task}: {lens} lens ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="share of pairs",
        width=width,
    )


def leading(shares: pd.DataFrame, language: str) -> str:
    """Return which other language's tokens have most probability in any block, of rows of one text and model."""
    others = shares[~shares["other_language"].isin([language, SHARED, UNSEEN])]
    highest = others.groupby(others["other_language"].astype(str))["value"].max()
    return str(highest.idxmax())


def _banded(rows: pd.DataFrame, label: str, colour: str) -> charts.Line:
    own = rows.sort_values("layer")
    low, high = (None if own[name].isna().all() else own[name].tolist() for name in ("low", "high"))
    return charts.Line(label, own["layer"].tolist(), own["value"].tolist(), colour, low=low, high=high)
