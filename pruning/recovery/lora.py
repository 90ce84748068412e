"""LoRA under the mask: a product of two narrow matrices is added to every weight, and removed weights stay zero."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..parameters import Parameter
from .registry import SHARED, Recovery, add_gradient


class Adapter:
    """The two factors of one projection's change (Hu et al., ICLR 2022, 2106.09685), masked.

    The weight is ``M ∘ (W + α/r · B A)``. The loss is that of this weight, so what is trained is what is stored, and
    merging changes nothing. At the start B is zero, and A is uniform within ±1/√inputs.

    Parameters
    ----------
    weight, mask
        The weight W to start from, ``[outputs, inputs]``, which is not copied, and its mask M.
    seed
        Decides A.
    rank
        The rank r of the change.
    alpha
        α.
    """

    def __init__(
        self,
        weight: Float[Tensor, "outputs inputs"],
        mask: Bool[Tensor, "outputs inputs"],
        seed: int,
        *,
        rank: float = 8,
        alpha: float = 16,
    ) -> None:
        outputs, inputs = weight.shape
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(int(rank), inputs, generator=generator).mul_(2).sub_(1).div_(inputs**0.5)
        self._start = weight
        self._scale = alpha / rank
        self._a = nn.Parameter(uniform.to(mask.device))
        self._b = nn.Parameter(torch.zeros(outputs, int(rank), device=mask.device))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A ``[rank, inputs]`` and B ``[outputs, rank]``."""
        return [self._a, self._b]

    @torch.no_grad()
    def weight(self, mask: Bool[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """Return the weight, zero where it was removed."""
        start = self._start.to(mask.device, torch.float32)
        return torch.addmm(start, self._b, self._a, alpha=self._scale).masked_fill_(~mask, 0)

    @torch.no_grad()
    def take(self, gradient: Float[Tensor, "outputs inputs"], mask: Bool[Tensor, "outputs inputs"]) -> None:
        """Add the gradients of the factors: those of the masked weight times the other factor."""
        masked = gradient.float().mul(mask)
        add_gradient(self._a, (self._b.T @ masked).mul_(self._scale))
        add_gradient(self._b, (masked @ self._a.T).mul_(self._scale))


LORA = Recovery(
    "lora",
    "Hu et al., ICLR 2022, 2106.09685, masked",
    Adapter,
    {
        **SHARED,
        "rate": Parameter(1e-4, 1e-9, 1, "learning rate at the start"),
        "rank": Parameter(8, 1, 4096, "rank of the change of a weight", whole=True),
        "alpha": Parameter(16, 0.01, 10_000, "the change is multiplied by alpha / rank"),
    },
    own=("rank", "alpha"),
)
