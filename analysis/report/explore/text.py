"""Charts of what was read: perplexity, signal, and the two parts of the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from probes import DENSE

from ...frames import Frames, labels
from ...plots.style import TWO_COLOURS
from .chart import (
    CALIBRATION,
    EVERYTHING,
    LANGUAGE,
    LAYER,
    RECIPE,
    ROLE,
    SPREAD,
    Chart,
    colours,
    filtered,
    matrix,
    of_metric,
    over_draws,
    pruned_rows,
    sets_of,
    specification,
    tooltip,
)

RESIDUAL = "residual"


def perplexity(frames: Frames) -> Chart | None:
    frame = frames["perplexity"]
    rows = pruned_rows(of_metric(frame, "perplexity"))
    if not len(rows):
        return None
    dense = of_metric(frame[frame["method"] == DENSE], "perplexity").set_index("language")["value"]
    filters = (RECIPE, CALIBRATION, LANGUAGE)
    data = over_draws(rows, filters)
    data["factor"] = data["value"] / data[LANGUAGE].map({str(k): v for k, v in dense.items()}).astype(float)
    data["doublings"] = np.log2(data["factor"])
    languages = labels.in_order(data[LANGUAGE].unique())
    chart = filtered("perplexity", data, filters)
    more = tooltip(
        (f"{CALIBRATION}:N", "calibrated on"), (f"{LANGUAGE}:N", "language"), ("value:Q", "perplexity"), *SPREAD,
        ("factor:Q", "× dense"),
    )  # fmt: skip
    base = chart.encode(
        x=alt.X(f"{LANGUAGE}:N", title="evaluated in", sort=languages, axis=alt.Axis(labelAngle=0, orient="top")),
        y=alt.Y(f"{CALIBRATION}:N", title="calibrated on", sort=sets_of(data)),
        tooltip=more,
    )
    return Chart(
        "perplexity",
        "Perplexity by calibration set and evaluation language",
        "Mean over draws. Colour: how often it has doubled relative to the dense model.",
        "perplexity",
        data,
        filters,
        matrix(base, "doublings", "log2 × dense", "oranges", ".3~s", data[CALIBRATION].nunique()),
    )


def _lines(chart: alt.Chart, names: Sequence[str], title: str, more: Any, scale: alt.Scale | None = None) -> Any:
    """Return one line for each calibration set over blocks, with its interval or range where one language is shown."""
    y = alt.Y("mean(value):Q", title=title, scale=scale or alt.Scale(zero=False))
    base = chart.encode(
        x=alt.X(f"{LAYER}:Q", title="block", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
        color=alt.Color(
            f"{CALIBRATION}:N",
            title="calibrated on",
            scale=colours(names),
            sort=list(names),
            legend=alt.Legend(symbolOpacity=1),
        ),
    )
    band = (
        base.transform_filter(f"{LANGUAGE}_ != '{EVERYTHING}'")
        .mark_area(opacity=0.15, tooltip=None)
        .encode(y=alt.Y("min(low):Q", title=title), y2="max(high):Q")
    )
    line = base.mark_line(point=alt.OverlayMarkDef(size=22)).encode(y=y, tooltip=more)
    return band + line


def signal(frames: Frames) -> Chart | None:
    rows = pruned_rows(of_metric(frames["signal"], "snr_db"))
    rows = rows[np.isfinite(rows["value"])]
    if not len(rows):
        return None
    filters = (RECIPE, CALIBRATION, LANGUAGE, ROLE)
    data = over_draws(rows, [*filters, LAYER])
    chart = filtered("signal", data, (RECIPE, CALIBRATION, LANGUAGE)).add_params(
        alt.param(name=f"{ROLE}_", value=EVERYTHING)
    )
    chart = chart.transform_filter(f"datum.{ROLE} == ({ROLE}_ == '{EVERYTHING}' ? '{RESIDUAL}' : {ROLE}_)")
    more = tooltip(
        (f"{CALIBRATION}:N", "calibrated on"), (f"{LAYER}:Q", "block"), (f"{ROLE}:N", "output of"),
        ("mean(value):Q", "SNR (dB)"), ("min(low):Q", "from"), ("max(high):Q", "to"), ("count():Q", "estimates"),
    )  # fmt: skip
    return Chart(
        "signal",
        "Signal-to-noise ratio by block",
        "Of the residual stream, or of the role that is chosen, relative to the dense model; mean over languages "
        "unless one is chosen. Higher is better; at 0 dB the error is as large as the signal.",
        "signal",
        data,
        filters,
        specification(_lines(chart, sets_of(data), "SNR (dB)", more), height=260),
    )


def subspaces(frames: Frames) -> Chart | None:
    named = pruned_rows(frames["subspaces"])
    parts = {"specific_error_centred": "language-specific", "agnostic_error_centred": "language-agnostic"}
    rows = named[named["metric"].isin(parts)].copy()
    if not len(rows):
        return None
    rows["part"] = rows["metric"].astype(object).map(parts)
    filters = (RECIPE, CALIBRATION, LANGUAGE)
    data = over_draws(rows, [*filters, LAYER, "part"])
    base = filtered("subspaces", data, filters).encode(
        x=alt.X(f"{LAYER}:Q", title="block", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
        color=alt.Color(
            "part:N",
            title="part",
            scale=alt.Scale(domain=list(parts.values()), range=list(TWO_COLOURS)),
            legend=alt.Legend(symbolOpacity=1),
        ),
    )
    scale = alt.Scale(type="log")
    title = "squared error / spread"
    band = base.mark_area(opacity=0.15, tooltip=None).encode(
        y=alt.Y("q1(value):Q", title=title, scale=scale), y2="q3(value):Q"
    )
    line = base.mark_line(point=alt.OverlayMarkDef(size=22)).encode(
        y=alt.Y("median(value):Q", title=title, scale=scale),
        tooltip=tooltip(
            ("part:N", "part"), (f"{LAYER}:Q", "block"), ("median(value):Q", "median error"),
            ("q1(value):Q", "lower quartile"), ("q3(value):Q", "upper quartile"), ("count():Q", "estimates"),
        ),
    )  # fmt: skip
    return Chart(
        "subspaces",
        "LSAR: error of the language-specific and the language-agnostic part by block",
        "Squared error of segment means relative to their spread. Median of the calibration sets and languages shown; "
        "band: quartiles.",
        "subspaces",
        data,
        filters,
        specification(band + line, height=260),
    )
