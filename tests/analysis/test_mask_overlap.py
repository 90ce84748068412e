from __future__ import annotations

import pytest
import torch

from analysis import mask_overlap
from pruning import MaskSet

BASE = {
    "model": "m",
    "method": "wanda",
    "sparsity": 0.5,
    "pattern": "row",
    "allocation": "uniform",
    "scope": "all",
    "propagation": "pruned",
}


def columns(calibration, seed=0, **other):
    return BASE | {"calibration": calibration, "seed": seed} | other


def random_set(seed: int, density: float = 0.5) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    return MaskSet.pack(
        {(layer, role): torch.rand(200, 300, generator=generator) < density for layer in range(2) for role in "qk"}
    )


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_independent_masks_overlap_at_chance(density):
    masks = {"a": random_set(0, density), "b": random_set(1, density)}
    frame = mask_overlap.analyze(masks, {"a": columns("en"), "b": columns("sw")})
    table = frame.pivot_table(index=["layer", "role"], columns="metric", values="value", observed=True)
    assert len(table) == 4
    assert (table["iou"] - table["iou_chance"]).abs().max() < 0.01
    assert table["iou_chance"].mean() == pytest.approx(density / (2 - density), abs=0.01)  # (1 − s)/(1 + s)


def test_equal_masks_overlap_wholly_and_known_ones_as_known():
    left, right = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    left[:, :4], right[:, 2:6] = True, True  # 2 of 6 in both
    masks = {
        "a": MaskSet.pack({(0, "q"): left}),
        "b": MaskSet.pack({(0, "q"): left}),
        "c": MaskSet.pack({(0, "q"): right}),
    }
    frame = mask_overlap.analyze(masks, {name: columns(name) for name in masks})
    iou = frame[frame["metric"] == "iou"].set_index(["calibration", "other_calibration"])["value"]
    assert iou.to_dict() == {
        ("a", "b"): 1.0,
        ("a", "c"): pytest.approx(1 / 3),
        ("b", "c"): pytest.approx(1 / 3),
    }


def test_only_variants_of_one_recipe_are_compared():
    masks = {name: random_set(i) for i, name in enumerate("abcd")}
    which = {
        "a": columns("en"),
        "b": columns("en", seed=1),
        "c": columns("sw", sparsity=0.3),
        "d": columns("none", method="magnitude"),
    }
    frame = mask_overlap.analyze(masks, which)
    pairs = frame[["calibration", "seed", "other_calibration", "other_seed"]].drop_duplicates()
    assert pairs.to_numpy().tolist() == [["en", 0, "en", 1]]
