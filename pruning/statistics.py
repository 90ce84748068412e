"""What a scoring method may want to know of a projection's inputs, accumulated over the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class InputStatistics:
    """Sums over the tokens that one projection reads, kept in float32 whatever the model's dtype.

    Attributes
    ----------
    squares
        Sum of squares of every input, over all tokens: squared ``‖X_j‖₂``.
    """

    squares: Float[Tensor, " inputs"]

    @classmethod
    def empty(cls, inputs: int, device: torch.device | str = "cpu") -> InputStatistics:
        """Return statistics of no tokens for a projection with `inputs` inputs."""
        return cls(torch.zeros(inputs, dtype=torch.float32, device=device))

    def add(self, x: Float[Tensor, "*tokens inputs"]) -> None:
        """Add a batch of inputs, one row a token."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.squares += rows.square().sum(dim=0)

    @property
    def norms(self) -> Float[Tensor, " inputs"]:
        """``‖X_j‖₂`` of every input."""
        return self.squares.sqrt()
