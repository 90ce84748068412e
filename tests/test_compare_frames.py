"""The script that holds two study folders against each other sees differences, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.compare_frames import compare
from safetensors.torch import save_file

from analysis.frames import dense_columns, tidy, write_frame

VALUES = np.array([20.0, 3.0, np.inf])


def folder(root, values=VALUES, mask=3, order=(0, 1, 2)):
    languages = ["en", "sw", "zh"]
    rows = [{**dense_columns("m"), "language": languages[i], "metric": "perplexity", "value": values[i]} for i in order]
    write_frame(root / "frames", "perplexity", tidy("perplexity", rows))
    (root / "variants" / "v").mkdir(parents=True)
    save_file({"0.q": torch.tensor([[mask]], dtype=torch.uint8)}, root / "variants" / "v" / "masks.safetensors")
    return root


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, 0),
        ({"order": (2, 0, 1)}, 0),
        ({"values": VALUES * (1 + 1e-6)}, 1e-6),
        ({"values": VALUES + np.array([0, 0.03, 0])}, 0.01),
        ({"values": np.array([20.0, 3.0, 9.0])}, np.inf),
        ({"order": (0, 1)}, np.inf),
        ({"mask": 7}, np.inf),
    ],
    ids=["same", "other order", "rounding", "other value", "infinite in one", "row missing", "other mask"],
)
def test_largest_difference_is_found(tmp_path, change, difference):
    found = [*compare(folder(tmp_path / "old"), folder(tmp_path / "new", **change))]
    assert len(found) == 2
    assert max(one.difference for one in found) == pytest.approx(difference, rel=0.02)
