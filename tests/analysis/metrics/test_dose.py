"""The sparsity at which a capability breaks, planted and found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from analysis import plots
from analysis.frames import dense_columns, labels, series_of
from analysis.metrics import accuracy, dose, perplexity
from analysis.metrics.dose import crossing, falling, series
from analysis.report.dose import breaking_points
from probes import Readings
from probes.items import Item
from probes.scoring import ChoiceScores

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
RECIPE = {"method": "wanda", "pattern": "row", "allocation": "uniform", "scope": "all", "propagation": "pruned"}


def models(sparsities=SPARSITIES, calibrations=("en", "sw"), draws=1):
    columns = {"dense": dense_columns("m")}
    for calibration in calibrations:
        for seed in range(draws):
            for sparsity in sparsities:
                own = {"sparsity": sparsity, "bits": 16 * (1 - sparsity) + 1, "calibration": calibration, "seed": seed}
                columns[f"{calibration}-{seed}-{sparsity}"] = columns["dense"] | RECIPE | own
    return columns


def study(columns, lost, texts=None, templates=40, languages=("en", "sw"), right=1.0):
    """Frames of models of which ``lost(columns, language)`` is the share of templates that have become a guess.

    A pair that is a guess is right in every other template. `texts` is the nats a token that text costs.
    """
    items, scores, readings = {}, {}, {}
    for language in languages:
        items[language] = [
            Item(
                id=f"{t}{side}", twin=f"{t}", category="knowledge", template=f"{t}", prompt="?", choices=(" a", " b"),
                answer=k,
            )
            for t in range(templates)
            for k, side in enumerate("ab")
        ]  # fmt: skip
    order = np.random.default_rng(3).permutation(templates)
    for name, described in columns.items():
        for language in languages:
            share = 0.0 if name == "dense" else lost(described, language)
            guessed = order < round(share * templates)
            correct = np.where(guessed | (order >= round(right * templates)), order % 2 == 0, True)
            margin = np.where(correct, 1.0, -1.0).repeat(2)
            answers = np.tile([0, 1], templates)
            values = np.zeros((2 * templates, 2))
            values[np.arange(2 * templates), answers] = margin
            scores[name, language] = ChoiceScores(values, answers)
            nats = 2.0 + (0.0 if texts is None or name == "dense" else texts(described, language))
            noise = np.random.default_rng(1).normal(0, 0.2, 30)  # the same in all models
            read = Readings.empty(30, 1, 1, 1)
            read.nll[:] = torch.tensor(50 * (nats + noise))
            read.predicted[:], read.utf8_bytes[:] = 50, 100
            readings[name, language] = read
    frame = accuracy.item_frame(scores, items, columns, "mine")
    return frame, readings


def test_falling_is_the_isotonic_regression():
    curves = np.random.default_rng(0).normal(size=(20, 8)).cumsum(axis=1)
    for curve, smooth in zip(curves, falling(curves), strict=True):
        expected = IsotonicRegression(increasing=False).fit_transform(np.arange(8), curve)
        assert smooth == pytest.approx(expected, abs=1e-9)


def test_crossing_is_interpolated():
    doses = np.array([0.0, 0.2, 0.4])
    curves = np.array([[1.0, 0.8, 0.4], [1.0, 0.9, 0.8], [1.0, 0.5, 0.5], [0.4, 0.4, 0.4], [1.0, 0.7, 0.9]])
    found = crossing(doses, curves, np.array([0.6, 0.5, 0.5, 0.5, 0.9]))
    assert found == pytest.approx([0.3, np.inf, 0.2, 0.0, 0.1])  # of the last, 0.7 and 0.9 are both 0.8


def test_planted_breaking_points_are_found():
    """Half of the templates have become a guess at 0.25 in English, at 0.45 elsewhere; perplexity doubles at 0.35."""
    columns = models()

    def lost(described, language):
        breaks = 0.25 if language == "en" else 0.45
        return min(max((described["sparsity"] - breaks) / 0.2 + 0.5, 0.0), 1.0)

    def texts(described, language):
        return np.log(2) * described["sparsity"] / 0.35

    frame, readings = study(columns, lost, texts)
    found = dose.analyze(frame, readings, columns)
    assert found["sparsity"].isna().all()
    assert (found["metric"] == "breaking_sparsity").all()
    for calibration in ("en", "sw"):
        own = found[(found["calibration"] == calibration) & found["language"].notna()]
        got = {(row["language"], row["category"]): row["value"] for row in own.to_dict("records")}
        assert got["en", "knowledge"] == pytest.approx(0.25, abs=0.02)
        assert got["sw", "knowledge"] == pytest.approx(0.45, abs=0.02)
        assert got["en", "text"] == pytest.approx(0.35, abs=1e-6)
        assert len(got) == 4
    items = found[found["category"] == "knowledge"]
    assert (items["low"] < items["value"]).all()
    assert (items["value"] < items["high"]).all()
    assert (items["n"] == np.where(items["language"].isna(), 160, 80)).all()
    (said,) = breaking_points(found)
    assert said.startswith("With Wanda, per row (medians ")
    assert "perplexity has doubled at sparsity 0.35 [0.35, 0.35]" in said
    (one,) = series_of(found)
    written = {text.get_text() for axes in plots.dose.breaking(found, one).axes for text in axes.texts}
    assert any(text.startswith("0.35\n") for text in written)


def test_what_does_not_break_has_no_finite_sparsity():
    columns = models()
    frame, readings = study(columns, lambda described, language: 0.2, lambda described, language: 0.1)
    found = dose.analyze(frame, readings, columns)
    assert np.isposinf(found["value"]).all()
    assert np.isposinf(found["high"]).all()
    (said,) = breaking_points(found)
    assert "knowledge is half way to chance at none of the sparsities tried in 4 of 4 cases" in said
    written = {text.get_text() for axes in plots.dose.breaking(found, series_of(found)[0]).axes for text in axes.texts}
    assert "–\n–––" in written


def test_an_interval_may_reach_beyond_the_highest_sparsity():
    """Hardly more than half is lost at the highest sparsity: with some other templates it would be less than half."""
    columns = models((0.5, 0.6, 0.7))

    def lost(described, language):
        return 0.55 if described["sparsity"] == 0.7 else 0.0

    frame, readings = study(columns, lost)
    found = dose.analyze(frame, readings, columns)
    own = found[(found["category"] == "knowledge") & (found["language"] == "en")]
    assert (own["value"] <= 0.7).all()
    assert (own["low"] > 0.6).all()
    assert np.isposinf(own["high"]).all()


def test_cells_at_chance_are_left_out():
    columns = models()
    frame, readings = study(columns, lambda described, language: 0.0, right=0.2)
    assert set(dose.analyze(frame, readings, columns)["category"]) == {"text"}


@pytest.mark.parametrize("sparsities", [(0.5,), (0.3, 0.5)])
def test_fewer_than_three_sparsities_are_no_series(sparsities):
    columns = models(sparsities)
    assert series(columns) == []
    frame, readings = study(columns, lambda described, language: described["sparsity"])
    assert not len(dose.analyze(frame, readings, columns))


def test_series_differ_in_sparsity_alone():
    columns = models(draws=2)
    columns |= {f"other-{s}": columns["dense"] | RECIPE | {"method": "ria", "sparsity": s} for s in (0.1, 0.5)}
    found = series(columns)
    assert len(found) == 4
    for group in found:
        assert [columns[name]["sparsity"] for name in group] == list(SPARSITIES)
        assert len({(columns[name]["calibration"], columns[name]["seed"]) for name in group}) == 1


def test_shares_of_items_in_the_calibration_text_are_series_of_their_own():
    columns = models(calibrations=("en",))
    asked = {f"items-{name}": own | {"item_share": 0.5} for name, own in columns.items() if name != "dense"}
    frame, readings = study(
        columns | asked, lambda described, language: described["sparsity"] * described["item_share"]
    )
    found = dose.analyze(frame, readings, columns | asked)
    plain, mixed = series_of(found)
    assert (plain["item_share"], mixed["item_share"]) == (0, 0.5)
    assert labels.recipe_label(mixed) == f"{labels.recipe_label(plain)}, calibrated on 50% items"


def test_curves_start_at_the_dense_model():
    columns = models()
    frame, readings = study(columns, lambda described, language: described["sparsity"])
    found = perplexity.analyze(readings, columns)
    right = accuracy.analyze(frame)
    (one,) = series_of(dose.analyze(frame, readings, columns))
    response = plots.dose.response(found, right, one)
    text, knowledge = response.axes[:2]
    for axes, start in ((text, 0.0), (knowledge, 1.0)):
        for line in axes.lines[:2]:
            assert line.get_xdata()[0] == 0
            assert line.get_ydata()[0] == pytest.approx(start)
            assert len(line.get_xdata()) == 1 + len(SPARSITIES)
    (line,) = plots.dose.at_perplexity(found, right).axes[0].lines[:1]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((0, 1))
    assert len(line.get_xdata()) == 1 + len(SPARSITIES)
