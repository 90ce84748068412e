"""Swaps against a version that tries all pairs, and exactly as many weights in every row and group."""

from __future__ import annotations

import naive
import pytest
import torch
from pairwise import pairwise

from pruning.correction import swaps
from pruning.patterns import pattern_named
from pruning.statistics import GRAM, InputStatistics


def inputs_like_a_models(inputs: int, tokens: int, together: float) -> torch.Tensor:
    """Return inputs of unequal scales that are correlated, the more the larger `together` is."""
    random = torch.Generator().manual_seed(1)
    scales = torch.randn(inputs, generator=random).exp()
    causes = torch.randn(tokens, 4, generator=random) @ torch.randn(4, inputs, generator=random) * together
    return (torch.randn(tokens, inputs, generator=random) + causes) * scales


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], frozenset({GRAM}))
    statistics.add(x)
    return statistics


def layer(inputs: int, pattern: str, x: torch.Tensor, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    chosen = pattern_named(pattern)
    return weight, chosen.keep(naive.wanda(weight, x), chosen.uniform(tuple(weight.shape), 0.5))


@pairwise(
    {
        "pattern": ["row", "matrix", "2:4", "4:8"],
        "together": [0.0, 0.3, 3.0],
        "tokens": [100, 10],
        "most": [1, 4, 50],
        "first": [1, 32],
        "inputs_die": [False, True],
    }
)
def test_swaps_are_those_of_brute_force(pattern, together, tokens, most, first, inputs_die, monkeypatch):
    monkeypatch.setattr(swaps, "_FIRST", first)
    x = inputs_like_a_models(24, tokens, together)
    if inputs_die:
        x[:, [2, 11]] = 0
    weight, mask = layer(24, pattern, x)
    group = pattern_named(pattern).group
    before = mask.clone()
    refined = swaps.refine(weight, mask, statistics_of(x), pattern_named(pattern), swaps=float(most))
    assert torch.equal(mask, before)
    assert torch.equal(refined.sum(dim=1), mask.sum(dim=1))
    if group:
        assert torch.equal(refined.unflatten(1, (-1, group)).sum(dim=2), mask.unflatten(1, (-1, group)).sum(dim=2))
    expected = naive.swaps(weight, mask, x, most, group)
    if most == 1:
        assert torch.equal(refined, expected)
    for row in range(len(weight)):
        dense = weight[row : row + 1]
        errors = [
            naive.reconstruction_error(dense, dense * kept[row : row + 1], x) for kept in (refined, expected, mask)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-2)
        assert errors[0] <= errors[2]


@pytest.mark.parametrize("together", [0.2, 2.0])
def test_the_best_pair_is_exact_in_wider_rows_also_after_many_swaps(together):
    """Each swap of the fast version is as good as the best of all pairs, all of which are laid out here in float64."""
    x = inputs_like_a_models(200, 150, together)
    weight, mask = layer(200, "row", x, outputs=6)
    gram = x.double().T @ x.double()
    w = weight.double()
    statistics = statistics_of(x)
    for _ in range(25):
        after = swaps.refine(weight, mask, statistics, pattern_named("row"), swaps=1.0)
        for row in range(len(weight)):
            gone = w[row] * ~mask[row]
            c = gram @ gone
            a = (2 * w[row] * c + w[row] ** 2 * gram.diagonal()).masked_fill(~mask[row], torch.inf)
            b = (-2 * w[row] * c + w[row] ** 2 * gram.diagonal()).masked_fill(mask[row], torch.inf)
            pairs = a[:, None] + b[None, :] - 2 * w[row][:, None] * w[row][None, :] * gram
            error = float(gone @ c)
            left = w[row] * ~after[row]
            gained = float(left @ gram @ left) - error
            assert gained == pytest.approx(min(float(pairs.min()), 0), abs=2e-5 * error)
        mask = after


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_rows_without_pruned_or_kept_weights_stay_as_they_are(pattern):
    x = inputs_like_a_models(24, 100, 0.3)
    weight, mask = layer(24, pattern, x)
    mask[1], mask[2] = True, False
    weight[3] = 0
    refined = swaps.refine(weight, mask, statistics_of(x), pattern_named(pattern))
    assert torch.equal(refined[1:4], mask[1:4])
    assert not torch.equal(refined, mask)


def test_more_swaps_leave_less_error_and_the_number_of_rows_at_a_time_makes_no_difference(monkeypatch):
    x = inputs_like_a_models(64, 200, 0.3)
    weight, mask = layer(64, "row", x, outputs=30)
    statistics = statistics_of(x)
    errors = []
    for most in (1, 3, 9, 25):
        kept = swaps.refine(weight, mask, statistics, pattern_named("row"), swaps=float(most))
        assert bool(((kept & ~mask).sum(dim=1) <= most).all())
        errors.append(naive.reconstruction_error(weight, weight * kept, x))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * naive.reconstruction_error(weight, weight * mask, x)
    monkeypatch.setitem(swaps._AT_A_TIME, "cpu", 64 * 7)
    assert torch.equal(swaps.refine(weight, mask, statistics, pattern_named("row")), kept)


def test_weights_of_half_precision_are_compared_in_float32():
    x = inputs_like_a_models(64, 200, 0.3)
    weight, mask = layer(64, "row", x)
    half = weight.to(torch.bfloat16)
    refined = swaps.refine(half, mask, statistics_of(x), pattern_named("row"))
    assert torch.equal(refined, swaps.refine(half.float(), mask, statistics_of(x), pattern_named("row")))


def test_a_gram_matrix_that_is_not_finite_is_refused():
    x = inputs_like_a_models(24, 100, 0.3)
    weight, mask = layer(24, "row", x)
    x[3, 7] = torch.inf
    with pytest.raises(ArithmeticError):
        swaps.refine(weight, mask, statistics_of(x), pattern_named("row"))
