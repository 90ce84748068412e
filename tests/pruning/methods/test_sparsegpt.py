"""SparseGPT's solver on matrices that are wider than its blocks, stretches and panels of columns."""

from __future__ import annotations

import naive
import pytest
import torch
from activations import inputs_like_a_models, statistics_of
from pairwise import pairwise

from pruning.methods import sparsegpt
from pruning.methods.columns import factorize
from pruning.patterns import pattern_named
from pruning.statistics import Statistics


@pairwise(
    {
        "size": [(700, 128), (700, 8), (96, 100), (100, 3)],
        "pattern": ["matrix", "row", "2:4"],
        "inputs_die": [False, True],
    }
)
def test_wide_matrices_are_solved_as_published(size, pattern, inputs_die):
    inputs, columns = size
    x = inputs_like_a_models(inputs, 900)
    if inputs_die:
        x[:, [0, 5, inputs // 2, inputs - 1]] = 0
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=random) * 0.02 for outputs in (24, 40)]
    copies = [weight.clone() for weight in weights]
    chosen = pattern_named(pattern)
    budgets = [chosen.uniform(tuple(weight.shape), 0.5) for weight in weights]
    solved = sparsegpt.solve(weights, Statistics(statistics_of(x)), chosen, budgets, columns=float(columns))
    # the published code has groups of n:m begin anew in every block: there blocks are whole groups
    block = -(-columns // 4) * 4 if pattern == "2:4" else columns
    for weight, copy, mask, pruned, budget in zip(weights, copies, solved.masks, solved.weights, budgets, strict=True):
        assert torch.equal(weight, copy)
        assert int((~mask).sum()) == budget
        assert torch.count_nonzero(pruned[~mask]) == 0
        share, kind = (None, (2, 4)) if pattern == "2:4" else (0.5, pattern)
        _, published = naive.sparsegpt(weight, x, share, kind, block=block)
        ours = naive.reconstruction_error(weight, pruned, x)
        assert ours == pytest.approx(naive.reconstruction_error(weight, published, x), rel=0.02)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_the_factor_times_itself_is_the_matrix(size):
    x = inputs_like_a_models(size, 2 * size + 10).double()
    gram = x.T @ x + torch.eye(size, dtype=torch.float64)
    upper = gram.float()
    upper.tril_(-1).add_(gram.float().triu())  # what is below the diagonal is not looked at
    assert factorize(upper)
    factor = upper.triu().double()
    assert ((factor @ factor.T - gram).norm() / gram.norm()).item() < 1e-5


@pytest.mark.parametrize("place", [0, 300, 599])
def test_a_matrix_without_a_factor_is_noticed(place):
    for wrong in (-1.0, torch.nan):
        matrix = torch.eye(600)
        matrix[place, place] = wrong
        assert not factorize(matrix)
