"""Mask overlap: do different calibration texts keep the same weights?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from pruning import ROLES, Anatomy, MaskSet, Variant
from pruning.anatomy import role_kind
from pruning.masks import Key, overlaps

from . import figures
from .frames import alike, of_recipe, tidy


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
    for group in alike({name: columns[name] for name in masks}):
        members = [masks[name] for name in group]
        both = overlaps(members)
        kept = [{key: member.kept(key) for key in both} for member in members]
        size = {key: shape[0] * shape[1] for key in both if (shape := members[0].shape(key))}
        for i, j in combinations(range(len(group)), 2):
            a, b = columns[group[i]], columns[group[j]]
            iou, chance = [], []
            for key, shared in both.items():
                either = kept[i][key] + kept[j][key] - int(shared[i, j])
                iou.append(int(shared[i, j]) / either if either else 1.0)
                chance.append(_chance(kept[i][key] / size[key], kept[j][key] / size[key]))
            rows.append(
                {
                    **a,
                    "layer": [layer for layer, _ in both] * 2,
                    "role": [role for _, role in both] * 2,
                    "other_calibration": b["calibration"],
                    "other_seed": b["seed"],
                    "metric": ["iou"] * len(both) + ["iou_chance"] * len(both),
                    "value": [*iou, *chance],
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
    return one * other / (one + other - one * other) if one or other else 1.0


def agreement(variants: Sequence[Variant], dense: Anatomy) -> pd.DataFrame:
    """Return the rows of ``mask_overlap`` on how alike the values are that corrected weights came to.

    Parameters
    ----------
    variants
        Pairs that differ in calibration set or seed only, and have corrected weights, are compared.
    dense
        The dense model: a correction is the difference from it.
    """
    rows = []
    for group in alike({variant.id: variant.columns() for variant in variants if variant.values}):
        members = [variant for variant in variants if variant.id in group]
        cosines: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        for key in members[0].masks:
            before = dense.weight(*key).float()
            weights = torch.stack([member.weight(key, before).flatten() for member in members])
            kept = torch.stack([member.masks[key].flatten() for member in members]).float()
            corrections = (weights - before.flatten()) * kept
            cosines[key] = _cosines(weights, kept), _cosines(corrections, kept)
        for i, j in combinations(range(len(members)), 2):
            other = members[j].columns()
            for which, metric in enumerate(("value_cosine", "correction_cosine")):
                rows.append(
                    {
                        **members[i].columns(),
                        "layer": [layer for layer, _ in cosines],
                        "role": [role for _, role in cosines],
                        "other_calibration": other["calibration"],
                        "other_seed": other["seed"],
                        "metric": [metric] * len(cosines),
                        "value": [float(pair[which][i, j]) for pair in cosines.values()],
                    }
                )
    return tidy("mask_overlap", rows)


def _cosines(
    values: Float[Tensor, "variants weights"], kept: Float[Tensor, "variants weights"]
) -> Float[np.ndarray, "variants variants"]:
    """Return the cosine of every pair of rows (zero where not kept), each over the places that both keep."""
    squares = (values.square() @ kept.T).double()  # [i, j]: of i's values, where j keeps too
    dots = (values @ values.T).double()
    return (dots / (squares * squares.T).sqrt().clamp(min=1e-30)).cpu().numpy()


def mean_matrix(frame: pd.DataFrame, metric: str = "iou") -> pd.DataFrame:
    """Return the mean of a metric over layers and roles, for every pair of the calibration sets of one recipe.

    Symmetric, with an empty diagonal; rows and columns are called as figures call sets.
    """
    shown = frame[frame["metric"] == metric]
    keys = ["calibration", "seed", "other_calibration", "other_seed"]
    mean = shown.groupby(keys, observed=True)["value"].mean()
    sets: list[tuple[str, int]] = []
    for (a, sa, b, sb), _ in mean.items():
        sets += [s for s in ((a, sa), (b, sb)) if s not in sets]
    sets.sort(key=lambda s: (figures.calibration_rank(s[0]), s[1]))
    labels = [figures.set_label(name, seed) for name, seed in sets]
    matrix = pd.DataFrame(np.nan, index=labels, columns=labels)
    for (a, sa, b, sb), value in mean.items():
        first, second = figures.set_label(a, sa), figures.set_label(b, sb)
        matrix.loc[first, second] = matrix.loc[second, first] = value
    return matrix


def cluster(matrix: pd.DataFrame) -> NDArray[np.float64]:
    """Cluster calibration sets by mask distance, 1 − mean IoU: scipy's average linkage.

    Parameters
    ----------
    matrix
        As from :func:`mean_matrix`.
    """
    distance = 1 - matrix.to_numpy(copy=True)
    np.fill_diagonal(distance, 0)
    tree: NDArray[np.float64] = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return tree


def plot(frame: pd.DataFrame, recipe: Mapping[str, Any], width: float = figures.PAGE_WIDTH) -> Figure:
    """Draw the mean IoU of every pair of calibration sets, clustered by it."""
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == "iou_chance", "value"].mean())
    matrix = mean_matrix(shown)
    title = f"Overlap of the kept weights (chance {chance:.3f}; {figures.recipe_label(recipe)})"
    return figures.clusters(matrix, cluster(matrix), title=title, width=width)


def plot_roles(
    frame: pd.DataFrame, recipe: Mapping[str, Any], metric: str = "iou", width: float = figures.PAGE_WIDTH
) -> Figure:
    """Draw IoU, or the cosine of the values, by layer for every role, with chance level and ceiling."""
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == "iou_chance", "value"].mean())
    shown = shown[shown["metric"] == metric].copy()
    shown["role"] = shown["role"].astype(str).map(role_kind)  # one panel for all experts
    same = (shown["calibration"].astype(str) == shown["other_calibration"].astype(str)).to_numpy()
    blue, red = figures.TWO_COLOURS
    panels = []
    for role in (role for role in ROLES if role in set(shown["role"])):
        here = (shown["role"] == role).to_numpy()
        lines = [figures.range_line(shown[here & ~same], "layer", "other calibration set (band: all pairs)", blue)]
        if same.any():
            ceiling = shown[here & same]
            lines.append(figures.range_line(ceiling, "layer", "same language, other seed (ceiling)", red))
        levels = {"independent masks (chance)": chance} if metric == "iou" else {"unrelated": 0.0}
        panels.append(figures.Panel(role, lines, levels))
    names = {
        "iou": ("IoU", "Overlap of the kept weights by layer and role"),
        "value_cosine": ("cosine", "Agreement of the values of the weights that both keep"),
        "correction_cosine": ("cosine", "Agreement of the corrections to the weights that both keep"),
    }
    label, title = names[metric]
    title = f"{title} ({figures.recipe_label(recipe)})"
    return figures.line_panels(panels, title=title, x_label="layer", y_label=label, width=width)
