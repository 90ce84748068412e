"""The frame ``lens_margins``: planted blocks of overtaking are found, and preferences for a choice cancel."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import plots
from analysis.frames import dense_columns, recipes_of
from analysis.metrics import lens_margins
from analysis.report.lens import margins_of_recipe
from probes import DENSE, Item, LensMargins

COLUMNS = {
    DENSE: dense_columns("m"),
    "v": dense_columns("m") | {"method": "wanda", "sparsity": 0.5, "pattern": "row", "calibration": "en"},
}
LAYERS, PAIRS = 6, 24
ITEMS = {
    "en": [
        Item(
            id=f"{i}{half}",
            twin=str(i),
            template=str(i // 2),
            category="reasoning",
            prompt="a",
            choices=("b", "c"),
            answer=half,
        )
        for i in range(PAIRS)
        for half in (0, 1)
    ]
}


def margins(block, wrong=0, bias=5.0, seed=0):
    """Margins of pairs that are decided after a block (per pair), the first few never; one choice is preferred."""
    random = np.random.default_rng(seed)
    layers = np.arange(LAYERS)[:, None]
    right = np.where((layers >= block[None]) & (np.arange(PAIRS) >= wrong), 1.0, -1.0)
    right = right * random.uniform(0.5, 1.5, right.shape)
    both = np.stack([right + bias, right - bias], axis=-1).reshape(LAYERS, 2 * PAIRS)
    return LensMargins(torch.arange(LAYERS), torch.from_numpy(both)[None])


BEFORE = np.arange(PAIRS) // 2 % 3 + 1  # blocks 1, 2, 3
READ = {(DENSE, "en"): margins(BEFORE, 4), ("v", "en"): margins(BEFORE + 1 + (np.arange(PAIRS) // 2 % 2), 6, seed=1)}


@pytest.fixture(scope="module")
def frame():
    return lens_margins.analyze(READ, ITEMS, COLUMNS, "bundled")


def values(frame, method, metric):
    return frame[(frame["method"] == method) & (frame["metric"] == metric)]


def test_the_planted_block_is_found_whatever_choice_is_preferred(frame):
    found = values(frame, "dense", "overtaking").iloc[0]
    assert found["value"] == pytest.approx(BEFORE[4:].mean())
    assert found["n"] == PAIRS - 4
    assert pd.isna(found["layer"])
    assert found["low"] < found["value"] < found["high"]
    ahead = values(frame, "dense", "ahead").sort_values("layer")["value"]
    expected = [((layer >= BEFORE) & (np.arange(PAIRS) >= 4)).mean() for layer in range(LAYERS)]
    assert ahead.tolist() == pytest.approx(expected)


def test_a_change_is_over_pairs_that_both_get_right(frame):
    found = values(frame, "wanda", "overtaking_change").iloc[0]
    assert found["value"] == pytest.approx((1 + np.arange(PAIRS) // 2 % 2)[6:].mean())
    assert found["n"] == PAIRS - 6
    assert found["low"] > 0
    change = values(frame, "wanda", "ahead_change").sort_values("layer")["value"]
    assert change.iloc[-1] == pytest.approx(-2 / PAIRS)
    assert not len(values(frame, "dense", "ahead_change"))


def test_margins_are_means_over_pairs(frame):
    own = values(frame, "wanda", "margin").sort_values("layer")
    assert own["value"].tolist() == pytest.approx(READ["v", "en"].values[0].mean(dim=1).tolist())


def test_a_choice_that_falls_back_has_not_overtaken():
    margin = np.array([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])
    assert lens_margins.ahead_for_good(margin).argmax(axis=1).tolist() == [2, 0]
    assert lens_margins.ahead_for_good(margin)[:, -1].tolist() == [True, False]


def test_pairs_without_a_token_to_compare_are_left_out():
    values_ = READ[DENSE, "en"].values.clone()
    values_[..., 0] = torch.nan
    found = lens_margins.analyze({(DENSE, "en"): LensMargins(torch.arange(LAYERS), values_)}, ITEMS, COLUMNS, "bundled")
    assert set(found[found["metric"] == "margin"]["n"]) == {PAIRS - 1}


def test_the_sentence_and_the_figure_say_what_is_in_the_frame(frame):
    (recipe,) = recipes_of(frame)
    (said,) = margins_of_recipe({"lens_margins": frame}, recipe)
    later = (1 + np.arange(PAIRS) // 2 % 2)[6:].mean()
    assert f"reasoning {BEFORE[4:].mean():.1f} ({later:+.1f})" in said
    assert "later in 1 of 1 cases" in said
    for width in (plots.COLUMN_WIDTH, plots.PAGE_WIDTH):
        figure = plots.lens.margins(frame, recipe, task="bundled", width=width)
        assert [axes.get_title() for axes in figure.axes] == ["reasoning"]
        assert len(figure.axes[0].lines) == 2


def test_without_items_or_a_lens_it_is_empty():
    assert not len(lens_margins.analyze({}, {}, COLUMNS, ""))
