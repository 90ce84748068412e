from __future__ import annotations

import pytest
import torch

from analysis import plots
from analysis.frames import labels, recipes_of
from analysis.metrics import code_agreement
from pruning.quantization import Grid, Quantized
from pruning.text.calibration import Drawn
from pruning.variants.codes import CodeSet, PackedCodes

BASE = {
    "model": "m",
    "method": "gptq",
    "sparsity": 0.0,
    "pattern": "3bit-g8",
    "allocation": "uniform",
    "scope": "all",
    "propagation": "pruned",
    "item_share": 0.0,
    "bits": 5.375,
}


def columns(calibration, seed=0, **other):
    return BASE | {"calibration": calibration, "seed": seed} | other


def code_set(codes: dict[tuple[int, str], torch.Tensor], bits: int = 3) -> CodeSet:
    return CodeSet(
        {
            key: PackedCodes.pack(Quantized(bits, own, torch.ones(len(own), own.shape[1] // 8, dtype=torch.float16)))
            for key, own in codes.items()
        }
    )


def random_codes(seed: int, bits: int = 3) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_share_of_equal_codes_is_counted_by_projection_and_pair(monkeypatch):
    monkeypatch.setattr(code_agreement, "_AT_A_TIME", 80 * 7)  # several pieces of rows
    one, other = random_codes(0), random_codes(1)
    other[:30] = one[:30]
    codes = {
        "a": code_set({(0, "q"): one, (1, "up"): one}),
        "b": code_set({(0, "q"): other, (1, "up"): one}),
        "c": code_set({(0, "q"): one, (1, "up"): one}),
    }
    described = {"a": columns("en"), "b": columns("sw"), "c": columns("sw", pattern="3bit-g16")}
    text = {
        "a": [Drawn(language="en", pool="p", tokens=((0, 8),))],
        "b": [Drawn(language="en", pool="p", tokens=((6, 14),))],
    }
    frame = code_agreement.analyze(codes, described, text)
    assert set(zip(frame["calibration"], frame["other_calibration"], strict=True)) == {("en", "sw")}
    assert set(frame["shared_text"]) == {0.25}
    found = frame.set_index(["metric", "layer", "role"])["value"]
    equal = sum(int(a == b) for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
    assert found["code_agreement", 0, "q"] == pytest.approx(equal / one.numel())
    assert found["code_agreement", 1, "up"] == 1
    shares = [[codes.flatten().tolist().count(c) / codes.numel() for c in range(8)] for codes in (one, other)]
    assert found["code_agreement_chance", 0, "q"] == pytest.approx(sum(a * b for a, b in zip(*shares, strict=True)))


def test_independent_codes_agree_at_chance():
    codes = {name: code_set({(0, "q"): random_codes(seed)}) for name, seed in (("a", 0), ("b", 1))}
    frame = code_agreement.analyze(codes, {"a": columns("en"), "b": columns("sw")})
    values = frame.set_index("metric")["value"]
    assert values["code_agreement"] == pytest.approx(1 / 8, abs=0.02)
    assert values["code_agreement_chance"] == pytest.approx(1 / 8, abs=0.002)


def test_figures_name_what_they_compare():
    codes = {name: code_set({(0, "q"): random_codes(seed)}) for seed, name in enumerate(("en", "sw", "zh"))}
    frame = code_agreement.analyze(codes, {name: columns(name) for name in codes})
    (recipe,) = recipes_of(frame)
    assert labels.recipe_label(recipe) == "GPTQ, 3 bits, groups of 8"
    assert labels.recipe_slug(recipe) == "gptq-3bit-g8-pruned"
    assert labels.quantized(recipe)
    figure = plots.mask_overlap.heatmap(frame, recipe, metric="code_agreement")
    assert "Agreement of codes (chance 0.125" in figure.get_suptitle()
    lines = plots.mask_overlap.roles(frame, recipe, metric="code_agreement")
    assert "chance (independent codes)" in {text.get_text() for legend in lines.legends for text in legend.get_texts()}


def test_grids_are_no_pruning_patterns():
    assert not labels.quantized(BASE | {"pattern": "row"})
    assert not labels.quantized(BASE | {"pattern": "2:4"})
    assert labels.recipe_label(BASE | {"pattern": "4bit-row", "propagation": "dense"}) == (
        "GPTQ, 4 bits, one scale per row, dense propagation"
    )
    assert Grid(3, 8).width(80) == 8
