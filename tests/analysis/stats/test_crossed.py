"""Contrasts over draws and segments: what they estimate, and how often their intervals hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from analysis.stats.crossed import _summed, crossed_contrast, crossed_contrasts

SEGMENTS = 60


def sets(rng, draws, spread, *, languages=1, by_segment=0.3, residual=0.3):
    """Sets whose means are equal; `spread` is that of the draws of each set, `by_segment` what suits a segment."""
    shared = [rng.normal(size=SEGMENTS) for _ in range(languages)]
    return [
        [
            shared[k]
            + by_segment * rng.normal(size=SEGMENTS)
            + sd * rng.normal(size=(draws, 1))
            + residual * rng.normal(size=(draws, SEGMENTS))
            for k in range(languages)
        ]
        for sd in spread
    ]


def pair(scores):
    weights = np.zeros(len(scores))
    weights[:2] = 1, -1
    return crossed_contrast(scores, weights, np.ones(1))


@pytest.mark.parametrize(
    ("draws", "spread", "by_segment"),
    [
        pytest.param(2, [0.1] * 8, 0.3, id="two draws of eight sets"),
        pytest.param(3, [0.1] * 2, 0.3, id="three draws of two sets"),
        pytest.param(5, [0.3, 0.1], 0.3, id="sets that vary differently"),
        pytest.param(3, [0.1] * 2, 1.0, id="segments that vary most"),
        pytest.param(3, [0.5] * 2, 0.0, id="draws that vary most"),
    ],
)
def test_intervals_hold_over_draws_and_segments(draws, spread, by_segment):
    rng = np.random.default_rng(0)
    found = [pair(sets(rng, draws, spread, by_segment=by_segment)) for _ in range(400)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.035)
    assert np.mean([one.p_value < 0.05 for one in found]) == pytest.approx(0.05, abs=0.035)


def test_a_test_over_segments_alone_would_not():
    """It takes every draw for a difference between sets."""
    rng = np.random.default_rng(0)
    studies = [sets(rng, 2, [0.2] * 8, by_segment=0.1, residual=0.1) for _ in range(200)]
    over_segments = [ttest_rel(one[0][0].mean(axis=0), one[1][0].mean(axis=0)).pvalue for one in studies]
    assert np.mean(np.less(over_segments, 0.05)) > 0.5
    assert np.mean([pair(one).p_value < 0.05 for one in studies]) < 0.1


def test_the_estimate_is_the_weighted_mean():
    rng = np.random.default_rng(1)
    scores = sets(rng, 2, [0.1] * 3, languages=2)
    u, v = np.array([1.0, -0.5, -0.5]), np.array([1.0, -1.0])
    by_hand = sum(u[i] * v[k] * scores[i][k].mean() for i in range(3) for k in range(2))
    assert crossed_contrast(scores, u, v).value == pytest.approx(by_hand)
    assert crossed_contrast(scores, u, np.stack([v] * 3)) == pytest.approx(crossed_contrast(scores, u, v))


def test_without_residual_it_is_welchs_test_on_draws():
    rng = np.random.default_rng(2)
    scores = sets(rng, 4, [0.3, 0.1], by_segment=0.0, residual=0.0)
    welch = ttest_ind(*(one[0].mean(axis=1) for one in scores), equal_var=False)
    found = pair(scores)
    assert found.p_value == pytest.approx(welch.pvalue)
    assert found.df == pytest.approx(welch.df)
    low, high = welch.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_draw_of_each_set_has_neither_interval_nor_p_value():
    found = pair(sets(np.random.default_rng(3), 1, [0.1] * 3))
    assert np.isfinite(found.value)
    assert np.isnan([found.low, found.high, found.p_value, found.df]).all()


def test_sets_drawn_once_borrow_the_variance_of_those_drawn_twice():
    rng = np.random.default_rng(4)
    once, twice = sets(rng, 1, [0.1] * 2), sets(rng, 2, [0.1] * 2)
    found = pair([*once, *twice])
    assert found.low < found.value < found.high


def test_equal_models_do_not_differ():
    same = np.ones((2, SEGMENTS))
    assert pair([[same], [same]]) == (0, 0, 0, 1, np.inf)


@pytest.mark.parametrize("draws", [2, 3])
def test_many_studies_at_once_are_as_one_by_one(draws):
    rng = np.random.default_rng(5)
    studies = [sets(rng, draws, [0.3, 0.1, 0.2], languages=2) for _ in range(20)]
    together = [[np.stack([one[i][k] for one in studies]) for k in range(2)] for i in range(3)]
    weights = np.array([1.0, -1.0, 0.0]), np.array([1.0, -0.5])
    found = crossed_contrasts(together, *weights)
    for k, one in enumerate(studies):
        assert tuple(of[k] for of in found) == pytest.approx(tuple(crossed_contrast(one, *weights)))


def test_the_error_of_something_else_widens_the_interval():
    found = pair(sets(np.random.default_rng(6), 3, [0.1] * 2))
    wider = found.with_error(4.0)
    assert wider.value == found.value
    assert wider.high - wider.value > 2 * 1.9
    assert wider.p_value > found.p_value or found.p_value == 1
    assert found.with_error(0.0) == found


# -- segments that are translations of each other --------------------------------------------------------------------

IDS = [str(i) for i in range(SEGMENTS)]


def translated(rng, languages=4, own=0.1):
    """Two sets of three draws; what suits a set at a segment is largely the same in every language."""
    scores = []
    for _ in range(2):
        suits = 0.5 * rng.normal(size=SEGMENTS)
        drawn, residual = 0.05 * rng.normal(size=(3, 1)), 0.3 * rng.normal(size=(3, SEGMENTS))
        scores.append([suits + drawn + residual + own * rng.normal(size=(3, SEGMENTS)) for _ in range(languages)])
    return scores


def test_translations_vary_together():
    """Taken to be independent, four languages would seem to tell twice as much as one."""
    rng = np.random.default_rng(0)
    weights = np.array([1.0, -1.0]), np.full(4, 0.25)
    studies = [translated(rng) for _ in range(400)]
    for ids, least, most in (([IDS] * 4, 0.92, 0.98), (None, 0.5, 0.85)):
        found = [crossed_contrast(scores, *weights, ids) for scores in studies]
        assert least < np.mean([one.low <= 0 <= one.high for one in found]) < most


def test_some_languages_lack_some_segments():
    rng = np.random.default_rng(0)
    weights = np.array([1.0, -1.0]), np.array([0.5, 0.3, 0.2])
    there = [np.arange(SEGMENTS), np.arange(10, SEGMENTS), np.arange(0, SEGMENTS, 2)]
    ids = [[IDS[i] for i in own] for own in there]
    studies = [translated(rng, 3) for _ in range(400)]
    found = [
        crossed_contrast([[of[:, own] for of, own in zip(by, there, strict=True)] for by in scores], *weights, ids)
        for scores in studies
    ]
    assert 0.92 < np.mean([one.low <= 0 <= one.high for one in found]) < 0.98


@pytest.mark.parametrize("few", [2, 5, SEGMENTS])
def test_a_language_with_few_segments_is_as_uncertain_as_they_say(few):
    """However many more the other languages have: s² / n, not less."""
    rng = np.random.default_rng(0)
    own, constant = rng.normal(size=(1, few)), np.zeros((1, SEGMENTS))
    total = _summed([(1.0, own, rng.permutation(SEGMENTS)[:few]), (1.0, constant, np.arange(SEGMENTS))])
    assert total.mean() == pytest.approx(own.mean())
    assert total.var(ddof=1) / SEGMENTS == pytest.approx(own.var(ddof=1) / few)


def test_segments_of_other_names_are_independent_and_order_does_not_matter():
    rng = np.random.default_rng(1)
    scores, weights = translated(rng, 3), (np.array([1.0, -1.0]), np.array([0.5, 0.3, 0.2]))
    apart = [[f"{k} {name}" for name in IDS] for k in range(3)]
    assert crossed_contrast(scores, *weights, apart) == pytest.approx(crossed_contrast(scores, *weights))
    together = crossed_contrast(scores, *weights, [IDS] * 3)
    summed = [[sum(w * of for w, of in zip(weights[1], by, strict=True))] for by in scores]
    assert together == pytest.approx(crossed_contrast(summed, weights[0], np.ones(1)))
    order = rng.permutation(SEGMENTS)
    shuffled = [[by[0], by[1][:, order], by[2]] for by in scores]
    ids = [IDS, [IDS[i] for i in order], IDS]
    assert crossed_contrast(shuffled, *weights, ids) == pytest.approx(together)


def test_an_error_that_is_not_known_is_no_certainty():
    rng = np.random.default_rng(0)
    known = crossed_contrast(
        [[rng.normal(size=(3, 20))], [rng.normal(size=(3, 20))]], np.array([1.0, -1.0]), np.ones(1)
    )
    found = known.with_error(float("nan"))
    assert found.value == known.value
    assert np.isnan([found.low, found.high, found.p_value]).all()
