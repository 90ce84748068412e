"""Grids of quantized weights: which codes there are, and the weights that codes and scales stand for.

A group of consecutive inputs of an output row, or the whole row, shares a scale and a zero point; a weight is
``(code - zero) · scale``. Scales are rounded to 16 bits before weights are, so that storing them loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

#: Numbers of bits of a code.
WIDTHS = (2, 3, 4, 8)
#: Group sizes must be multiples of this, so that every group begins at a byte, whatever the number of bits.
MULTIPLE = 8
#: Bits of a stored scale.
SCALE_BITS = 16
#: The smallest scale that 16 bits can hold.
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Grid:
    """A grid that weights are rounded to.

    Attributes
    ----------
    bits
        Of a code.
    group
        Number of consecutive inputs that share a scale; 0 for the whole row.
    symmetric
        Whether codes are symmetric around a fixed zero, ``2^(bits-1)``, and scales are ``2 · max|w| / (2^bits - 1)``
        (AutoGPTQ's and llm-compressor's convention: the largest positive weight is cut by half a step). Otherwise the
        grid spans the weights and 0, with a zero point per group (the convention of GPTQ's authors).
    """

    bits: int
    group: int
    symmetric: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def width(self, inputs: int) -> int:
        """Return how many inputs share a scale."""
        return self.group or inputs

    def fit(self, low: Float[Tensor, "*groups"], high: Float[Tensor, "*groups"]) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, both float32, of groups with these lowest and highest weights.

        A group of zeros has the scale 1.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        spread = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        scale = (spread / self.top).half().float().clamp_(min=_SMALLEST).masked_fill_(spread == 0, 1)
        if self.symmetric:
            return scale, torch.full_like(scale, 1 << (self.bits - 1))
        return scale, (-low / scale).round_().clamp_(0, self.top)

    def quantized(
        self, weight: Float[Tensor, "outputs inputs"], divisors: Float16[Tensor, " inputs"] | None = None
    ) -> Quantized:
        """Round a weight to the nearest values of the grid that spans it.

        Parameters
        ----------
        weight
            The weight, multiplied by the divisors if there are any.
        divisors
            What weights are divided by after they were decoded.
        """
        grouped = weight.float().unflatten(1, (-1, self.width(weight.shape[1])))
        scale, zero = self.fit(*grouped.aminmax(dim=2))
        codes = (grouped / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, self.top)
        return self.coded(codes.flatten(1), scale, zero, divisors)

    def coded(self, codes: Tensor, scale: Tensor, zero: Tensor, divisors: Tensor | None = None) -> Quantized:
        """Return codes, scales and zero points that were computed in float32 in the dtypes that they are stored in."""
        zeros = None if self.symmetric else zero.to(torch.uint8)
        return Quantized(self.bits, codes.to(torch.uint8), scale.half(), zeros, divisors)


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Attributes
    ----------
    bits
        Of a code.
    codes
        The codes.
    scales
        Scale of each group.
    zeros
        Zero point of each group; ``None`` if it is ``2^(bits-1)`` everywhere.
    divisors
        What the decoded weights of each input are divided by (AWQ); ``None`` for nothing.
    """

    bits: int
    codes: UInt8[Tensor, "outputs inputs"]
    scales: Float16[Tensor, "outputs groups"]
    zeros: UInt8[Tensor, "outputs groups"] | None = None
    divisors: Float16[Tensor, " inputs"] | None = None

    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weight that the codes stand for, float32."""
        grouped = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        grouped -= float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.float()[..., None]
        grouped *= self.scales.float()[..., None]
        weight = grouped.flatten(1)
        return weight if self.divisors is None else weight.div_(self.divisors.float())
