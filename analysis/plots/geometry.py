"""Figures of the geometry of states: whether what tells languages apart was rotated or lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE

from ..frames import labels, of_recipe
from . import charts, style


def layers(
    frame: pd.DataFrame, recipe: Mapping[str, Any], *, encoder: int = 0, width: float = style.PAGE_WIDTH
) -> Figure:
    """Draw overlap of subspaces, what a probe finds in each part, and CKA, by layer.

    Means over languages and calibration sets; bands: lowest to highest over calibration sets.
    """
    whole = frame[frame["layer"].notna()]
    pruned, dense = of_recipe(whole, recipe), whole[whole["method"] == DENSE]
    blue, orange = style.TWO_COLOURS
    chance = dense.loc[dense["metric"] == "overlap_chance", "value"]
    guess = 1 / max(frame["language"].nunique(), 1)

    def line(rows: pd.DataFrame, metric: str, label: str, colour: str, dash: str = "-") -> charts.Line:
        own = rows[rows["metric"] == metric]
        if metric != "cka":
            own = own[own["language"].isna()]
        means = own.groupby(["calibration", "seed", "layer"], observed=True)["value"].mean().reset_index()
        return charts.range_line(means, "layer", label, colour, dash)

    panels = [
        charts.Panel(
            "overlap of subspaces",
            [
                line(pruned, "subspace_overlap", "pruned with dense", blue),
                line(pruned, "self_overlap", "pruned with itself (ceiling)", blue, ":"),
                line(dense, "self_overlap", "dense", style.BLACK),
            ],
            {"chance": float(chance.iloc[0])} if len(chance) else {},
            y_range=(0.0, 1.02),
        )
    ]
    for part, title in (("specific", "language found inside"), ("agnostic", "language found outside")):
        lines = [
            line(pruned, f"own_{part}_decoding", "pruned, its own subspace", blue),
            line(pruned, f"dense_{part}_decoding", "pruned, dense subspace", orange, "--"),
            line(dense, f"own_{part}_decoding", "dense", style.BLACK),
        ]
        if part == "specific":
            lines.insert(2, line(pruned, "transferred_decoding", "pruned, dense subspace and probe", orange, ":"))
        panels.append(charts.Panel(title, lines, {"chance": guess}, y_range=(0.0, 1.02)))
    similar = [line(pruned, "cka", "pruned with dense", blue)]
    panels.append(charts.Panel("linear CKA", similar, y_range=(0.0, 1.02)))
    return charts.line_panels(
        [panel for panel in panels if any(len(line.x) for line in panel.lines)],
        title=f"Rotated or lost? ({labels.recipe_label(recipe)})",
        x_label="layer",
        encoder=encoder,
        y_label="share",
        width=width,
        share=False,
    )
