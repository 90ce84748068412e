"""DSnoT against a plain float64 loop over rows and cycles."""

from __future__ import annotations

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.correction import dsnot, refiner_named
from pruning.patterns import pattern_named
from pruning.statistics import MOMENTS, SQUARES, InputStatistics


def inputs_like_a_models(inputs: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Return inputs whose means and scales differ."""
    random = torch.Generator().manual_seed(seed)
    scales, means = (torch.randn(inputs, generator=random) for _ in range(2))
    return (torch.randn(tokens, inputs, generator=random) + 0.3 * means) * scales.exp()


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], frozenset({MOMENTS, SQUARES}))
    for rows in x.split(100):
        statistics.add(rows)
    return statistics


def layer(inputs: int, pattern: str, outputs: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of a matrix, and a mask of it by magnitude."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02
    chosen = pattern_named(pattern)
    return weight, chosen.keep(weight.abs(), chosen.uniform(tuple(weight.shape), 0.5))


def expected_errors(weight: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return ((weight.double() * ~mask) @ (2048 * x.double().mean(dim=0))).abs()


@pytest.mark.parametrize("pattern", ["row", "matrix", "model", "2:4", "4:8"])
@pytest.mark.parametrize("parameters", [{}, {"cycles": 3.0}, {"tolerance": 5.0}], ids=["default", "few", "lenient"])
@pytest.mark.parametrize("at_a_time", [100, 1 << 20], ids=["row by row", "at once"])
def test_masks_equal_a_naive_version(pattern, parameters, at_a_time, monkeypatch):
    monkeypatch.setattr(dsnot, "_AT_A_TIME", {"cpu": at_a_time})
    x = inputs_like_a_models(64, 300)
    weight, mask = layer(64, pattern)
    before = mask.clone()
    chosen = pattern_named(pattern)
    refined = dsnot.refine(weight, mask, statistics_of(x), chosen, **parameters)
    assert torch.equal(refined, naive.dsnot(weight, x, mask, chosen.group, **parameters))
    assert torch.equal(mask, before)
    assert not torch.equal(refined, mask)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["row", "matrix", "2:4"]), st.sampled_from([4, 12, 40]))
def test_every_row_and_group_keeps_as_many_weights(seed, pattern, inputs):
    x = inputs_like_a_models(inputs, 30, seed)
    x[:, seed % inputs] = 0  # dead
    x[:, (seed + 1) % inputs] = 2  # constant
    weight, mask = layer(inputs, pattern, outputs=9, seed=seed)
    chosen = pattern_named(pattern)
    refined = dsnot.refine(weight, mask, statistics_of(x), chosen)
    group = chosen.group or inputs
    assert torch.equal(refined.unflatten(1, (-1, group)).sum(2), mask.unflatten(1, (-1, group)).sum(2))


def test_the_expected_error_of_most_rows_falls_below_the_tolerance():
    x = inputs_like_a_models(256, 500)
    weight, mask = layer(256, "row", outputs=64)
    refined = dsnot.refine(weight, mask, statistics_of(x), pattern_named("row"), tolerance=2.0)
    before, after = (expected_errors(weight, kept, x) for kept in (mask, refined))
    assert float((before > 2).double().mean()) > 0.8
    assert float((after > 2).double().mean()) < 0.4
    assert float(after.median()) < float(before.median()) / 3


def test_a_row_within_the_tolerance_stays_as_it_is():
    x = inputs_like_a_models(32, 100)
    weight, mask = layer(32, "row")
    errors = expected_errors(weight, mask, x)
    limit = float(errors.quantile(0.5))  # halfway between two rows: rounding does not decide
    refined = dsnot.refine(weight, mask, statistics_of(x), pattern_named("row"), tolerance=limit)
    same = (refined == mask).all(dim=1)
    assert torch.equal(same, errors <= limit)


def test_the_length_of_sequences_does_not_matter():
    x = inputs_like_a_models(32, 96)
    weight, mask = layer(32, "row")
    one, other = statistics_of(x), InputStatistics(32, frozenset({MOMENTS, SQUARES}))
    other.add(x.reshape(12, 8, 32))
    assert torch.equal(*(dsnot.refine(weight, mask, s, pattern_named("row")) for s in (one, other)))


def test_it_needs_no_gram_matrix():
    assert refiner_named("dsnot").needs == {MOMENTS, SQUARES}
