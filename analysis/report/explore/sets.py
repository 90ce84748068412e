"""Charts of calibration sets: their masks, what differs between them, and the neurons that they keep."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from ...frames import Frames, labels
from ...metrics.contrasts import OTHERS, OWN, SIGNIFICANT
from ...plots.style import GREY, TWO_COLOURS
from .chart import (
    CALIBRATION,
    EVERYTHING,
    LANGUAGE,
    LAYER,
    RECIPE,
    ROLE,
    SPREAD,
    Chart,
    filtered,
    matrix,
    of_metric,
    over_draws,
    pruned_rows,
    sets_of,
    specification,
    tooltip,
)

#: Metrics of the frame ``contrasts``, in words.
_CONTRASTS = {
    "log_perplexity": "log perplexity (nat)",
    "snr_db": "SNR after the last block (dB)",
    "specific_error_db": "error of the specific part (dB)",
    "agnostic_error_db": "error of the agnostic part (dB)",
    "specific_minus_agnostic_db": "specific minus agnostic error (dB)",
}


def masks(frames: Frames) -> Chart | None:
    frame = frames["mask_overlap"]
    rows = pruned_rows(frame[frame["metric"].isin(["iou", "code_agreement"])])
    if not len(rows):
        return None
    rows["other"] = rows["other_calibration"].astype(object)
    rows["both"] = rows[CALIBRATION] == rows["other"]
    turned = rows[~rows["both"]].rename(columns={CALIBRATION: "other", "other": CALIBRATION})
    both = pd.concat([rows, turned])[[RECIPE, CALIBRATION, "other", LAYER, ROLE, "value"]]
    filters = (RECIPE, LAYER, ROLE)
    data = over_draws(both, [*filters, CALIBRATION, "other"]).drop(columns=["low", "high"])
    data = data.rename(columns={"draws": "pairs"})
    order = sets_of(data)
    base = (
        filtered("masks", data, filters)
        .transform_aggregate(value="mean(value)", pairs="max(pairs)", groupby=[CALIBRATION, "other"])
        .encode(
            x=alt.X("other:N", title=None, sort=order, axis=alt.Axis(labelAngle=0, orient="top")),
            y=alt.Y(f"{CALIBRATION}:N", title=None, sort=order),
            tooltip=tooltip(
                (f"{CALIBRATION}:N", "calibrated on"), ("other:N", "and on"), ("value:Q", "overlap"),
                ("pairs:Q", "pairs of draws"),
            ),
        )
    )  # fmt: skip
    return Chart(
        "masks",
        "Mask overlap of every pair of calibration sets",
        "Intersection over union of the kept weights (of quantized models: share of equal codes), mean over the blocks "
        "and roles shown and over draws. Diagonal: two draws of one set, the ceiling.",
        "mask_overlap",
        data,
        filters,
        matrix(base, "value", "IoU", "tealblues", ".3f", len(order)),
    )


def contrasts(frames: Frames) -> Chart | None:
    rows = pruned_rows(frames["contrasts"])
    rows = rows[rows["df"].notna()]
    if not len(rows):
        return None
    rows["contrast"] = rows["calibration"].astype(object) + " − " + rows["other_calibration"].astype(object)
    own = rows["calibration"] == OWN
    rows.loc[own, "contrast"] = "own language − others, all languages"
    others = (rows["other_calibration"] == OTHERS) & ~own
    rows.loc[others, "contrast"] = "own language − others"
    rows["of"] = rows["metric"].astype(object).map(_CONTRASTS)
    found = rows["p_adjusted"] < SIGNIFICANT
    rows["verdict"] = np.where(found, "significant", "not significant")
    keep = [RECIPE, LANGUAGE, "of", "contrast", "value", "low", "high", "p_adjusted", "verdict", "n", "draws"]
    data = rows[keep].reset_index(drop=True)
    most = int(data.groupby([RECIPE, LANGUAGE, "of"], observed=True).size().max())
    base = (
        filtered("contrasts", data, (RECIPE,))
        .add_params(
            alt.param(name=f"{LANGUAGE}_", value=EVERYTHING),
            alt.param(
                name="of_",
                value=next(iter(_CONTRASTS.values())),
                bind=alt.binding_select(options=list(dict.fromkeys(data["of"])), name="difference in "),
            ),
        )
        .transform_filter("datum.of == of_")
        .transform_filter(f"datum.{LANGUAGE} == {LANGUAGE}_")
        .encode(
            y=alt.Y("contrast:N", title=None, sort=alt.EncodingSortField("value", order="ascending")),
            color=alt.Color(
                "verdict:N",
                title=None,
                scale=alt.Scale(domain=["significant", "not significant"], range=[TWO_COLOURS[1], GREY]),
            ),
            tooltip=tooltip(
                ("contrast:N", "sets"), (f"{LANGUAGE}:N", "language"), ("value:Q", "difference"), ("low:Q", "from"),
                ("high:Q", "to"), ("p_adjusted:Q", "p, corrected"), ("n:Q", "segments"), ("draws:Q", "draws"),
            ),
        )
    )  # fmt: skip
    spread = base.mark_rule().encode(x=alt.X("low:Q", title="first minus second"), x2="high:Q")
    point = base.mark_point(filled=True, size=45).encode(x=alt.X("value:Q", title="first minus second"))
    zero = alt.Chart(alt.InlineData([{"zero": 0}])).mark_rule(strokeDash=[3, 3], color=GREY).encode(x="zero:Q")
    return Chart(
        "contrasts",
        "Differences between calibration sets",
        "With 95 % intervals that hold over segments and draws together. Choose a language to compare sets in it; all "
        "languages together show what the evaluated language's own text brings.",
        "contrasts",
        data,
        (RECIPE, LANGUAGE),
        specification(zero + spread + point, height=min(max(15 * most, 80), 600)),
    )


def neurons(frames: Frames) -> Chart | None:
    rows = pruned_rows(of_metric(frames["neuron_selection"], "kept_share"))
    if not len(rows):
        return None
    filters = (RECIPE, CALIBRATION, LANGUAGE)
    data = over_draws(rows, filters)
    languages = labels.in_order(data[LANGUAGE].unique())
    base = filtered("neurons", data, filters).encode(
        x=alt.X(f"{LANGUAGE}:N", title="neurons of", sort=languages, axis=alt.Axis(labelAngle=0, orient="top")),
        y=alt.Y(f"{CALIBRATION}:N", title="calibrated on", sort=sets_of(data)),
        tooltip=tooltip(
            (f"{CALIBRATION}:N", "calibrated on"), (f"{LANGUAGE}:N", "neurons of"), ("value:Q", "share"), *SPREAD
        ),
    )
    return Chart(
        "neurons",
        "LAPE: language-specific neurons that are selected again",
        "Share of the dense model's, mean over draws.",
        "neuron_selection",
        data,
        filters,
        matrix(base, "value", "kept", "tealblues", ".2f", data[CALIBRATION].nunique()),
    )
