"""Figures of mask overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, leaves_list

from pruning import ROLES
from pruning.models.anatomy import role_kind

from ..frames import labels, of_recipe
from ..metrics.mask_overlap import cluster, draws_share, mean_matrix
from . import charts, style


def heatmap(frame: pd.DataFrame, recipe: Mapping[str, Any], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the mean IoU of every pair of calibration sets, in the order of their clustering."""
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == "iou_chance", "value"].mean())
    matrix = mean_matrix(shown)
    title = f"Overlap of kept weights (chance {chance:.3f}; {labels.recipe_label(recipe)})"
    return _clusters(matrix, cluster(matrix), title=title, width=width)


def roles(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, metric: str = "iou", width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw IoU, or a cosine similarity of weights, by layer for every role, with chance level and ceiling."""
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == "iou_chance", "value"].mean())
    shown = shown[shown["metric"] == metric].copy()
    shown["role"] = shown["role"].astype(str).map(role_kind)  # one panel for all experts
    same = (shown["calibration"].astype(str) == shown["other_calibration"].astype(str)).to_numpy()
    common = draws_share(shown)
    shared = f"; up to {common:.0%} of the text shared" if common else ""
    blue, red = style.TWO_COLOURS
    panels = []
    for role in (role for role in ROLES if role in set(shown["role"])):
        here = (shown["role"] == role).to_numpy()
        lines = [charts.range_line(shown[here & ~same], "layer", "different sets (band: range over pairs)", blue)]
        if same.any():
            ceiling = shown[here & same]
            lines.append(charts.range_line(ceiling, "layer", f"same set, other seed (ceiling{shared})", red))
        levels = {"chance (independent masks)": chance} if metric == "iou" else {"unrelated": 0.0}
        panels.append(charts.Panel(role, lines, levels))
    names = {
        "iou": ("IoU", "Overlap of kept weights by layer and role"),
        "value_cosine": ("cosine similarity", "Similarity of the weights that both keep"),
        "correction_cosine": ("cosine similarity", "Similarity of the updates to weights that both keep"),
    }
    label, title = names[metric]
    title = f"{title} ({labels.recipe_label(recipe)})"
    return charts.line_panels(panels, title=title, x_label="layer", y_label=label, width=width)


def _clusters(matrix: pd.DataFrame, tree: NDArray[np.float64], *, title: str, width: float) -> Figure:
    """Draw a matrix of similarities and the tree that clusters them, in the tree's order.

    Parameters
    ----------
    matrix
        Symmetric, with an empty diagonal.
    tree
        As :func:`scipy.cluster.hierarchy.linkage` returns it.
    title, width
        What to write above; inches.
    """
    order = leaves_list(tree)
    matrix = matrix.iloc[order, order]
    text = matrix.map(lambda v: "" if pd.isna(v) else f"{v:.3f}")
    with mpl.rc_context(style.STYLE):
        figure = Figure(figsize=(width, 0.9 + 0.26 * len(matrix)), layout="constrained")
        heat, branches = figure.subplots(1, 2, width_ratios=[2.6, 1])
        sns.heatmap(
            matrix,
            ax=heat,
            annot=text.to_numpy(),
            fmt="",
            cmap="cividis",
            annot_kws={"size": 6 if width >= style.PAGE_WIDTH and len(matrix) <= 10 else 4.5},
            linewidths=0.5,
            linecolor="white",
            cbar_kws={"label": "mean IoU", "fraction": 0.04, "pad": 0.02},
        )
        heat.set(xlabel="", ylabel="", title="mean over layers and roles")
        heat.tick_params(length=0)
        heat.tick_params(axis="x", rotation=30)
        heat.tick_params(axis="y", rotation=0)
        dendrogram(
            tree,
            ax=branches,
            orientation="right",
            labels=list(matrix.index[np.argsort(order)]),
            link_color_func=lambda node: "#444444",
            leaf_font_size=6,
        )
        branches.invert_yaxis()  # in the order of the table's rows
        branches.set(xlabel="mask distance\n(1 − IoU)", title="average linkage")
        branches.tick_params(axis="y", length=0)
        branches.spines["left"].set_visible(False)
        figure.suptitle(style.wrapped(title, width))
    return figure
