from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from analysis.stats.permutation import interactions, pairings


def test_a_set_that_suits_its_own_language_comes_first_of_all_sets():
    scores = np.random.default_rng(1).normal(size=(6, 6)) + 9 * np.eye(6)
    assert interactions(scores) == pytest.approx(np.full(6, 1 / 6))


def test_a_set_that_is_better_everywhere_does_not_suit_its_language():
    rng = np.random.default_rng(2)
    better = np.array([9.0, 0, 0, 0, 0, 0])[:, None]
    harder = np.array([0, 5.0, 0, 0, 0, 0])
    scores = rng.normal(size=(6, 6))
    assert interactions(scores + better + harder) == pytest.approx(interactions(scores))


def test_pairings_are_counted_over_all_assignments():
    scores = np.random.default_rng(1).normal(size=(4, 4)) + 3 * np.eye(4)
    sums = [scores[list(order), range(4)].mean() for order in permutations(range(4))]
    own = scores.diagonal().mean()
    tail = min(np.mean(np.array(sums) >= own - 1e-12), np.mean(np.array(sums) <= own + 1e-12))
    assert pairings(scores) == pytest.approx(min(2 * tail, 1))
