from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from analysis.stats.permutation import exchanged_models, pairings, sign_flips


def test_sign_flips_find_a_difference_and_not_one_below_the_margin():
    rng = np.random.default_rng(0)
    differences = np.stack([rng.normal(1, 0.5, 40), rng.normal(0, 0.5, 40)], axis=1)
    plain = sign_flips(differences, np.zeros(2))
    assert plain[0] < 0.001
    assert plain[1] > 0.05
    assert sign_flips(differences, np.array([2.0, 0.0]))[0] == 1


def test_one_model_among_others_has_a_p_value_of_its_rank():
    assert exchanged_models(np.array([9.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(1 / 4)
    assert exchanged_models(np.array([2.0]), np.array([1.0, 1.9, 3.0])) > 0.5


def test_pairings_are_counted_over_all_assignments():
    scores = np.random.default_rng(1).normal(size=(4, 4)) + 3 * np.eye(4)
    sums = [scores[list(order), range(4)].mean() for order in permutations(range(4))]
    own = scores.diagonal().mean()
    tail = min(np.mean(np.array(sums) >= own - 1e-12), np.mean(np.array(sums) <= own + 1e-12))
    assert pairings(scores) == pytest.approx(min(2 * tail, 1))
