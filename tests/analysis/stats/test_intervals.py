"""Intervals hold what they claim, near 0 and 1 too."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from analysis.stats.intervals import FEWEST_UNITS, share_difference_interval, share_interval, unit_interval


def templates(rng, share, alike, units, size):
    """Right answers among `size` items of each template; `alike` is their intraclass correlation."""
    chances = np.full(units, share)
    if alike and share < 1:
        odds = 1 / alike - 1
        chances = rng.beta(share * odds, (1 - share) * odds, units)
    return rng.binomial(size, chances).astype(float), np.full(units, float(size))


def test_without_templates_it_is_wilsons():
    right = np.array([1.0] * 37 + [0.0] * 3)
    by_scipy = binomtest(37, 40).proportion_ci(method="wilson")
    assert share_interval(right, np.ones(40)) == pytest.approx((37 / 40, by_scipy.low, by_scipy.high))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("units", "size", "alike"), [(160, 1, 0.0), (16, 10, 0.0), (16, 10, 0.3), (40, 4, 0.3)])
def test_intervals_of_shares_hold(share, units, size, alike):
    rng = np.random.default_rng(0)
    found = [share_interval(*templates(rng, share, alike, units, size)) for _ in range(400)]
    covered = np.mean([low <= share <= high for _, low, high in found])
    assert covered > 0.93
    if share == 0.5:
        assert covered < 0.985
    assert min(high - low for _, low, high in found) > 0.005


def test_all_right_says_less_the_fewer_templates_there_are():
    many, few = (share_interval(np.full(n, 160 / n), np.full(n, 160 / n)) for n in (160, 16))
    assert many[0] == few[0] == many[2] == few[2] == 1
    assert 0.95 < many[1] < 0.99
    assert few[1] < 0.85


def test_items_alone_would_not_hold_over_templates():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        right, _ = templates(rng, 0.7, 0.4, 16, 10)
        interval = binomtest(int(right.sum()), 160).proportion_ci(method="wilson")
        covered.append(interval.low <= 0.7 <= interval.high)
    assert np.mean(covered) < 0.75


def test_one_template_has_no_interval():
    assert np.isnan(share_interval(np.array([7.0]), np.array([10.0]))[1:]).all()


@pytest.mark.parametrize(("up", "down"), [(0.05, 0.05), (0.02, 0.2), (0.0, 0.03)])
@pytest.mark.parametrize(("units", "size"), [(160, 1), (16, 10)])
def test_intervals_of_changes_hold(up, down, units, size):
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(300):
        outcomes = rng.multinomial(size, [up, down, 1 - up - down], units).astype(float)
        _, low, high = share_difference_interval(outcomes[:, 0], outcomes[:, 1], np.full(units, float(size)))
        covered.append(low <= up - down <= high)
    assert np.mean(covered) > 0.93


def test_no_change_in_any_item_is_not_a_change_of_exactly_nothing():
    value, low, high = share_difference_interval(np.zeros(100), np.zeros(100), np.ones(100))
    assert value == 0
    assert low == -high
    assert 0.01 < high < 0.05


@pytest.mark.parametrize("units", [10, FEWEST_UNITS, 60])
def test_intervals_of_skewed_ratios_hold(units):
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        lost = rng.gamma(9, 1, units)
        data = np.stack([lost * rng.beta(2, 6, units), lost], axis=1)

        def share(weights, data=data):
            sums = weights @ data
            return sums[..., :1] / sums[..., 1:]

        _, low, high = unit_interval(share, units, resamples=400)
        covered.append(low[0] <= 0.25 <= high[0])
    assert 0.9 < np.mean(covered) < 0.99


def test_what_varies_in_no_unit_has_no_interval():
    data = np.stack([np.zeros(30), np.arange(30.0)], axis=1)
    for units in (10, 30):
        value, low, high = unit_interval(
            lambda weights, units=units: weights @ data[:units] / weights.sum(axis=-1)[..., None], units
        )
        assert np.isnan([low[0], high[0]]).all()
        assert low[1] < value[1] < high[1]


def test_several_calls_see_the_same_draws():
    data = np.random.default_rng(4).normal(size=(30, 1))
    once, again = (unit_interval(lambda w: w @ data / w.sum(axis=-1)[..., None], 30) for _ in range(2))
    np.testing.assert_array_equal(once, again)
