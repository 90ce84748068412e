"""Checkpoints that were quantized elsewhere: what they state, and how transformers decodes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, first_line
from ..quantization import SCALE_BITS
from .checkpoint import CONFIG

#: Kinds that transformers decodes while loading, if their settings ask for it.
_DECODED_WHILE_LOADING = ("compressed-tensors", "fp8", "mxfp4")
#: What each kind needs besides.
_NEEDS = {
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint says that its weights are quantized.

    Attributes
    ----------
    method
        ``compressed-tensors``, ``gptq``, ``awq``, ``bitsandbytes`` and so on.
    bits
        Of a code; 0 if it does not say so.
    group
        Number of inputs that share a scale; 0 for a row, or if it does not say so.
    zeros
        Whether groups have zero points.
    scale
        Bits of a scale.
    """

    method: str
    bits: int = 0
    group: int = 0
    zeros: bool = False
    scale: int = SCALE_BITS

    def size(self, outputs: int, inputs: int) -> float | None:
        """Return the bits that a matrix takes, or ``None`` if the checkpoint does not say enough."""
        if not self.bits:
            return None
        groups = outputs * -(-inputs // (self.group or inputs))
        return float(outputs * inputs * self.bits + groups * (self.scale + (self.bits if self.zeros else 0)))

    def __str__(self) -> str:
        """Describe it in words."""
        bits = f", {self.bits} bits" if self.bits else ""
        return f"{self.method}{bits}" + (f", groups of {self.group}" if self.group else "")


def stated_quantization(folder: Path) -> Quantization | None:
    """Return what the configuration of a checkpoint says about its quantization.

    ``None`` if it is not quantized, or only sparse (which compressed-tensors can be too).
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
        return _quantization(settings) if isinstance(settings, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _quantization(settings: Mapping[str, Any]) -> Quantization | None:
    method = _method(settings)
    if method == "compressed-tensors":
        grids = [scheme["weights"] for scheme in dict(settings["config_groups"]).values()]
        stated = {_compressed_tensors(grid) for grid in grids if grid}
        if len(stated) > 1:  # which modules have which grid is stated by patterns of names
            return Quantization(method)
        return stated.pop() if stated else None
    if method == "fp8":  # blocks of 128 x 128 weights share a scale, which counts next to nothing
        return Quantization(method, 8, scale=0)
    if method == "mxfp4":
        return Quantization(method, 4, 32, scale=8)
    if method == "bitsandbytes":
        twice = bool(settings.get("bnb_4bit_use_double_quant"))  # then the scales are quantized to 8 bits
        four = Quantization(method, 4, 64, scale=8 if twice else 32)
        return four if settings.get("load_in_4bit") else Quantization(method, 8)
    bits = int(settings.get("bits") or settings.get("w_bit") or 0)
    group = int(settings.get("group_size") or settings.get("q_group_size") or 0)
    zeros = not settings.get("sym", True) or bool(settings.get("zero_point"))
    return Quantization(method, bits, max(group, 0), zeros)


def _compressed_tensors(grid: Mapping[str, Any]) -> Quantization:
    group = max(int(grid.get("group_size") or 0), 0)
    return Quantization("compressed-tensors", int(grid["num_bits"]), group, not grid.get("symmetric", True))


def _method(settings: Mapping[str, Any]) -> str:
    known = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown")
    return str(getattr(known, "value", known))


def ask_for_decoding(config: Any) -> str | None:
    """Return the kind of quantization of a configuration, which is changed to ask transformers to decode the weights.

    Returns ``None`` if the checkpoint is not quantized.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = dict(settings if isinstance(settings, Mapping) else settings.to_dict())
    method = _method(settings)
    if method in _DECODED_WHILE_LOADING:
        config.quantization_config = settings | {"dequantize": True}
    return method


def decoded(model: Any, method: str) -> Any:
    """Return a loaded model with ordinary weights, whatever they were stored as."""
    return model if method in _DECODED_WHILE_LOADING else model.dequantize()


def cannot_decode(folder: Path, method: str, error: BaseException) -> ModelError:
    """Return the error for a quantized checkpoint whose weights cannot be decoded on this machine."""
    need = f"pip install {_NEEDS[method]} (it may need a GPU)" if method in _NEEDS else "decode it elsewhere"
    return ModelError(
        f"model {folder} is quantized ({method}), and its weights cannot be decoded here ({first_line(error)}): "
        f"{need}, or give a checkpoint with decoded weights"
    )
