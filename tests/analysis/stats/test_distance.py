"""The distance between two sampled distributions is not taken for larger because they were sampled."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.stats.distance import total_variation
from analysis.stats.jackknife import jackknife_interval


def counts(shares, segments, rng, tokens=60):
    """Of segments that differ in what they are about, ``[segments, cells]``."""
    return np.array([rng.multinomial(tokens, rng.dirichlet(20 * shares)) for _ in range(segments)], dtype=np.float64)


def estimate(one, other):
    """Value and interval, halves being every other segment."""

    def found(weights):
        halves = np.stack([weights * (np.arange(len(one)) % 2 == i) for i in (0, 1)], axis=1)
        return total_variation(halves @ one, halves @ other)[:, None]

    return np.concatenate(jackknife_interval(found(np.ones((1, len(one))))[0], found(1 - np.eye(len(one)))))


def test_known_counts_have_their_distance():
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.3, 0.2, 0.4])
    assert total_variation(np.stack([p, 3 * p]), np.stack([5 * q, q])) == pytest.approx(0.4)
    assert total_variation(np.stack([p, p]), np.stack([p, 2 * p])) == pytest.approx(0)


@pytest.mark.parametrize("cells", [8, 64])
def test_samples_of_one_distribution_are_not_apart(cells):
    rng = np.random.default_rng(0)
    shares = np.full(cells, 1 / cells)
    found, plain = [], []
    for _ in range(40):
        one, other = counts(shares, 32, rng), counts(shares, 32, rng)
        found.append(estimate(one, other))
        plain.append(np.abs(one.mean(axis=0) - other.mean(axis=0)).sum() / 60 / 2)
    value, low, high = np.array(found).T
    assert abs(value.mean()) < 0.02
    assert np.mean(plain) > 0.05
    assert np.mean((low <= 0) & (high >= 0)) > 0.9


def test_intervals_hold_the_true_distance():
    rng = np.random.default_rng(0)
    p = np.full(8, 1 / 8)
    q = p * np.exp(0.6 * rng.normal(size=8))
    q /= q.sum()
    found = np.array([estimate(counts(p, 64, rng), counts(q, 64, rng)) for _ in range(60)])
    true = np.abs(p - q).sum() / 2
    assert found[:, 0].mean() == pytest.approx(true, abs=0.02)
    assert np.mean((found[:, 1] <= true) & (true <= found[:, 2])) > 0.85
