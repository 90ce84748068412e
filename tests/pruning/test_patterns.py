from __future__ import annotations

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.errors import RecipeError
from pruning.patterns import Columns, known_patterns, n_of_m, pattern_named, removed

#: Few different values, so that there are many ties.
scores = st.tuples(st.integers(1, 9), st.integers(1, 5), st.randoms(use_true_random=False)).map(
    lambda t: torch.tensor([[float(t[2].randrange(4)) for _ in range(4 * t[1])] for _ in range(t[0])])
)
sparsities = st.floats(0, 0.99)


@settings(max_examples=60)
@given(scores, sparsities)
def test_row_removes_the_lowest_of_every_row_as_a_stable_sort_would(scores, sparsity):
    row = pattern_named("row")
    budget = row.uniform(tuple(scores.shape), sparsity)
    assert torch.equal(row.keep(scores, budget), naive.keep_row(scores, sparsity))


@settings(max_examples=60)
@given(scores, sparsities)
def test_matrix_removes_the_lowest_of_all_as_a_stable_sort_would(scores, sparsity):
    matrix = pattern_named("matrix")
    budget = matrix.uniform(tuple(scores.shape), sparsity)
    assert torch.equal(matrix.keep(scores, budget), naive.keep_matrix(scores, sparsity))


@settings(max_examples=60)
@given(scores, st.integers(1, 3))
def test_n_of_m_removes_n_of_every_group_as_a_stable_sort_would(scores, n):
    pattern = pattern_named(f"{n}:4")
    assert torch.equal(pattern.keep(scores, 0), naive.keep_n_m(scores, n, 4))
    assert pattern.uniform(tuple(scores.shape), 0.5) == scores.numel() * n // 4


@settings(max_examples=60)
@given(scores, st.floats(0, 1), st.sampled_from(["row", "matrix"]))
def test_any_budget_is_met_exactly(scores, share, name):
    budget = int(share * scores.numel())
    keep = pattern_named(name).keep(scores, budget)
    assert int((~keep).sum()) == budget
    if name == "row":
        gone = (~keep).sum(dim=1)
        assert int(gone.max() - gone.min()) <= 1


@settings(max_examples=60)
@given(scores, st.floats(0, 1), st.integers(1, 7), st.sampled_from(["row", "matrix"]))
def test_blocks_of_columns_meet_the_budget_together(scores, share, width, name):
    budget = int(share * scores.numel())
    inputs = scores.shape[1]
    gone = torch.zeros(len(scores), dtype=torch.long)
    for start in range(0, inputs, width):
        keep = pattern_named(name).keep(scores[:, start : start + width].contiguous(), budget, Columns(start, inputs))
        gone += (~keep).sum(dim=1)
    assert int(gone.sum()) == budget
    if name == "row":
        assert int(gone.max() - gone.min()) <= 1


def test_groups_of_any_size():
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for m in (2, 8, 16, 64):
        assert torch.equal(pattern_named(f"1:{m}").keep(scores, 0), naive.keep_n_m(scores, 1, m))


@pytest.mark.parametrize("sparsity", [0.29, 0.57, 0.58])  # decimals that are a little less in binary
def test_a_decimal_sparsity_means_what_it_says(sparsity):
    assert removed(100, sparsity) == round(100 * sparsity)


@pytest.mark.parametrize("blocks", [30, 50, 60])
def test_a_decimal_share_of_the_blocks_of_a_large_model_means_what_it_says(blocks):
    """At this size rounding takes away more than a billionth of a weight."""
    weights = blocks * 218_112_000
    for percent in range(1, 100):
        assert removed(weights, percent / 100) == weights * percent // 100


def test_unknown_patterns_are_refused():
    with pytest.raises(RecipeError, match="did you mean"):
        pattern_named("rows")
    for name in ("4:4", "0:4", "5:4", "1:1000"):
        with pytest.raises(RecipeError, match="n out of every m"):
            pattern_named(name)
    assert n_of_m("matrix") is None
    assert set(known_patterns()) == {
        *("row", "matrix", "model", "2:4", "4:8"),
        *("neurons", "heads", "neurons+heads", "blocks"),
    }
