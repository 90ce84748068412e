from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pruning.errors import RecipeError
from pruning.patterns import known_patterns, matrix, pattern_named, removed, row

# Few distinct values, so that ties are the rule.
tied_scores = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=st.sampled_from([0, 1, 2]))
sparsities = st.floats(0.01, 0.99)


def naive(scores: np.ndarray, k: int) -> np.ndarray:
    """Remove the first k of a stable sort."""
    keep = np.ones(scores.shape, dtype=bool)
    keep[np.argsort(scores, kind="stable")[:k]] = False
    return keep


@settings(deadline=None)
@given(tied_scores, sparsities)
def test_row_removes_the_first_of_a_stable_sort_in_every_row(scores, sparsity):
    expected = np.stack([naive(line, removed(scores.shape[1], sparsity)) for line in scores])
    assert np.array_equal(row(torch.from_numpy(scores), sparsity).numpy(), expected)


@settings(deadline=None)
@given(tied_scores, sparsities)
def test_matrix_removes_the_first_of_a_stable_sort_of_all(scores, sparsity):
    expected = naive(scores.ravel(), removed(scores.size, sparsity)).reshape(scores.shape)
    assert np.array_equal(matrix(torch.from_numpy(scores), sparsity).numpy(), expected)


def test_half_of_bf16_weights_is_exactly_half():
    scores = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs()
    assert scores.unique().numel() < scores.numel()  # there are ties
    assert int(matrix(scores, 0.5).sum()) == 3200
    assert (row(scores, 0.5).sum(dim=1) == 50).all()


def test_unknown_pattern_is_refused_with_a_suggestion():
    with pytest.raises(RecipeError, match='did you mean "matrix"'):
        pattern_named("matrx")
    assert set(known_patterns()) == {"row", "matrix"}
