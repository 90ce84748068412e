"""Full fine-tuning: every kept weight is a parameter."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..parameters import Parameter
from .registry import SHARED, Recovery, add_gradient


class KeptWeights:
    """The kept weights of one projection, in mask order, in float32 whatever the model's dtype.

    AdamW's step is often smaller than half a unit in the last place of a 16-bit weight, and would be lost in it.

    Parameters
    ----------
    weight, mask
        The weight to start from, ``[outputs, inputs]``, and its mask.
    """

    def __init__(
        self, weight: Float[Tensor, "outputs inputs"], mask: Bool[Tensor, "outputs inputs"], seed: int
    ) -> None:
        del seed  # nothing is drawn
        self._values = nn.Parameter(weight.to(mask.device)[mask].float())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The kept weights."""
        return [self._values]

    def weight(self, mask: Bool[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """Return the weight, zero where it was removed."""
        values = self._values.detach()
        return torch.zeros(mask.shape, device=values.device).masked_scatter_(mask, values)

    def take(self, gradient: Float[Tensor, "outputs inputs"], mask: Bool[Tensor, "outputs inputs"]) -> None:
        """Add the gradient of the kept weights."""
        add_gradient(self._values, gradient[mask].float())


FINE_TUNE = Recovery(
    "fine-tune",
    "gradients of removed weights are dropped, as in Sun et al., ICLR 2024, 2306.11695",
    KeptWeights,
    {**SHARED, "rate": Parameter(1e-5, 1e-9, 1, "learning rate at the start")},
)
