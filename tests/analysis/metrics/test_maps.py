"""Maps of several languages: damage in the same places is seen to be, and damage in others not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis import plots
from analysis.frames import dense_columns, tidy
from analysis.metrics.maps import likeness, shared, summary
from analysis.report import map_findings

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
BLOCKS = 12


def diagnosis(language, effects, noise, seed):
    """The frame of one diagnosis: every matrix's effect, with noise of its own on each half."""
    rng = np.random.default_rng(seed)
    place = dense_columns("m") | {"method": "wanda", "sparsity": 0.5, "language": language, "task": "text"}
    rows = []
    for half in ("first", "second"):
        for layer in range(BLOCKS):
            for i, role in enumerate(ROLES):
                value = float(effects[layer, i] + noise * rng.normal())
                where = {"component": "weights", "layer": layer, "role": role, "estimated_on": half}
                rows.append(
                    place
                    | where
                    | {"category": "text", "direction": "restore", "metric": "attributed_restored", "value": value}
                )
    return tidy("recovery", rows)


def studied(common, own, noise=0.2, languages=("de", "en", "sw")):
    rng = np.random.default_rng(0)
    shape = (BLOCKS, len(ROLES))
    everywhere = rng.normal(size=shape)
    return {
        language: diagnosis(language, common * everywhere + own * rng.normal(size=shape), noise, k)
        for k, language in enumerate(languages)
    }


def test_the_same_damage_everywhere_is_as_alike_as_a_language_with_itself():
    between, low, high, within = summary(likeness(studied(1, 0))["weights"])
    assert within > 0.9
    assert abs(between - within) < 0.03
    assert low <= between <= high


def test_damage_of_each_language_of_its_own_is_not_alike():
    between, *_, within = summary(likeness(studied(0, 1))["weights"])
    assert within > 0.9
    assert abs(between) < 0.2


def test_noise_lowers_the_ceiling_as_much_as_the_agreement():
    between, *_, within = summary(likeness(studied(1, 0, noise=1.0))["weights"])
    assert 0.3 < within < 0.7
    assert abs(between - within) < 0.15


def test_each_cell_is_the_mean_of_both_ways_by_hand():
    frames = studied(1, 0.5)
    values = {
        (language, half): rows.sort_values(["layer", "role"])["value"].to_numpy()
        for language, frame in frames.items()
        for half, rows in frame.astype({"role": object}).groupby("estimated_on", observed=True)
    }
    table = likeness(frames)["weights"]
    for one in frames:
        for other in frames:
            ways = [
                spearmanr(values[one, "first"], values[other, "second"]).statistic,
                spearmanr(values[other, "first"], values[one, "second"]).statistic,
            ]
            assert table.loc[one, other] == pytest.approx(np.mean(ways))


def test_what_is_shared_comes_first():
    frames = studied(0, 0.3, noise=0.05)
    for frame in frames.values():
        at = (frame["layer"] == 7) & (frame["role"] == "down")
        frame.loc[at, "value"] = 5.0
    table = shared(frames)
    assert table.index[0] == (7, "down")
    assert table.iloc[0].to_dict() == {"value": 1.0, "languages": 3}
    said = map_findings(frames)
    assert "the weights of down in block 7 (3 of 3)" in said[1]
    assert said[0].startswith("Agreement between the maps of 3 languages")
    figure = plots.recovery.across(frames)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["de", "en", "sw"]


def test_two_languages_are_enough():
    table = likeness(studied(1, 0, languages=("de", "sw")))["weights"]
    assert table.shape == (2, 2)
    assert np.allclose(table, table.T)
