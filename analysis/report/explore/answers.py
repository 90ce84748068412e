"""The chart of what is answered worse."""

from __future__ import annotations

import altair as alt
import numpy as np

from ...frames import ALL, Frames
from .chart import (
    CALIBRATION,
    EVERYTHING,
    LANGUAGE,
    RECIPE,
    SPREAD,
    Chart,
    colours,
    filtered,
    over_draws,
    pruned_rows,
    sets_of,
    specification,
    tooltip,
)


def accuracy(frames: Frames) -> Chart | None:
    rows = pruned_rows(frames["accuracy"])
    rows = rows[(rows["part"] == ALL) & rows["metric"].isin(["twin_accuracy_change", "accuracy_change"])]
    if not len(rows):
        return None
    paired = set(rows.loc[rows["metric"] == "twin_accuracy_change", "task"])
    rows = rows[(rows["metric"] == "twin_accuracy_change") | ~rows["task"].isin(paired)].copy()
    rows["task"], rows["category"] = rows["task"].astype(object), rows["category"].astype(object).fillna("")
    rows["asked"] = (rows["task"] + " · " + rows["category"]).str.removesuffix(" · ")
    rows["able"] = np.where(rows["at_chance"].astype(bool), "dense model at chance", "dense model above chance")
    filters = (RECIPE, CALIBRATION)
    data = over_draws(rows, [*filters, LANGUAGE, "asked", "able"])
    for name in ("value", "low", "high"):
        data[name] *= 100
    names = sets_of(data)
    base = (
        filtered("accuracy", data, filters)
        .add_params(alt.param(name=f"{LANGUAGE}_", value=EVERYTHING))
        .transform_filter(f"datum.{LANGUAGE} == {LANGUAGE}_")
        .encode(
            y=alt.Y("asked:N", title=None),
            yOffset=alt.YOffset(f"{CALIBRATION}:N", sort=names),
            color=alt.Color(f"{CALIBRATION}:N", title="calibrated on", scale=colours(names), sort=names),
            tooltip=tooltip(
                ("asked:N", "asked"), (f"{CALIBRATION}:N", "calibrated on"), (f"{LANGUAGE}:N", "language"),
                ("value:Q", "change (points)"), *SPREAD, ("able:N", " "),
            ),
        )
    )  # fmt: skip
    spread = base.mark_rule().encode(x=alt.X("low:Q", title="change in accuracy (points)"), x2="high:Q")
    point = base.mark_point(filled=True, size=45).encode(
        x=alt.X("value:Q", title="change in accuracy (points)"),
        opacity=alt.condition("datum.able == 'dense model above chance'", alt.value(1), alt.value(0.25)),
    )
    height = 16 * len(names) * data["asked"].nunique()
    return Chart(
        "accuracy",
        "What is answered worse",
        "Change in accuracy (of minimal pairs where there are any) from the dense model, all languages together unless "
        "one is chosen. Lines: 95 % interval over items, or the range of draws. Pale: the dense model is at chance, so "
        "nothing can be lost.",
        "accuracy",
        data,
        (*filters, LANGUAGE),
        specification(spread + point, height=min(max(height, 80), 600)),
    )
