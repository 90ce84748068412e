"""Figures of mask overlap, and of the agreement of codes."""

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
from ..metrics.mask_overlap import cluster, draws_share, mean_matrix, set_matrix
from . import charts, style

#: What the similarities are called: on an axis, in a title, and the measure that clusters go by.
_NAMES = {
    "iou": ("IoU", "Overlap of kept weights", "mask distance\n(1 − IoU)"),
    "code_agreement": ("share of equal codes", "Agreement of codes", "distance\n(1 − share)"),
    "value_cosine": ("cosine similarity", "Similarity of the weights that both keep", ""),
    "correction_cosine": ("cosine similarity", "Similarity of the updates to weights that both keep", ""),
}


def heatmap(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, metric: str = "iou", width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw the mean IoU, or share of equal codes, of every pair of calibration sets, in the order of a clustering.

    On the diagonal stands that of two draws of one set, if there are any.
    """
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == f"{metric}_chance", "value"].mean())
    matrix = set_matrix(shown, metric)
    if len(matrix) < 2:  # one set: its draws are compared
        matrix = mean_matrix(shown, metric)
    label, title, distance = _NAMES[metric]
    title = f"{title} (chance {chance:.3f}; {labels.recipe_label(recipe)})"
    return _clusters(matrix, cluster(matrix), title=title, label=f"mean {label}", distance=distance, width=width)


def roles(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, metric: str = "iou", width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw a similarity of variants by layer for every role, with chance level and ceiling."""
    shown = of_recipe(frame, recipe)
    chance = float(shown.loc[shown["metric"] == f"{metric}_chance", "value"].mean())
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
        independent = "masks" if metric == "iou" else "codes"
        levels = {"unrelated": 0.0} if metric.endswith("cosine") else {f"chance (independent {independent})": chance}
        panels.append(charts.Panel(role, lines, levels))
    label, title, _ = _NAMES[metric]
    by = "" if metric.endswith("cosine") else " by layer and role"
    title = f"{title}{by} ({labels.recipe_label(recipe)})"
    encoder = labels.encoder_blocks(frame)
    return charts.line_panels(panels, title=title, x_label="layer", y_label=label, encoder=encoder, width=width)


def _clusters(
    matrix: pd.DataFrame, tree: NDArray[np.float64], *, title: str, label: str, distance: str, width: float
) -> Figure:
    """Draw a matrix of similarities and the tree that clusters them, in the tree's order.

    Parameters
    ----------
    matrix
        Symmetric.
    tree
        As :func:`scipy.cluster.hierarchy.linkage` returns it.
    title, label, distance, width
        What to write above, at the colours, and at the tree; inches.
    """
    order = leaves_list(tree)
    matrix = matrix.iloc[order, order]
    text = matrix.map(lambda v: "" if pd.isna(v) else f"{v:.3f}")
    with mpl.rc_context(style.STYLE):
        figure = Figure(figsize=(width, style.points(0.9 + 0.26 * len(matrix))), layout="constrained")
        heat, branches = figure.subplots(1, 2, width_ratios=[2.6, 1])
        sns.heatmap(
            matrix,
            ax=heat,
            annot=text.to_numpy(),
            fmt="",
            cmap="cividis",
            annot_kws={"size": style.points(6 if width >= style.PAGE_WIDTH and len(matrix) <= 10 else 4.5)},
            linewidths=0.5,
            linecolor="white",
            cbar_kws={"label": label, "fraction": 0.04, "pad": 0.02},
        )
        draws = "" if np.isnan(np.diag(matrix)).all() else "; diagonal: two draws of the set"
        heat.set(xlabel="", ylabel="", title=style.panel_title(f"mean over layers and roles{draws}", width / 1.6))
        heat.tick_params(length=0)
        heat.tick_params(axis="x", rotation=30)
        heat.tick_params(axis="y", rotation=0)
        if tree[-1, 2] > 0:
            dendrogram(
                tree,
                ax=branches,
                orientation="right",
                labels=list(matrix.index[np.argsort(order)]),
                link_color_func=lambda node: "#444444",
                leaf_font_size=style.points(6),
            )
            branches.invert_yaxis()  # in the order of the table's rows
            branches.set(
                xlabel=style.panel_title(distance, width / 4), title=style.panel_title("average linkage", width / 4)
            )
            branches.tick_params(axis="y", length=0)
            branches.spines["left"].set_visible(False)
        else:  # all are the same, as where only what follows a mask sees the text
            branches.set_axis_off()
        figure.suptitle(style.wrapped(title, width))
    return figure
