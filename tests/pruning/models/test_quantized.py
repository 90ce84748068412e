"""Checkpoints that were quantized elsewhere are decoded while they are loaded, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import saved
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from conftest import tiny_model

from pruning import Anatomy, Variant, load_model
from pruning.errors import ModelError
from pruning.models.quantized import Quantization, stated_quantization

GROUP = 16
INT4 = {"weights": {"num_bits": 4, "group_size": 128, "symmetric": True}}


def compressed(folder: Path, *, symmetric: bool) -> Path:
    """Quantize the projections of a tiny model to 4 bits and save it as compressed-tensors does."""
    model = tiny_model()
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            grouped = module.weight.data.unflatten(1, (-1, GROUP))
            if symmetric:
                module.weight_scale.data.copy_(grouped.abs().amax(dim=2) / 7.5)
            else:
                low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
                module.weight_scale.data.copy_((high - low) / 15)
                module.weight_zero_point.data.copy_((-8 - low / module.weight_scale).round().clamp(-8, 7))
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    saved(model, folder)
    compressor.update_config(str(folder))
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_compressed_checkpoint_becomes_a_variant_of_its_dense_parent(tmp_path, symmetric):
    folder = compressed(tmp_path / "theirs", symmetric=symmetric)
    dense = tiny_model()
    other, _ = load_model(str(folder))
    taken = Variant.between(dense, other, "theirs")
    assert len(taken.masks) == 0
    assert taken.record.found == "quantized (compressed-tensors, 4 bits, groups of 16); its weights were decoded"
    assert taken.columns()["pattern"] == "quantized"
    assert taken.bits() == 4 + (16 if symmetric else 20) / 16
    for key in Anatomy(dense):
        before, weight = Anatomy(dense).weight(*key), taken.weight(key, Anatomy(dense).weight(*key))
        grouped = before.unflatten(1, (-1, GROUP))
        spread = 2 * grouped.abs().amax(dim=2) if symmetric else grouped.amax(dim=2) - grouped.amin(dim=2)
        step = (spread / 15)[..., None]
        assert bool(((weight.unflatten(1, (-1, GROUP)) - grouped).abs() <= 0.51 * step).all())
        assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, r"is quantized \(gptq\).*pip install gptqmodel"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, r"\(awq\).*pip install gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\).*pip install bitsandbytes"),
        ({"quant_method": "mystery"}, r"is quantized \(mystery\), and its weights cannot be decoded here"),
    ],
)
def test_what_cannot_be_decoded_here_is_refused_in_one_line(tmp_path, settings, words):
    folder = compressed(tmp_path / "theirs", symmetric=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=words) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_quantized_checkpoint_is_not_streamed(tmp_path):
    folder = compressed(tmp_path / "theirs", symmetric=True)
    with pytest.raises(ModelError, match="is quantized, so it cannot be streamed; load it whole"):
        load_model(str(folder), stream=True)


@pytest.mark.parametrize(
    ("settings", "stated", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, Quantization("gptq", 4, 128), 4.125),
        (
            {"quant_method": "gptq", "bits": 3, "group_size": -1, "sym": False},
            Quantization("gptq", 3, 0, True),
            3 + 19 / 256,
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
            Quantization("awq", 4, 64, True),
            4 + 20 / 64,
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            Quantization("bitsandbytes", 4, 64, scale=32),
            4.5,
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            Quantization("bitsandbytes", 4, 64, scale=8),
            4.125,
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Quantization("fp8", 8, scale=0), 8),
        ({"quant_method": "mxfp4"}, Quantization("mxfp4", 4, 32, scale=8), 4.25),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": INT4, "b": INT4 | {"targets": ["o_proj"]}}},
            Quantization("compressed-tensors", 4, 128),
            4.125,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": INT4, "b": {"weights": {"num_bits": 8}}}},
            Quantization("compressed-tensors"),
            None,
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Quantization("bitsandbytes", 8), 8 + 16 / 256),
        ({"quant_method": "mystery"}, Quantization("mystery"), None),
    ],
)
def test_what_a_checkpoint_states(tmp_path, settings, stated, bits):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = stated_quantization(tmp_path)
    assert found == stated
    size = found.size(128, 256)
    assert (None if size is None else size / (128 * 256)) == bits


def test_an_ordinary_checkpoint_states_nothing(tmp_path):
    assert stated_quantization(tmp_path) is None
    sparse = {"quant_method": "compressed-tensors", "config_groups": {}, "sparsity_config": {"format": "dense"}}
    for config in ([], {"quantization_config": None}, {"quantization_config": sparse}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert stated_quantization(tmp_path) is None
