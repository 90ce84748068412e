"""GPTQ's solver on one matrix over the published algorithm: time, and what is left of the layer's output.

    make benchmarks, or pytest tests/benchmarks/test_gptq_solver.py -s -k 4096x4096

Factorization and column sweep are timed; gathering the Gram matrix is not, nor is sharing it between projections and
with SparseGPT.
"""

from __future__ import annotations

import pytest
import torch
from benchmarks.harness import headline, in_words, number, pairs, seconds
from benchmarks.published import gptq_sweep, inverse_factor
from benchmarks.test_sparsegpt_solver import LONG, inputs_like_a_models, reconstruction_error, report_in_turn
from torch import Tensor

from pruning.methods import columns, gptq, rtn
from pruning.quantization import Grid
from pruning.statistics import InputStatistics, Statistics


@pytest.fixture(scope="module", params=pairs("SHAPES", "4096x4096"), ids=in_words)
def layer(request: pytest.FixtureRequest) -> tuple[Tensor, InputStatistics]:
    outputs, inputs = request.param
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.02, inputs_like_a_models(inputs)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 0), (2, 32)], ids=["4bit-g128", "4bit-row", "2bit-g32"])
def test_published_over_ours(layer, bits, group, capsys):
    weight, inputs = layer
    gram = inputs.gram
    grid = Grid(bits, group)
    parts: dict[str, list[float]] = {"factorization": [], "column sweep": [], "our factorization": []}
    found: dict[str, Tensor] = {}

    def plain() -> None:
        hessian, dense, upper = gram.clone(), weight.clone(), []
        parts["factorization"].append(seconds(lambda: upper.append(inverse_factor(hessian))))  # noqa: F821, deleted below
        del hessian
        parts["column sweep"].append(seconds(lambda: found.update(plain=gptq_sweep(dense, upper[0], bits, group))))

    def ours() -> None:
        inputs.memo.clear()
        parts["our factorization"].append(seconds(lambda: columns.factor(inputs, 0.01)))
        coded = gptq.quantize([weight], Statistics(inputs), grid, ["q"])
        inputs.memo.clear()
        assert not coded.remarks
        found["ours"] = coded.weights[0].weight()

    with capsys.disabled():
        headline(
            f"GPTQ, one matrix of {weight.shape[0]} outputs x {weight.shape[1]} inputs, {bits} bits, group {group}"
        )
        report_in_turn(plain, ours, parts, rounds=1 if weight.shape[1] >= LONG else number("ROUNDS", 3))
        errors = {name: reconstruction_error(weight - made, gram) for name, made in found.items()}
        rounded = rtn.quantize([weight], Statistics(), grid, ["q"]).weights[0].weight()
        nearest = reconstruction_error(weight - rounded, gram)
        print(f"  reconstruction error, ours / published: {errors['ours'] / errors['plain']:.6f}")
        print(f"  reconstruction error, ours / rounding to nearest: {errors['ours'] / nearest:.4f}")
    # Grids of groups narrower than a block are fitted on updated weights here, on older ones there.
    assert errors["ours"] < errors["plain"] * (1.01 if group else 1.02)
    assert errors["ours"] < nearest
