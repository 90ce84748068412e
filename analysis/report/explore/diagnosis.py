"""The chart of what components recover when they are restored."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from probes.patching import RESTORE

from ...metrics.halves import EVERY
from ...metrics.recovery_frame import main_metric
from .chart import LAYER, Chart, specification, tooltip

_STREAM = {
    "residual": "whole stream",
    "agnostic": "language-agnostic part",
    "specific": "language-specific part",
    "random": "random subspaces",
}
_AT_TOKENS = {
    "residual_differing": "words in which the pair differs",
    "residual_last": "last token, and those of the choice",
    "residual_elsewhere": "other tokens",
}
_OF_ROLES = {"output": "outputs", "weights": "weights", "head": "heads"}


def recovery(diagnoses: Mapping[str, tuple[str, pd.DataFrame]]) -> Chart | None:
    """Return the chart; nothing without diagnoses.

    Parameters
    ----------
    diagnoses
        Heading of each diagnosis to its name and its frame ``recovery``.
    """
    parts = [_rows(heading, frame) for heading, (_, frame) in diagnoses.items()]
    data = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if not len(data):
        return None
    headings, kinds = list(dict.fromkeys(data["diagnosis"])), list(dict.fromkeys(data["kind"]))
    chart = alt.Chart(alt.NamedData(name="recovery")).add_params(
        alt.param(name="diagnosis_", value=headings[0], bind=alt.binding_select(options=headings, name="diagnosis: ")),
        alt.param(name="kind_", value=kinds[0], bind=alt.binding_select(options=kinds, name="restored: ")),
    )
    base = (
        chart.transform_filter("datum.diagnosis == diagnosis_")
        .transform_filter("datum.kind == kind_")
        .encode(
            x=alt.X(f"{LAYER}:Q", title="block", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
            color=alt.Color("component:N", title=None, legend=alt.Legend(symbolOpacity=1)),
        )
    )
    whole = base.transform_filter(f"datum.component != '{_STREAM['random']}'")
    few = base.transform_filter(f"datum.component == '{_STREAM['random']}'")  # patched after a few blocks only
    y = alt.Y("value:Q", title="recovered")
    more = tooltip(
        ("component:N", "restored"), (f"{LAYER}:Q", "block"), ("value:Q", "recovered"), ("low:Q", "from"),
        ("high:Q", "to"), ("unit:N", "unit"), ("how:N", "how"),
    )  # fmt: skip
    band = whole.mark_area(opacity=0.15, tooltip=None).encode(y=alt.Y("low:Q", title="recovered"), y2="high:Q")
    line = whole.mark_line(point=alt.OverlayMarkDef(size=22)).encode(y=y, tooltip=more)
    bars = few.mark_rule().encode(y=alt.Y("low:Q", title="recovered"), y2="high:Q")
    points = few.mark_point(filled=True, size=30).encode(y=y, tooltip=more)
    return Chart(
        "recovery",
        "What restoring a component recovers",
        "On all questions: as a share of the drop, or in nats where the drop is not significant. Parts of the stream "
        "are patched exactly (bands: 95 % interval; of random subspaces: the range of the draws), single roles are "
        "estimated from gradients, which rank well and exaggerate.",
        "recovery",
        data,
        (),
        specification(band + line + bars + points, height=260),
    )


def _rows(heading: str, frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[(frame["direction"] == RESTORE) & (frame["estimated_on"].astype(str) == EVERY)]
    rows = rows[rows["layer"].notna()].astype({"component": object, "metric": object, "role": object})
    shares = rows["metric"].eq("attributed_recovery").any()
    what = "recovery" if shares else "restored"
    stream = rows[rows["component"].isin(_STREAM) & (rows["metric"] == main_metric(frame, what))]
    stream = stream.assign(
        kind="parts of the stream", component=stream["component"].map(_STREAM), how="patched exactly"
    )
    tokens = rows[rows["component"].isin(_AT_TOKENS) & (rows["metric"] == main_metric(frame, what))]
    tokens = tokens.assign(
        kind="stream at some tokens", component=tokens["component"].map(_AT_TOKENS), how="patched exactly"
    )
    single = rows[rows["component"].isin(_OF_ROLES) & rows["role"].notna() & (rows["metric"] == f"attributed_{what}")]
    single = single.assign(
        kind=single["component"].map(_OF_ROLES), component=single["role"], how="estimated from gradients"
    )
    shown = pd.concat([stream, tokens, single])
    shown = shown.assign(
        diagnosis=heading, unit="share of the drop" if shares else "nats", block=shown["layer"].astype(int)
    )
    return shown[["diagnosis", "kind", "component", LAYER, "value", "low", "high", "unit", "how"]]
