from __future__ import annotations

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.allocation import (
    allocation_named,
    by_block,
    by_matrix,
    diagnosed,
    language_correlation,
    outlier_share,
    shifted,
    shuffled,
    tail_weighted,
    threshold,
)
from pruning.errors import RecipeError
from pruning.spectrum import squared_singular_values, tail_exponent
from pruning.statistics import InputStatistics


def random_blocks(sizes: list[list[tuple[int, int]]]) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64).abs() ** (b + 1) for shape in shapes]
        for b, shapes in enumerate(sizes)
    ]


def test_owl_equals_a_naive_version():
    blocks = random_blocks([[(8, 16), (16, 8)], [(8, 16), (16, 8)], [(8, 16), (32, 8)], [(8, 16), (16, 8)]])
    for outlier, spread in ((5.0, 0.08), (2.0, 0.2)):
        shares = [outlier_share(scores, outlier) for scores in blocks]
        sizes = [sum(score.numel() for score in scores) for scores in blocks]
        expected = naive.owl_block_sparsities(blocks, 0.5, outlier, spread)
        assert shifted(shares, sizes, 0.5, spread) == pytest.approx(expected)
        assert max(shifted(shares, sizes, 0.5, spread)) - min(expected) == pytest.approx(2 * spread)


def test_alpha_equals_a_naive_version():
    blocks = random_blocks([[(24, 16), (16, 40)], [(24, 16), (16, 40)], [(24, 16), (32, 40)]])
    exponents = {
        (layer, role): tail_exponent(squared_singular_values(weight))
        for layer, block in enumerate(blocks)
        for role, weight in zip(("q", "down"), block, strict=True)
    }
    importance = tail_weighted(exponents)
    sizes = [sum(weight.numel() for weight in block) for block in blocks]
    for spread in (0.08, 0.2):
        found = shifted(list(importance.values()), sizes, 0.5, spread)
        assert found == pytest.approx(naive.alpha_block_sparsities(blocks, 0.5, spread), rel=1e-6)


def test_matrices_without_a_spectrum_do_not_count_in_their_block():
    nan = float("nan")
    assert tail_weighted({(0, "q"): nan, (0, "down"): 4.0, (1, "q"): 2.5}) == {0: -4.0, 1: -2.5}
    with pytest.raises(RecipeError, match='allocation "alpha" finds no spectrum in block 1'):
        tail_weighted({(0, "q"): 4.0, (1, "q"): nan})


def test_cross_lingual_correlation_equals_a_naive_version():
    generator = torch.Generator().manual_seed(4)
    groups, norms = [], []
    for block in range(3):
        groups.append([])
        norms.append([])
        for width in (12, 20):
            x = {
                lang: torch.randn(9 + 3 * n, width, generator=generator) + block * torch.arange(width) / 10
                for n, lang in enumerate(("en", "sw", "zh"))
            }
            statistics = InputStatistics(width, frozenset({"squares"}))
            for lang, rows in x.items():
                statistics.add(rows, lang)
            groups[-1].append(statistics)
            norms[-1].append(naive.language_norms(x))
    correlations = [language_correlation(statistics) for statistics in groups]
    expected = naive.cross_lingual_block_sparsities(norms, 0.5, 0.08, 1)
    assert shifted([-c for c in correlations], [1, 1, 1], 0.5, 0.08) == pytest.approx(expected, abs=1e-6)


def test_one_language_has_no_correlation():
    statistics = InputStatistics(4, frozenset({"squares"}))
    statistics.add(torch.randn(3, 4), "en")
    assert language_correlation([statistics]) != language_correlation([statistics])  # NaN


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(0, 80),
)
def test_one_threshold_for_all_matrices_equals_a_stable_sort(first, second, total):
    scores = {(0, "q"): torch.tensor([first]).float(), (1, "k"): torch.tensor([second]).float()}
    total = min(total, len(first) + len(second))
    budgets = threshold(scores, total)
    everything = torch.cat([score.flatten() for score in scores.values()])
    gone = everything.sort(stable=True).indices[:total]
    assert budgets == {(0, "q"): int((gone < len(first)).sum()), (1, "k"): int((gone >= len(first)).sum())}


@given(st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3))
def test_budgets_add_up_to_the_total(sparsities):
    shapes = {(layer, role): (7 + layer, 11) for layer in range(3) for role in ("q", "down")}
    wanted = sum(a * b * sparsities[layer] for (layer, _), (a, b) in shapes.items())
    total = int(wanted)
    budgets = by_block(shapes, dict(enumerate(sparsities)), total)
    assert sum(budgets.values()) == total
    assert all(0 <= budgets[key] <= shapes[key][0] * shapes[key][1] for key in shapes)


def test_a_block_cannot_give_more_than_it_has():
    with pytest.raises(RecipeError, match="lower the spread"):
        shifted([0.0, 1.0], [10, 10], 0.95, 0.1)


def test_equal_blocks_give_the_same():
    assert shifted([0.2, 0.2, 0.2], [1, 2, 3], 0.5, 0.08) == [0.5, 0.5, 0.5]


def test_unknown_allocation_is_refused():
    with pytest.raises(RecipeError, match="did you mean"):
        allocation_named("owls")


SHAPES = {(layer, role): shape for layer in range(6) for role, shape in (("q", (8, 8)), ("down", (8, 20)))}
IMPORTANCE = st.lists(
    st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -1.0]),
    min_size=len(SHAPES),
    max_size=len(SHAPES),
)


@given(IMPORTANCE, st.floats(0.3, 0.7), st.floats(0, 0.15))
def test_a_diagnosis_equals_a_naive_version_however_skewed_it_is(values, sparsity, spread):
    importance = dict(zip(SHAPES, values, strict=True))
    sizes = {key: a * b for key, (a, b) in SHAPES.items()}
    found = diagnosed(importance, SHAPES, sparsity, spread=spread)
    expected = naive.diagnosis_sparsities(importance, sizes, sparsity, spread)
    assert found == pytest.approx(expected, abs=1e-9)


@given(IMPORTANCE, st.floats(0.3, 0.7), st.integers(0, 5))
def test_matrices_that_matter_more_give_a_smaller_share_of_the_same_total(values, sparsity, shuffle):
    importance = dict(zip(SHAPES, values, strict=True))
    total = int(sum(a * b for a, b in SHAPES.values()) * sparsity)
    budgets = by_matrix(SHAPES, diagnosed(importance, SHAPES, sparsity, shuffle=float(shuffle)), total)
    assert sum(budgets.values()) == total
    if not shuffle:
        for one in SHAPES:
            for other in SHAPES:
                if one[1] == other[1] and importance[one] > importance[other]:
                    assert budgets[one] <= budgets[other]


def test_only_ranks_count_and_only_those_in_scope():
    steep = {key: 10.0**n for n, key in enumerate(SHAPES)}
    flat = {key: n - 3.0 for n, key in enumerate(SHAPES)}
    assert diagnosed(steep, SHAPES, 0.5) == diagnosed(flat, SHAPES, 0.5)
    scope = {key: shape for key, shape in SHAPES.items() if key[1] == "q"}
    shares = diagnosed(steep, scope, 0.5)
    assert list(shares) == list(scope)
    assert list(shares.values()) == pytest.approx([0.58, 0.548, 0.516, 0.484, 0.452, 0.42])


@given(IMPORTANCE, st.integers(1, 999_999))
def test_a_shuffle_keeps_the_importances_of_a_role_together(values, seed):
    importance = dict(zip(SHAPES, values, strict=True))
    mixed = shuffled(importance, seed)
    assert list(mixed) == list(importance)
    for role in ("q", "down"):
        assert sorted(mixed[key] for key in SHAPES if key[1] == role) == sorted(
            importance[key] for key in SHAPES if key[1] == role
        )
    assert shuffled(importance, seed) == mixed


def test_shuffles_differ_by_seed_and_role_and_stay_what_they_are():
    importance = {key: float(key[0]) for key in SHAPES}
    orders = {
        seed: tuple(
            tuple(int(v) for k, v in shuffled(importance, seed).items() if k[1] == role) for role in ("q", "down")
        )
        for seed in (1, 2, 3)
    }
    assert len({order for pair in orders.values() for order in pair}) == 6
    assert orders[1] == (
        (5, 3, 0, 4, 1, 2),
        (0, 5, 3, 1, 2, 4),
    )  # a control that is made again years later must be the same


def test_a_diagnosis_cannot_take_more_than_there_is():
    with pytest.raises(RecipeError, match="lower the spread"):
        diagnosed({key: float(key[0]) for key in SHAPES}, SHAPES, 0.95, spread=0.1)
