"""A small study of a tiny model."""

from __future__ import annotations

STUDY = """
model = "model"
languages = ["en", "sw", "zh"]
[calibration]
sets = ["en", "sw", "all"]
samples = 6
length = 32
extra = [["sw", 1]]
[[recipes]]
method = "wanda"
sparsity = 0.5
[[recipes]]
method = "magnitude"
sparsity = 0.3
[evaluation]
segments = 8
fit_segments = 6
max_length = 40
[tasks]
per_category = 2
"""
