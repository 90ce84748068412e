"""ADMM and least squares against plain float64 versions, on well and badly determined text."""

from __future__ import annotations

import naive
import pytest
import torch
from activations import inputs_like_a_models, statistics_of
from pairwise import pairwise

from pruning.correction import admm, corrector_named, least_squares, registry
from pruning.patterns import pattern_named

CORRECTORS = ["admm", "least-squares"]


def layers(inputs: int, pattern: str = "matrix") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the weights of two matrices, and masks of them by magnitude."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=random) * 0.02 for outputs in (24, 13)]
    chosen = pattern_named(pattern)
    masks = [chosen.keep(weight.abs(), chosen.uniform(tuple(weight.shape), 0.5)) for weight in weights]
    return weights, masks


@pairwise(
    {
        "name": CORRECTORS,
        "size": [(64, 900), (64, 40), (60, 10), (300, 150)],
        "pattern": ["matrix", "row", "2:4"],
        "inputs_die": [False, True],
        "at_a_time": [500, 1 << 23],
    }
)
def test_corrected_weights_are_those_of_a_naive_float64_version(
    name, size, pattern, inputs_die, at_a_time, monkeypatch
):
    monkeypatch.setattr(registry, "AT_A_TIME", at_a_time)
    monkeypatch.setattr(least_squares, "_ENTRIES", 4 * at_a_time)
    x = inputs_like_a_models(*size)
    if inputs_die:
        x[:, [0, 5, size[0] - 1]] = 0
    weights, masks = layers(size[0], pattern)
    copies = [weight.clone() for weight in weights]
    corrected = corrector_named(name).correct(weights, masks, statistics_of(x)).weights
    slow = naive.admm if name == "admm" else naive.least_squares
    for weight, copy, mask, new in zip(weights, copies, masks, corrected, strict=True):
        assert torch.equal(weight, copy)
        assert torch.count_nonzero(new[~mask]) == 0
        before = naive.reconstruction_error(weight, weight * mask, x)
        ours = naive.reconstruction_error(weight, new, x)
        best = naive.reconstruction_error(weight, slow(weight, mask, x), x)
        assert ours == pytest.approx(best, rel=1e-3, abs=1e-4 * before)
        assert ours < before
        if inputs_die:
            # nothing is known of what a dead input does
            torch.testing.assert_close(new[:, 5], (weight * mask)[:, 5], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", CORRECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_is_made_worse_than_its_mask(name, dtype):
    """With few rounds and little penalty ADMM is far from done; where nothing is pruned there is nothing to gain."""
    x = inputs_like_a_models(48, 60)
    weights, masks = layers(48)
    weights = [weight.to(dtype) for weight in weights]
    masks[0][3] = True
    masks[0][4] = False
    masks[1][:] = True
    masks[1][0, 0] = False
    given = {"rounds": 1.0, "penalty": 100.0, "ridge": 0.0} if name == "admm" else {"ridge": 0.0}
    corrected = corrector_named(name).correct(weights, masks, statistics_of(x), **given).weights
    for weight, mask, new in zip(weights, masks, corrected, strict=True):
        assert new.dtype == dtype
        for row in range(len(weight)):
            dense, kept = weight[row : row + 1], mask[row : row + 1]
            before = naive.reconstruction_error(dense, dense * kept, x)
            assert naive.reconstruction_error(dense, new[row : row + 1], x) <= before * (1 + 1e-5)
    assert torch.equal(corrected[0][3], weights[0][3])
    assert not corrected[0][4].any()


def test_admm_comes_to_the_solution_with_the_ridge_which_is_above_least_squares():
    x = inputs_like_a_models(48, 30)
    weights, masks = layers(48)
    c = x.double().square().sum(dim=0).sqrt()
    padded = torch.cat([x.double(), 0.1**0.5 * torch.diag(c)])  # tokens that stand for the ridge
    goal = naive.least_squares(weights[0], masks[0], padded)
    found = admm.correct(weights, masks, statistics_of(x), rounds=500.0).weights[0]
    torch.testing.assert_close(found.double(), goal, rtol=1e-3, atol=1e-5)
    error = naive.reconstruction_error(weights[0], found, x)
    exact = least_squares.correct(weights, masks, statistics_of(x)).weights[0]
    assert naive.reconstruction_error(weights[0], exact, x) < 0.9 * error


def test_the_scale_of_the_gram_matrix_changes_nothing():
    x = inputs_like_a_models(48, 90)
    weights, masks = layers(48)
    for name in CORRECTORS:
        one, other = (
            corrector_named(name).correct(weights, masks, statistics_of(scale * x)).weights[0] for scale in (1, 64)
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_one_inverse_serves_all_masks_with_the_same_ridge_and_penalty(monkeypatch):
    inversions = []
    invert = admm._inverted
    monkeypatch.setattr(admm, "_inverted", lambda *args: inversions.append(args[1:]) or invert(*args))
    statistics = statistics_of(inputs_like_a_models(48, 90))
    for pattern in ("matrix", "row", "2:4"):
        for rounds in (5.0, 20.0):
            admm.correct(*layers(48, pattern), statistics, rounds=rounds)
    admm.correct(*layers(48), statistics, ridge=0.5)
    assert inversions == [(0.1, 1.0), (0.5, 1.0)]
    statistics.add(torch.randn(3, 48))
    admm.correct(*layers(48), statistics)
    assert len(inversions) == 3  # of more text it is another one


def test_least_squares_raises_a_ridge_that_is_too_low_and_says_so():
    weights, masks = layers(48)
    corrected = least_squares.correct(weights, masks, statistics_of(inputs_like_a_models(48, 5)), ridge=0.0)
    assert corrected.remarks[0].startswith("ridge raised from 0 to 1e-0")
    well = least_squares.correct(weights, masks, statistics_of(inputs_like_a_models(48, 500)), ridge=0.0)
    assert well.remarks == ()


@pytest.mark.parametrize("name", CORRECTORS)
def test_a_gram_matrix_that_is_not_finite_is_refused(name):
    x = inputs_like_a_models(48, 90)
    x[3, 7] = torch.inf
    with pytest.raises(ArithmeticError):
        corrector_named(name).correct(*layers(48), statistics_of(x))


def test_errors_of_rows_are_those_of_their_outputs():
    x = inputs_like_a_models(1500, 80)
    change = torch.randn(7, 1500, generator=torch.Generator().manual_seed(2))
    expected = (x.double() @ change.double().T).square().sum(dim=0)
    torch.testing.assert_close(registry.row_errors(change, statistics_of(x)).double(), expected, rtol=1e-4, atol=0)
