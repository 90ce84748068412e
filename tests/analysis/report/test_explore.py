"""Charts that can be filtered: their data are the frames', and what is embedded cannot leave its element."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis.frames import STUDY_FRAMES, dense_columns, tidy
from analysis.report import explore
from analysis.report.explore import EVERYTHING, charts, columns_of, menus
from analysis.report.page import _embedded

LANGUAGES = ("en", "sw")
PLACE = {"model": "m", "sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all", "bits": 9.0}
WANDA = PLACE | {"method": "wanda", "propagation": "pruned"}
HOSTILE = "</script><img src=x onerror=alert(1)>"


def draws(**sets):
    return [WANDA | {"calibration": name, "seed": seed} for name, number in sets.items() for seed in range(number)]


def number(*what) -> float:
    """A number that depends on everything."""
    return float(np.random.default_rng(list(repr(what).encode())).uniform(1, 9))


def frames_of(variants) -> dict[str, pd.DataFrame]:
    models = [dense_columns("m"), *variants]
    estimate = {"low": 0.5, "high": 20.0, "n": 8}
    perplexity = [
        {**model, "language": language, "metric": "perplexity", "value": number(model, language), **estimate}
        for model, language in itertools.product(models, LANGUAGES)
    ]
    signal = [
        {**model, "language": language, "layer": layer, "role": role, "metric": "snr_db", **estimate}
        | {"value": number(model, language, layer, role)}
        for model, language, layer, role in itertools.product(variants, LANGUAGES, range(3), ("q", "residual"))
    ]
    overlap = [
        {**one, "other_calibration": other["calibration"], "other_seed": other["seed"], "shared_text": 0.0}
        | {"layer": layer, "role": "q", "metric": "iou", "value": number(one, other, layer) / 10}
        for one, other in itertools.combinations(variants, 2)
        for layer in range(3)
    ]
    made = {"perplexity": perplexity, "signal": signal, "mask_overlap": overlap}
    return {name: tidy(name, made.get(name, [])) for name in STUDY_FRAMES}


@pytest.fixture(scope="module")
def variants():
    return draws(en=2, sw=1, all=1)


@pytest.fixture(scope="module")
def shown(variants):
    return {chart.name: chart for chart in charts(frames_of(variants))}


def test_only_charts_with_data_are_shown(shown):
    assert list(shown) == ["perplexity", "signal", "masks"]


def test_several_draws_become_a_mean_with_their_range(shown, variants):
    data = shown["perplexity"].data.set_index(["calibration", "language"])
    values = [number(variant, "sw") for variant in variants if variant["calibration"] == "en"]
    row = data.loc[("en", "sw")]
    assert row["value"] == pytest.approx(sum(values) / 2)
    assert (row["low"], row["high"], row["draws"]) == (min(values), max(values), 2)
    assert row["factor"] == pytest.approx(row["value"] / number(dense_columns("m"), "sw"))


def test_a_single_draw_keeps_its_interval(shown):
    row = shown["perplexity"].data.set_index(["calibration", "language"]).loc[("sw", "sw")]
    assert (row["low"], row["high"], row["draws"]) == (0.5, 20.0, 1)


def test_masks_are_symmetric_and_have_the_ceiling_on_the_diagonal(shown, variants):
    data = shown["masks"].data.set_index(["calibration", "other", "block"])
    pairs = [
        number(one, other, 1) / 10
        for one, other in itertools.combinations(variants, 2)
        if {one["calibration"], other["calibration"]} == {"en", "sw"}
    ]
    assert data.loc[("en", "sw", 1), "value"] == pytest.approx(sum(pairs) / len(pairs))
    assert data.loc[("sw", "en", 1), "value"] == data.loc[("en", "sw", 1), "value"]
    both = [variant for variant in variants if variant["calibration"] == "en"]
    assert data.loc[("en", "en", 1), "value"] == pytest.approx(number(*both, 1) / 10)


def test_menus_offer_what_there_is_and_a_set_named_all_is_not_everything(shown):
    offered = menus(list(shown.values()))
    assert offered["recipe"] == ["Wanda, sparsity 0.5, per row"]
    assert offered["calibration"] == [EVERYTHING, "en", "sw", "all"]
    assert offered["language"] == [EVERYTHING, "en", "sw"]
    assert offered["block"] == [EVERYTHING, "0", "1", "2"]
    assert offered["role"] == [EVERYTHING, "q", "residual"]


def test_data_decode_to_what_they_were(shown):
    data = shown["signal"].data
    columns = json.loads(json.dumps(columns_of(data)))
    for name, column in columns.items():
        if isinstance(column, dict):
            assert [column["names"][code] for code in column["codes"]] == data[name].tolist()
        else:
            assert column == pytest.approx(data[name].tolist(), rel=1e-3)


def test_what_is_not_finite_is_nothing():
    assert columns_of(pd.DataFrame({"value": [math.nan, math.inf, 1234.5678]})) == {"value": [None, None, 1235]}


def test_names_cannot_end_the_element_that_they_stand_in():
    made = list(charts(frames_of([WANDA | {"method": HOSTILE, "calibration": HOSTILE, "seed": 0}])))
    embedded = str(_embedded(made))
    assert "<" not in embedded
    assert json.loads(embedded)["perplexity"]["columns"]["calibration"]["names"] == [HOSTILE]


def test_what_is_too_large_for_a_page_is_left_out_and_said(monkeypatch, variants):
    monkeypatch.setattr(explore, "MOST_ROWS", 30)
    shown = {chart.name: chart for chart in charts(frames_of(variants))}
    assert set(shown["signal"].data["calibration"]) == {"en", "sw"}
    assert shown["signal"].note.endswith("Not in this chart, which would be too large: all.")
    assert set(shown["perplexity"].data["calibration"]) == {"en", "sw", "all"}


def recovered(component, layer, value, metric="loss_recovery", role=None):
    place = WANDA | {"calibration": "sw", "seed": 0, "language": "en", "task": "text", "category": "text"}
    found = {"component": component, "layer": layer, "role": role, "metric": metric, "value": value}
    return place | {"direction": "restore", "estimated_on": "all", "low": value - 0.1, "high": value + 0.1} | found


def test_a_diagnosis_has_a_chart_of_exact_parts_and_estimated_roles():
    rows = [recovered("residual", layer, 0.1 * layer) for layer in range(3)]
    rows += [recovered("weights", 1, 0.3, "attributed_recovery", "down")]
    rows += [{**rows[0], "estimated_on": "first", "value": 9.0}, {**rows[0], "direction": "damage", "value": 9.0}]
    frames = frames_of([])
    (chart,) = (c for c in charts(frames, {"a heading": ("name", tidy("recovery", rows))}) if c.name == "recovery")
    data = chart.data.set_index(["kind", "component", "block"])["value"]
    assert data.loc["parts of the stream", "whole stream"].tolist() == pytest.approx([0, 0.1, 0.2])
    assert data.loc["weights", "down", 1] == 0.3
    assert len(data) == 4
    assert set(chart.data["unit"]) == {"share of the drop"}
