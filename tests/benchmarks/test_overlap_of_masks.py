"""Overlap of every pair of masks of a grid: bit-packed and piece by piece, against boolean arrays.

    make benchmarks, or pytest tests/benchmarks/test_overlap_of_masks.py -s

Eight masks of all projections of a model of Llama-3-8B's shape are as large as 7 GB bit-packed, so a few blocks are timed
and scaled up to all 32.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from benchmarks.harness import headline, in_turn, number, ratios, report, seconds

from pruning.variants.masks import MaskSet, overlaps

SETS = 8
SHAPES = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}


def test_packed_over_boolean(capsys):
    blocks = number("BLOCKS", 2)
    rng = np.random.default_rng(0)
    packed = [
        MaskSet(
            {
                (layer, role): rng.integers(0, 256, (rows, columns // 8), dtype=np.uint8)
                for layer in range(blocks)
                for role, (rows, columns) in SHAPES.items()
            },
            {(layer, role): columns for layer in range(blocks) for role, (_, columns) in SHAPES.items()},
        )
        for _ in range(SETS)
    ]
    found = {}

    def ours() -> None:
        found["ours"] = overlaps(packed)

    def boolean() -> None:
        """One projection at a time, since all of them would not fit into memory."""
        found["boolean"] = {}
        times["boolean, without unpacking"].append(0.0)
        for key in packed[0]:
            masks = [one[key].numpy() for one in packed]

            def count(key=key, masks=masks) -> None:
                both = np.diag([np.count_nonzero(mask) for mask in masks])
                for i, j in combinations(range(SETS), 2):
                    both[i, j] = both[j, i] = np.count_nonzero(masks[i] & masks[j])
                found["boolean"][key] = both

            times["boolean, without unpacking"][-1] += seconds(count)

    times: dict[str, list[float]] = {"boolean, without unpacking": []}
    with capsys.disabled():
        headline(f"overlap of all pairs of {SETS} masks, {blocks} of 32 blocks of Llama-3-8B's shape")
        measured = in_turn(number("ROUNDS", 3), {"ours": ours, "boolean": boolean})
        report("boolean / ours", ratios(times["boolean, without unpacking"], measured["ours"]))
        report("seconds, ours, all 32 blocks (scaled up)", [32 / blocks * value for value in measured["ours"]])
    assert all(np.array_equal(found["ours"][key], found["boolean"][key]) for key in packed[0])
