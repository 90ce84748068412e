"""Planted differences between recipes, on the same draws of calibration text, and differences that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel

from analysis import plots
from analysis.frames import dense_columns, tidy
from analysis.metrics import recipe_contrasts
from analysis.report.recipes import recipes_compared
from probes import DENSE, Readings
from probes.readers.signal import SIGNAL_SITES

LANGUAGES = ("de", "en", "sw")
SETS = ("en", "sw")
SEGMENTS, TEMPLATES = 40, 30
RECIPE = {"method": "wanda", "sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all"}
RECIPE |= {"propagation": "pruned", "bits": 9.0}


def study(changes, *, draws=3, seed=0, shared=0.2, own=0.02, guesses=(), uncalibrated=(), without=(), asked=True):
    """Frames of recipes that change log perplexity and margin by ``changes[method]`` nats.

    Parameters
    ----------
    shared
        Deviation of what a draw changes in all recipes.
    own
        Deviation of what it changes in one.
    guesses
        Languages in which the dense model is at chance.
    uncalibrated
        Recipes without calibration.
    without
        ``(method, set)`` that was not made.
    asked
        Whether there are items.
    """
    rng = np.random.default_rng(seed)
    columns = {DENSE: dense_columns("m")}
    for method in changes:
        for name, k in [("none", 0)] if method in uncalibrated else [(s, k) for s in SETS for k in range(draws)]:
            if (method, name) not in without:
                described = {"calibration": name, "seed": k, "method": method}
                columns[f"{method}-{name}-{k}"] = dense_columns("m") | RECIPE | described
    of_draw = {(s, k): shared * rng.normal() for s in SETS for k in range(draws)} | {("none", 0): 0.0}
    hard = {language: rng.normal(3, 1, SEGMENTS) for language in LANGUAGES}
    able = {language: rng.normal(0 if language in guesses else 3, 1, TEMPLATES) for language in LANGUAGES}
    readings, rows = {}, []
    for name, described in columns.items():
        shift = 0.0
        if name != DENSE:
            shift = changes[described["method"]] + of_draw[described["calibration"], described["seed"]]
            shift += own * rng.normal()
        for language in LANGUAGES:
            # what a segment is harder by is the same in all models; errors of nothing matter
            nll = 10 * (hard[language] + shift + 0.05 * rng.normal(size=SEGMENTS))
            sums = torch.ones(SEGMENTS, 1, len(SIGNAL_SITES))
            none, tokens = torch.zeros(0), torch.full((SEGMENTS,), 10)
            of_text = none, none, none, torch.from_numpy(nll), tokens, tokens
            readings[name, language] = Readings(*of_text, sums, sums)
            if not asked:
                continue
            margin = np.repeat(able[language] - shift, 2) + 0.05 * rng.normal(size=2 * TEMPLATES)
            place = {**described, "language": language, "task": "mine", "category": "knowledge"}
            names = np.repeat([f"t{t}" for t in range(TEMPLATES)], 2)
            place |= {"template": names, "twin": names, "item": np.array([f"i{i}" for i in range(2 * TEMPLATES)])}
            rows.append({**place, "metric": np.full(len(names), "margin"), "value": margin})
            rows.append({**place, "metric": np.full(len(names), "correct"), "value": (margin > 0).astype(float)})
    ids = {language: [f"s{i}" for i in range(SEGMENTS)] for language in LANGUAGES}
    return recipe_contrasts.analyze(tidy("items", rows), readings, columns, ids), readings, columns


def shown(frame, metric="log_perplexity", **where):
    rows = frame[frame["metric"] == metric]
    for column, value in where.items():
        rows = rows[rows[column].isna() if value is None else rows[column] == value]
    return rows


def test_a_planted_difference_is_found_although_draws_vary_more():
    frame, _, _ = study({"wanda": 1.0, "ria": 0.8, "random": 1.0})
    for metric, sign in (("log_perplexity", 1), ("margin", -1)):
        whole = shown(frame, metric, calibration=None, language=None).set_index(["method", "other_recipe"])
        better = whole.loc["ria", "Wanda, sparsity 0.5, per row"]
        assert better["value"] == pytest.approx(-0.2 * sign, abs=0.03)
        assert better["low"] < better["value"] < better["high"]
        assert better["p_adjusted"] < 1e-3
        assert better["draws"] == 3
        alike = whole.loc["random", "Wanda, sparsity 0.5, per row"]
        assert alike["low"] < 0 < alike["high"]
        assert alike["p_adjusted"] > 0.05
        assert whole.loc["random", "RIA, sparsity 0.5, per row"]["value"] == pytest.approx(0.2 * sign, abs=0.03)
    assert (frame["n"][frame["metric"] == "log_perplexity"] == SEGMENTS).all()
    assert (frame["n"][frame["metric"] == "margin"] == TEMPLATES).all()


def test_where_nothing_is_planted_few_intervals_exclude_zero():
    outside = []
    for seed in range(60):
        frame, _, _ = study({"wanda": 1.0, "ria": 1.0}, seed=seed, own=0.05, asked=False)
        row = shown(frame, calibration=None, language=None).iloc[0]
        outside.append(row["low"] > 0 or row["high"] < 0)
    assert np.mean(outside) <= 0.12  # 5 % are expected; 8 of 60 have a probability of 1 %


def test_a_difference_is_the_mean_over_sets_and_languages_of_paired_differences():
    frame, readings, _ = study({"wanda": 1.0, "ria": 0.9})

    def difference(name, k, language):
        one, other = (readings[f"{method}-{name}-{k}", language].nll.numpy() for method in ("ria", "wanda"))
        return (one - other).mean() / 10

    for language in LANGUAGES:
        by_set = {s: np.mean([difference(s, k, language) for k in range(3)]) for s in SETS}
        for name, value in by_set.items():
            assert shown(frame, calibration=name, language=language)["value"].item() == pytest.approx(value)
        whole = shown(frame, calibration=None, language=language)["value"].item()
        assert whole == pytest.approx(np.mean(list(by_set.values())))
    mean = np.mean([difference(s, k, language) for s in SETS for k in range(3) for language in LANGUAGES])
    assert shown(frame, calibration=None, language=None)["value"].item() == pytest.approx(mean)
    assert set(frame["other_recipe"]) == {"Wanda, sparsity 0.5, per row"}


def test_recipes_without_calibration_are_compared_over_segments_alone():
    changes = {"magnitude": 1.3, "random": 1.0, "wanda": 1.1}
    frame, readings, _ = study(changes, uncalibrated=("magnitude", "random"))
    rows = shown(frame, calibration=None).set_index(["method", "other_recipe", "language"])
    one, other = (readings[f"{method}-none-0", "de"].nll.numpy() / 10 for method in ("random", "magnitude"))
    expected = ttest_rel(one, other)
    found = rows.loc["random", "magnitude, sparsity 0.5, per row", "de"]
    assert found["value"] == pytest.approx((one - other).mean())
    low, high = expected.confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6)
    assert found["p_value"] == pytest.approx(expected.pvalue, rel=1e-6)
    # the reference is the first that is calibrated; one without is paired with each of its draws
    against = rows.loc["magnitude", "Wanda, sparsity 0.5, per row", "de"]
    drawn = [readings[f"wanda-{s}-{k}", "de"].nll.numpy().mean() / 10 for s in SETS for k in range(3)]
    assert against["value"] == pytest.approx(other.mean() - np.mean(drawn))
    assert against["draws"] == 3
    assert ttest_1samp(other.mean() - np.array(drawn), 0).pvalue < 0.5  # draws vary, and count
    assert against["high"] - against["low"] > found["high"] - found["low"]


def test_only_sets_that_both_have_are_compared():
    frame, _, _ = study({"wanda": 1.0, "ria": 0.8, "gblm": 1.0}, without=[("ria", "sw")])
    rows = shown(frame, language=None)
    ria = rows[rows["method"] == "ria"]
    assert ria["calibration"].isna().all()  # a single set, of which the mean over sets is
    assert set(rows.loc[rows["method"] == "gblm", "calibration"].dropna()) == set(SETS)


def test_with_one_draw_nothing_is_tested_and_the_report_says_why():
    frame, _, _ = study({"wanda": 1.0, "ria": 0.8}, draws=1)
    assert frame["value"].notna().all()
    assert frame[["low", "high", "p_value", "p_adjusted"]].isna().all(axis=None)
    (sentence,) = recipes_compared(frame)
    assert "cannot be tested" in sentence
    assert "calibration.seeds" in sentence


def test_languages_in_which_the_dense_model_guesses_are_left_out():
    frame, _, _ = study({"wanda": 1.0, "ria": 0.5}, guesses=("sw",))
    rows = shown(frame, "margin", calibration=None)
    guessed = rows[rows["language"] == "sw"]
    assert guessed["at_chance"].all()
    assert guessed["p_value"].isna().all()
    able = rows[rows["language"].isin(["de", "en"])]
    assert rows.loc[rows["language"].isna(), "value"].item() == pytest.approx(able["value"].mean())
    assert len(shown(study({"wanda": 1.0})[0])) == 0  # one recipe has none to be compared with


def test_the_report_says_what_differs_and_what_does_not():
    frame, _, _ = study({"wanda": 1.0, "ria": 0.8, "gblm": 1.0})
    ria, gblm = recipes_compared(frame)
    assert ria.startswith("RIA, sparsity 0.5, per row, against Wanda, sparsity 0.5, per row (all languages and calibr")
    assert "perplexity times 0.8" in ria
    assert gblm.endswith(": no significant difference in perplexity and knowledge (mine).")


@pytest.mark.parametrize("settings", [{}, {"metric": "accuracy", "task": "mine"}])
def test_figures_have_a_line_for_each_recipe_with_what_tells_them_apart(settings):
    frame, _, _ = study({"wanda": 1.0, "ria": 0.8, "gblm": 1.0}, guesses=("sw",))
    figure = plots.recipe_contrasts.effects(frame, **settings)
    (axes,) = figure.axes
    assert axes.get_title() == ("knowledge" if settings else "text")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["RIA", "GBLM"]
    shown_here = ["all languages"] if settings else ["all languages", "German", "English", "Swahili"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:-2] == (shown_here if len(shown_here) > 1 else [])
    values = shown(frame, settings.get("metric", "log_perplexity"), calibration=None)
    values = values[values["other_recipe"] == "Wanda, sparsity 0.5, per row"]
    drawn = values[values["language"].isna()] if settings else values
    points = {line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"}
    assert points == set(drawn["value"])
