"""SparseGPT's solver on one matrix over the published algorithm: time, and what is left of the layer's output.

    make benchmarks, or pytest tests/benchmarks/test_sparsegpt_solver.py -s -k 4096x4096

Factorization and column sweep are timed; gathering the Gram matrix is not, nor is sharing it between projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from benchmarks.harness import headline, in_turn, in_words, number, pairs, ratios, report, seconds
from benchmarks.published import column_sweep, inverse_factor
from torch import Tensor

from pruning.methods import columns, sparsegpt
from pruning.patterns import pattern_named
from pruning.statistics import GRAM, InputStatistics, Statistics

#: Tokens that the Gram matrix is of, at the most; the damping makes it regular.
TOKENS = 8192
#: Inputs from which on the published algorithm, which then takes minutes, runs once.
LONG = 8192


@pytest.fixture(scope="module", params=pairs("SHAPES", "4096x4096 4096x14336"), ids=in_words)
def layer(request: pytest.FixtureRequest) -> tuple[Tensor, InputStatistics]:
    outputs, inputs = request.param
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02, inputs_like_a_models(inputs)


def inputs_like_a_models(inputs: int) -> InputStatistics:
    """Return the Gram matrix of inputs with common causes, unequal scales, and a few features that dwarf the others."""
    random = torch.Generator().manual_seed(1)
    scales = torch.randn(inputs, generator=random).mul(0.5).exp()
    scales[torch.randperm(inputs, generator=random)[: max(inputs // 512, 1)]] *= 20
    causes = torch.randn(64, inputs, generator=random) / 8
    statistics = InputStatistics(inputs, frozenset({GRAM}))
    for begin in range(0, min(2 * inputs, TOKENS), 1024):
        tokens = min(1024, min(2 * inputs, TOKENS) - begin)
        x = torch.randn(tokens, inputs, generator=random)
        statistics.add(x.addmm_(torch.randn(tokens, 64, generator=random), causes).mul_(scales))
    return statistics


@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
def test_published_over_ours(layer, pattern, capsys):
    weight, inputs = layer
    gram = inputs.gram
    group = pattern_named(pattern).group
    budget = pattern_named(pattern).uniform(tuple(weight.shape), 0.5)
    parts: dict[str, list[float]] = {"factorization": [], "column sweep": [], "our factorization": []}
    found: dict[str, Tensor] = {}

    def plain() -> None:
        hessian = gram.clone()
        pruned = weight.clone()
        upper: list[Tensor] = []
        parts["factorization"].append(seconds(lambda: upper.append(inverse_factor(hessian))))  # noqa: F821, it is deleted later
        del hessian
        parts["column sweep"].append(seconds(lambda: column_sweep(pruned, upper[0], 0.5, group)))
        found["plain"] = pruned

    def ours() -> None:
        inputs.memo.clear()
        parts["our factorization"].append(seconds(lambda: columns.factor(inputs, 0.01)))
        solved = sparsegpt.solve([weight], Statistics(inputs), pattern_named(pattern), [budget])
        inputs.memo.clear()
        assert not solved.remarks
        found["ours"] = solved.weights[0]

    with capsys.disabled():
        headline(f"SparseGPT, one matrix of {weight.shape[0]} outputs x {weight.shape[1]} inputs, pattern {pattern}")
        report_in_turn(plain, ours, parts, rounds=1 if weight.shape[1] >= LONG else number("ROUNDS", 3))
        errors = {name: reconstruction_error(weight - pruned, gram) for name, pruned in found.items()}
        print(f"  reconstruction error, ours / published: {errors['ours'] / errors['plain']:.6f}")
        mean = gram.diagonal().mean() * weight.square().sum()
        print(
            f"  reconstruction error, over mean square of the inputs x sum of squared weights: {errors['ours'] / mean:.4f}"
        )
    shares = {name: float((pruned == 0).float().mean()) for name, pruned in found.items()}
    assert shares["ours"] == pytest.approx(0.5, abs=1e-6)
    assert shares["plain"] == pytest.approx(0.5, abs=1e-3)
    assert errors["ours"] == pytest.approx(errors["plain"], rel=0.02)


def report_in_turn(
    plain: Callable[[], None], ours: Callable[[], None], parts: Mapping[str, list[float]], *, rounds: int
) -> None:
    """Run both solvers in turn, and print the ratios of their times.

    Parameters
    ----------
    plain, ours
        The published solver and ours.
    parts
        Seconds to which they add those of ``factorization`` and ``column sweep``, and of ``our factorization``.
    rounds
        How often both run.
    """
    times = in_turn(rounds, {"plain": plain, "ours": ours})
    # Theirs without the copies that are made here, since it works in place.
    times["plain"] = [sum(both) for both in zip(parts["factorization"], parts["column sweep"], strict=True)]
    sweeps = [whole - factor for whole, factor in zip(times["ours"], parts["our factorization"], strict=True)]
    report("published / ours", ratios(times["plain"], times["ours"]))
    report("published / ours, factorization", ratios(parts["factorization"], parts["our factorization"]))
    report("published / ours, column sweep", ratios(parts["column sweep"], sweeps))
    report("seconds, published", times["plain"])
    report("seconds, ours", times["ours"])


def reconstruction_error(difference: Tensor, gram: Tensor) -> float:
    """Return what the difference of two weights does to the layer's output: ``tr(D G Dᵀ)``."""
    return sum(float(((rows @ gram) * rows).sum(dtype=torch.float64)) for rows in difference.split(512))
