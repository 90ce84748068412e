"""Random effects against their defining equations, and their intervals against simulated populations of studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from analysis.stats.meta import pooled


@pytest.mark.parametrize("seed", range(8))
def test_variance_between_studies_solves_its_equation(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 9))
    errors = rng.uniform(0.1, 0.5, k)
    values = rng.normal(0.3, 1.0, k)
    found = pooled(values, errors)
    weights = 1 / (errors**2 + found.tau**2)
    mean = np.average(values, weights=weights)
    squares = (weights * (values - mean) ** 2).sum()
    assert found.value == pytest.approx(mean)
    if found.tau > 0:
        assert squares == pytest.approx(k - 1, rel=1e-6)
    else:
        assert squares <= k - 1
    half = t.ppf(0.975, k - 1) * np.sqrt(max(squares / (k - 1), 1) / weights.sum())
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)


def test_studies_that_agree_have_no_variance_between_them_and_the_weighted_mean():
    values, errors = np.array([0.5, 0.52, 0.48]), np.array([0.1, 0.2, 0.4])
    found = pooled(values, errors)
    assert found.tau == 0
    assert found.i_squared == 0
    assert found.p_alike > 0.9
    assert found.value == pytest.approx(np.average(values, weights=errors**-2.0))
    far = pooled(np.array([0.5, -0.5, 2.0]), errors)
    assert far.tau > 0.5
    assert far.i_squared > 0.8
    assert far.p_alike < 1e-4


@pytest.mark.parametrize(("k", "tau"), [(3, 0.0), (3, 0.3), (6, 0.3)])
def test_intervals_cover_the_mean_of_the_population(k, tau):
    rng = np.random.default_rng(k)
    inside = []
    for _ in range(400):
        errors = rng.uniform(0.1, 0.4, k)
        found = pooled(0.2 + tau * rng.normal(size=k) + errors * rng.normal(size=k), errors)
        inside.append(found.low <= 0.2 <= found.high)
    assert np.mean(inside) > 0.925  # of 95 %, three standard errors below


def test_one_study_or_one_without_error_cannot_be_pooled():
    for errors in (np.array([0.1]), np.array([0.1, 0.0])):
        with pytest.raises(ValueError, match="two studies or more, with errors above 0"):
            pooled(np.ones(len(errors)), errors)
