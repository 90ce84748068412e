"""Controls are like what they are compared with in all but what is in question."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.metrics.controls import random_neurons, random_subspaces


def orthonormal(hidden, rank, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(hidden, rank)))[0]


@pytest.mark.parametrize("share", [0.1, 1.0, 8.0])
def test_random_subspaces_carry_as_much_pruning_error_and_lie_elsewhere(share):
    """Whether that is much less or more than the error in three directions drawn without a match."""
    rng = np.random.default_rng(1)
    basis = orthonormal(48, 3)
    errors = rng.normal(size=(30, 48)) * np.geomspace(8, 0.1, 48)
    errors -= (errors @ basis) @ basis.T
    errors += share * rng.normal(size=(30, 3)) @ basis.T
    carried = np.square(errors @ basis).sum()
    drawn = list(random_subspaces(basis, errors, draws=6))
    assert len(drawn) == 6
    for found in drawn:
        np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(3), atol=1e-8)
        assert np.abs(found.basis.T @ basis).max() < 1e-8
        assert found.error_ratio == pytest.approx(np.square(errors @ found.basis).sum() / carried)
    spread = [np.square(errors @ found.basis).sum() for found in random_subspaces(basis, None, draws=6)]
    assert [found.error_ratio for found in drawn] == pytest.approx([1] * 6, rel=0.05)
    assert len({round(float(found.basis[0, 0]), 6) for found in drawn}) == 6
    assert all(abs(other / carried - 1) > 0.2 for other in spread) or share == 1


def test_where_no_other_subspace_has_as_much_error_the_ratio_says_so():
    basis = orthonormal(16, 2)
    errors = 100 * np.random.default_rng(0).normal(size=(9, 2)) @ basis.T
    errors += 0.1 * np.random.default_rng(1).normal(size=(9, 16))
    assert all(0 < found.error_ratio < 0.01 for found in random_subspaces(basis, errors, draws=3))


def test_draws_are_the_same_each_time():
    basis, errors = orthonormal(16, 2), np.random.default_rng(0).normal(size=(9, 16))
    first, again, other = (list(random_subspaces(basis, errors, draws=2, seed=seed)) for seed in (3, 3, 4))
    assert np.array_equal(first[1].basis, again[1].basis)
    assert not np.allclose(first[1].basis, other[1].basis)


def test_random_neurons_are_of_the_same_block_and_fire_as_often():
    rng = np.random.default_rng(0)
    rates = rng.random((3, 500))
    chosen = {0: np.argsort(-rates[0])[:6].tolist(), 2: [4, 9]}
    drawn = list(random_neurons(chosen, 500, rates, draws=20))
    assert len(drawn) == 20
    for found in drawn:
        assert {layer: len(columns) for layer, columns in found.items()} == {0: 6, 2: 2}
        for layer, columns in found.items():
            assert not set(columns.tolist()) & set(chosen[layer])
            assert rates[layer][columns].mean() == pytest.approx(rates[layer][chosen[layer]].mean(), abs=0.06)
    assert len({tuple(found[0].tolist()) for found in drawn}) > 15
    unmatched = [rates[0][found[0]].mean() for found in random_neurons(chosen, 500, None, draws=20)]
    assert np.mean(unmatched) < 0.7


def test_a_block_with_hardly_any_other_neurons_gives_those_it_has():
    (found,) = random_neurons({0: [0, 1, 2]}, 5, np.random.default_rng(0).random((1, 5)), draws=1)
    assert found[0].tolist() == [3, 4]
