"""What it costs that a block becomes that of a variant, beside unpacking the masks and multiplying with them.

    make benchmarks, or pytest tests/benchmarks/test_writing_weights.py -s

One block of Llama-3-8B's shape in bfloat16, on a CPU with the threads that torch has.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.harness import headline, in_turn, number, ratios, report
from benchmarks.test_overlap_of_masks import SHAPES

from pruning.variants.apply import write_pruned


def test_written_over_unpacked_and_multiplied(capsys):
    rng = np.random.default_rng(0)
    dense = {role: torch.randn(shape).bfloat16() for role, shape in SHAPES.items()}
    out = {role: torch.empty_like(weight) for role, weight in dense.items()}
    packed = {
        role: rng.integers(0, 256, (rows, columns // 8), dtype=np.uint8) for role, (rows, columns) in SHAPES.items()
    }
    kept = {role: int(np.bitwise_count(bits).sum(dtype=np.int64)) for role, bits in packed.items()}
    values = {role: torch.randn(count).bfloat16() for role, count in kept.items()}

    def masked() -> None:
        for role, weight in dense.items():
            write_pruned(weight, packed[role], out[role])

    def corrected() -> None:
        for role, weight in dense.items():
            write_pruned(weight, packed[role], out[role], values[role])

    def multiplied() -> None:
        for role, weight in dense.items():
            out[role].copy_(weight * torch.from_numpy(np.unpackbits(packed[role], axis=1).view(np.bool_)))

    def scattered() -> None:
        for role, weight in out.items():
            weight.zero_()
            weight[torch.from_numpy(np.unpackbits(packed[role], axis=1).view(np.bool_))] = values[role]

    ways = {"masked": masked, "corrected": corrected, "multiplied": multiplied, "scattered": scattered}
    with capsys.disabled():
        headline(f"a block of Llama-3-8B's shape becomes a variant's, {torch.get_num_threads()} threads")
        measured = in_turn(number("ROUNDS", 3), ways)
        for name, times in measured.items():
            report(f"seconds, {name}", times)
        report("unpacked and multiplied / ours", ratios(measured["multiplied"], measured["masked"]))
        report("unpacked and scattered / ours", ratios(measured["scattered"], measured["corrected"]))
