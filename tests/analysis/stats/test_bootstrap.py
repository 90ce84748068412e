from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from analysis.stats.bootstrap import segment_interval


def test_interval_of_a_ratio_of_sums_is_scipys():
    rng = np.random.default_rng(0)
    top, bottom = rng.uniform(1, 2, 40), rng.uniform(3, 4, 40)
    data = np.stack([top, bottom], axis=1)

    def ratio(weights):
        sums = weights @ data
        return (sums[..., 0] / sums[..., 1])[..., None]

    value, low, high = segment_interval(ratio, 40, resamples=500, seed=3)
    direct = bootstrap(
        (top, bottom),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        n_resamples=500,
        method="percentile",
        rng=np.random.default_rng(3),
        vectorized=True,
    ).confidence_interval
    assert value[0] == pytest.approx(top.sum() / bottom.sum())
    np.testing.assert_allclose([low[0], high[0]], [direct.low, direct.high], rtol=1e-12)


def test_several_values_are_estimated_at_once():
    data = np.random.default_rng(1).normal(size=(30, 3))
    value, low, high = segment_interval(lambda weights: weights @ data / 30, 30)
    assert value.shape == low.shape == high.shape == (3,)
    assert ((low < value) & (value < high)).all()


def test_one_segment_has_no_interval():
    value, low, high = segment_interval(lambda weights: weights @ np.ones((1, 1)), 1)
    assert value[0] == 1
    assert np.isnan([low[0], high[0]]).all()
