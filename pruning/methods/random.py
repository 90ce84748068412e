"""Random pruning, the control."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import Statistics
from .registry import Method, register


def score(
    weight: Float[Tensor, "outputs inputs"], statistics: Statistics, *, seed: float = 0
) -> Float[Tensor, "outputs inputs"]:
    """Return uniform random float32 numbers, determined by seed and projection and the same on every device."""
    mixed = zlib.crc32(f"{statistics.seed} {int(seed)}".encode())  # the generator uses only 32 bits
    generator = torch.Generator().manual_seed(mixed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


METHOD = register(
    Method(
        "random",
        score,
        source="control",
        parameters={"seed": Parameter(0, 0, 2**31, "seed of the draw", whole=True)},
    )
)
