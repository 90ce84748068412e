"""Mask overlap: do different calibration texts keep the same weights?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pruning import MaskSet
from pruning.anatomy import role_kind
from pruning.recipes import UNCALIBRATED

from . import figures
from .frames import of_recipe, tidy

_SAME_RECIPE = ("model", "method", "sparsity", "pattern", "allocation", "scope", "propagation")


def analyze(masks: Mapping[str, MaskSet], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``mask_overlap`` for every pair of variants that differ in calibration set or seed only.

    Parameters
    ----------
    masks
        Variant to its masks.
    columns
        Variant to the columns that describe it.
    """
    rows = []
    for one, other in combinations(masks, 2):
        a, b = columns[one], columns[other]
        if any(a[name] != b[name] for name in _SAME_RECIPE) or a["calibration"] == UNCALIBRATED:
            continue
        iou = masks[one].iou(masks[other])
        chance = [_chance(1 - masks[one].sparsity(key), 1 - masks[other].sparsity(key)) for key in iou]
        rows.append(
            {
                **a,
                "layer": [layer for layer, _ in iou] * 2,
                "role": [role for _, role in iou] * 2,
                "other_calibration": b["calibration"],
                "other_seed": b["seed"],
                "metric": ["iou"] * len(iou) + ["iou_chance"] * len(iou),
                "value": [*iou.values(), *chance],
            }
        )
    return tidy("mask_overlap", rows)


def sparsity(masks: Mapping[str, MaskSet], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``sparsity``: the share of weights that each variant removed of each projection."""
    rows = [
        {
            **columns[variant],
            "layer": [layer for layer, _ in kept],
            "role": [role for _, role in kept],
            "metric": ["sparsity"] * len(kept),
            "value": [kept.sparsity(key) for key in kept],
        }
        for variant, kept in masks.items()
    ]
    return tidy("sparsity", rows)


def _chance(one: float, other: float) -> float:
    """Return the IoU expected of independent random masks that keep these shares."""
    return one * other / (one + other - one * other)


def plot(frame: pd.DataFrame, recipe: Mapping[str, Any]) -> Figure:
    """Draw the mean IoU of every pair of calibration sets, and IoU by layer and role with chance level and ceiling."""
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == "iou_chance", "value"].mean())
    shown = shown[shown["metric"] == "iou"].copy()
    shown["role"] = shown["role"].astype(str).map(role_kind)  # one panel for all experts
    mean = shown.groupby(["calibration", "seed", "other_calibration", "other_seed"], observed=True)["value"].mean()
    sets: list[tuple[str, int]] = []
    for (a, sa, b, sb), _ in mean.items():
        sets += [s for s in ((a, sa), (b, sb)) if s not in sets]
    sets.sort(key=lambda s: (figures.calibration_rank(s[0]), s[1]))
    labels = [figures.set_label(name, seed) for name, seed in sets]
    matrix = pd.DataFrame(np.nan, index=labels, columns=labels)
    for (a, sa, b, sb), value in mean.items():
        first, second = figures.set_label(a, sa), figures.set_label(b, sb)
        matrix.loc[first, second] = matrix.loc[second, first] = value
    same = (shown["calibration"].astype(str) == shown["other_calibration"].astype(str)).to_numpy()
    return figures.overlap(
        matrix,
        languages=shown[~same],
        seeds=shown[same],
        chance=chance,
        title=f"Overlap of the kept weights ({figures.recipe_label(recipe)})",
    )
