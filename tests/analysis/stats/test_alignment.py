from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from analysis.stats.alignment import debiased_cka, mean_directions, overlap_and_angle


def naive_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The mean over four different segments that HSIC₁ is a short form of, written as in Song et al. (2012)."""
    n = len(x)
    k, q = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(q, 0)
    one = np.ones(n)
    total = np.trace(k @ q) + (one @ k @ one) * (one @ q @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ q @ one
    return float(total / (n * (n - 3)))


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    return naive_hsic(x, y) / np.sqrt(naive_hsic(x, x) * naive_hsic(y, y))


def test_cka_and_its_replicates_are_the_formulas():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5))
    y = x @ rng.normal(size=(5, 7)) + 0.3 * rng.normal(size=(12, 7)) + 4
    value, without = debiased_cka(x @ x.T, y @ y.T)
    assert value == pytest.approx(naive_cka(x, y))
    for i in range(12):
        keep = np.arange(12) != i
        assert without[i] == pytest.approx(naive_cka(x[keep], y[keep]))


def test_cka_of_unrelated_states_is_nothing_however_wide_they_are():
    rng = np.random.default_rng(0)
    found = [debiased_cka(x @ x.T, y @ y.T)[0] for x, y in (rng.normal(size=(2, 64, 512)) for _ in range(20))]
    assert abs(np.mean(found)) < 0.02
    x = rng.normal(size=(64, 512))
    turned = 3 * x @ np.linalg.qr(rng.normal(size=(512, 512)))[0] + 1
    assert debiased_cka(x @ x.T, turned @ turned.T)[0] == pytest.approx(1)


def test_overlap_and_angles_are_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 6, 40))
    second = first + 0.7 * second
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    for rank in (2, 5):
        bases = [means.T @ mean_directions(means @ means.T, rank) for means in (first, second)]
        np.testing.assert_allclose(bases[0].T @ bases[0], np.eye(rank), atol=1e-10)
        overlap, angle = overlap_and_angle(bases[0].T @ bases[1])
        naive = [np.linalg.svd(means.T, full_matrices=False)[0][:, :rank] for means in (first, second)]
        angles = subspace_angles(*naive)
        assert overlap == pytest.approx(np.mean(np.cos(angles) ** 2))
        assert angle == pytest.approx(np.degrees(angles.max()))


def test_means_that_do_not_differ_span_nothing():
    directions = mean_directions(np.zeros((4, 4)), 3)
    assert not directions.any()
    assert overlap_and_angle(directions.T @ directions).tolist() == [0, 90]
