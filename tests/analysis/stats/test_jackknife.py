from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t, ttest_ind

from analysis.stats.jackknife import jackknife_interval, nested_jackknife_interval


def test_the_interval_of_a_mean_is_students():
    x = np.random.default_rng(0).normal(size=15)
    value, low, high = jackknife_interval(np.array(x.mean()), (x.sum() - x) / 14)
    expected = t.interval(0.95, 14, loc=x.mean(), scale=x.std(ddof=1) / np.sqrt(15))
    assert (float(low), float(high)) == pytest.approx(expected)
    assert value == x.mean()


def test_units_of_one_group_are_plain_units():
    x = np.random.default_rng(0).normal(size=15)
    without = (x.sum() - x) / 14
    plain = jackknife_interval(np.array(x.mean()), without)
    assert nested_jackknife_interval(x.mean(), [without]) == pytest.approx([float(part) for part in plain])


def test_a_difference_of_two_groups_means_has_welchs_interval():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=6), 5 * rng.normal(size=9)
    value = x.mean() - y.mean()
    without = [(x.sum() - x) / 5 - y.mean(), x.mean() - (y.sum() - y) / 8]
    expected = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    found = nested_jackknife_interval(value, without)
    assert found == pytest.approx((value, expected.low, expected.high))


@pytest.mark.parametrize("without", [[], [np.ones(3), np.ones(1)], [np.array([1.0, np.nan])], [np.ones(3)]])
def test_nothing_that_varies_within_its_group_has_no_interval(without):
    value, *interval = nested_jackknife_interval(2.0, without)
    assert value == 2
    assert np.isnan(interval).all()
