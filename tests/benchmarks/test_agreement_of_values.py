"""Agreement of the corrected weights of a grid, against the same with boolean masks and whole matrices scattered.

    make benchmarks, or pytest tests/benchmarks/test_agreement_of_values.py -s

Two matrices of one block of Llama-3-8B's shape are compared, read from files as in a study, and scaled up to all.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.harness import headline, in_turn, number, ratios, report

from analysis.metrics import mask_overlap
from pruning import CalibrationSet, MaskSet, Recipe, Variant
from pruning.variants.store import VariantRecord

SHAPES = {(0, "o"): (1024, 4096), (0, "down"): (512, 14336)}
#: Weights of all projections of Llama-3-8B.
WEIGHTS = 6_979_321_856


def plainly(variants, key, dense):
    """Return the same cosines, with a boolean mask and a scattered copy of each variant's rows."""
    count = len(variants)
    dots, squares = torch.zeros(2, 2, count, count, dtype=torch.float64)
    rows = max((1 << 20) // (count * dense.shape[1]), 1)
    passed = [0] * count
    for start in range(0, len(dense), rows):
        before = dense[start : start + rows].float()
        masks = [variant.masks.rows(key, start, start + rows) for variant in variants]
        weights = []
        for i, (variant, mask) in enumerate(zip(variants, masks, strict=True)):
            kept = int(mask.sum())
            weight = torch.zeros_like(before)
            weight[mask] = variant.values.stretch(key, passed[i], passed[i] + kept).to(weight)
            passed[i] += kept
            weights.append(weight.flatten())
        kept = torch.stack([mask.flatten() for mask in masks]).float()
        values = torch.stack(weights)
        for which, those in enumerate((values, (values - before.flatten()) * kept)):
            dots[which] += those @ those.T
            squares[which] += those.square() @ kept.T
    cosines = dots / (squares * squares.mT).sqrt()
    return cosines[0].numpy(), cosines[1].numpy()


@pytest.mark.parametrize("variants", [7, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_packed_over_boolean(tmp_path, capsys, variants, dtype):
    random = torch.Generator().manual_seed(0)
    dense = {key: torch.randn(shape, generator=random).to(dtype) for key, shape in SHAPES.items()}
    opened = []
    for seed in range(variants):
        masks = {key: torch.rand(shape, generator=random) < 0.5 for key, shape in SHAPES.items()}
        change = {key: 0.1 * torch.randn(shape, generator=random).to(dtype) for key, shape in SHAPES.items()}
        values = {key: (dense[key] + change[key])[masks[key]] for key in SHAPES}
        record = VariantRecord(
            id=f"v{seed}",
            model="m",
            model_fingerprint="f",
            recipe=Recipe(method="sparsegpt", sparsity=0.5),
            calibration=CalibrationSet.named("en", samples=1, seed=seed),
        )
        Variant(record, MaskSet.pack(masks), values).save(tmp_path / record.id)
        opened.append(Variant.open(tmp_path / record.id))
    found = {}

    def ours() -> None:
        found["ours"] = [mask_overlap._cosines(opened, key, dense[key]) for key in SHAPES]

    def boolean() -> None:
        found["boolean"] = [plainly(opened, key, dense[key]) for key in SHAPES]

    weights = variants * sum(outputs * inputs for outputs, inputs in SHAPES.values())
    with capsys.disabled():
        headline(f"cosines of all pairs of {variants} corrected variants, {str(dtype).partition('.')[2]}")
        measured = in_turn(number("ROUNDS", 3), {"ours": ours, "boolean": boolean})
        report("boolean / ours", ratios(measured["boolean"], measured["ours"]))
        report("ns a weight and variant, ours", [1e9 * value / weights for value in measured["ours"]])
        report("minutes, ours, all of Llama-3-8B", [v / weights * WEIGHTS * variants / 60 for v in measured["ours"]])
    for one, other in zip(found["ours"], found["boolean"], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
