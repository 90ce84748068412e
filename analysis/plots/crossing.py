"""The figure of states that are put from one language into questions of another."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from probes import DENSE
from pruning.text.languages import language_name

from ..frames import labels
from . import charts, style


def crossing(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw how far the margin moves to that of the twin, by block and language of the states: dense beside pruned.

    As a share of the way in models in which that is significant, else in nats. Dashed: states of unrelated items.

    Parameters
    ----------
    frame
        The frame ``crossing`` of one diagnosis.
    width
        In inches.
    """
    frame = frame.astype(dict.fromkeys(("method", "source_language", "metric"), object))
    shares = all((own["metric"] == "twin_share").any() for _, own in frame.groupby("method"))
    what = "share" if shares else "moved"
    panels = []
    for dense in (True, False):
        rows = frame[(frame["method"] == DENSE) == dense]
        lines = []
        for source in labels.in_order(rows["source_language"].unique()):
            for draw, dash in (("twin", "-"), ("control", "--")):
                own = rows[(rows["source_language"] == source) & (rows["metric"] == f"{draw}_{what}")]
                own = own.sort_values("layer")
                x, y, low, high = (own[name].tolist() for name in ("layer", "value", "low", "high"))
                name = language_name(str(source)) if draw == "twin" else f"{language_name(str(source))}, unrelated item"
                band = (low, high) if draw == "twin" else (None, None)
                lines.append(charts.Line(name, x, y, style.colour(str(source)), dash, *band))
        levels = {"as good as no answer": 0.5, "the twin's answer": 1.0} if shares else {}
        panels.append(charts.Panel("dense" if dense else "pruned", lines, levels))
    first = frame.iloc[0]
    asked = f"{labels.category_label(str(first['category']))}, {language_name(str(first['language']))}"
    return charts.line_panels(
        panels,
        title=f"Margins with states of twins asked in other languages ({asked})",
        x_label="after block",
        y_label="share of the way" if shares else "moved (nats)",
        width=width,
    )
