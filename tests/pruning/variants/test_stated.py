"""Whether the weights of a checkpoint agree with its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pruning import MaskSet
from pruning.patterns import pattern_named
from pruning.variants.stated import Stated, most_kept


@pytest.mark.parametrize("m", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("inputs", [48, 50])
def test_the_fullest_group_is_that_of_a_plain_count(m, inputs):
    generator = torch.Generator().manual_seed(m)
    for share in (0.1, 0.5, 0.9):
        mask = torch.rand(5, inputs, generator=generator) < share
        plain = max(int(row[start : start + m].sum()) for row in mask for start in range(0, inputs - m + 1, m))
        assert most_kept(np.packbits(mask.numpy(), axis=1), inputs, m) == plain


def masks(pattern: str, sparsity: float = 0.5) -> MaskSet:
    generator = torch.Generator().manual_seed(0)
    chosen = pattern_named(pattern)
    return MaskSet.pack(
        {
            (0, role): chosen.keep(torch.rand(96, 64, generator=generator), chosen.uniform((96, 64), sparsity))
            for role in ("q", "down")
        }
    )


@pytest.mark.parametrize(
    ("stated", "really", "wrong"),
    [
        ("row", "row", None),
        ("matrix", "matrix", None),
        ("matrix", "row", None),  # rows that happen to be even contradict no threshold over the matrix
        ("2:4", "2:4", None),
        ("4:8", "2:4", None),  # every 2:4 mask is one
        ("2:4", "4:8", "2 of 2 matrices keep more than 2 of some 4 consecutive inputs"),
        ("2:4", "row", "keep more than 2 of some 4"),
        ("row", "matrix", "the rows of 2 of 2 matrices keep different numbers"),
        ("row", "2:4", "no matrix keeps more than 2 of any 4"),
        ("matrix", "4:8", "no matrix keeps more than 4 of any 8"),
    ],
)
def test_a_stated_pattern_is_compared_with_the_masks(stated, really, wrong):
    found = Stated(method="x", pattern=stated, sparsity=0.5).contradictions(masks(really))
    if wrong is None:
        assert found == {}
    else:
        assert found.keys() == {"pattern"}
        assert wrong in found["pattern"]


def test_a_stated_sparsity_is_compared_with_the_measured_one():
    assert Stated(sparsity=0.3).contradictions(masks("row", 0.3)) == {}
    found = Stated(sparsity=0.5).contradictions(masks("row", 0.3))
    assert found == {"sparsity": "29.7% of its weights were removed, not 50.0%"}
    found = Stated(sparsity=0.5, pattern="2:4").contradictions(MaskSet({}, {}))
    assert found == {
        "sparsity": "0.0% of its weights were removed, not 50.0%",
        "pattern": "its pattern is not 2:4: it has no masks",
    }


def test_method_calibration_and_seed_are_taken_on_trust_unless_the_recipe_is_known():
    stated = Stated(method="wanda", calibration="sw", seed=42)
    assert stated.contradictions(masks("row")) == {}
    recipe = {"method": "wanda", "calibration": "en", "seed": 42}
    assert stated.contradictions(masks("row"), recipe) == {"calibration": "its recipe has calibration en, not sw"}
