"""Reader: the mean hidden state of every segment after every block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..session import Batch


class PooledStates:
    """Mean over a segment's counted tokens of the residual stream after each block.

    Attributes
    ----------
    means
        float32 ``[segments, layers, hidden]``.
    """

    sites = frozenset({"residual"})

    def __init__(self, segments: int, layers: int, hidden: int) -> None:
        self.means = torch.zeros(segments, layers, hidden)

    def read(self, layer: int, site: str, value: Tensor, batch: Batch) -> None:
        """Pool one block's output over tokens."""
        weights = batch.counted / batch.counted.sum(dim=1, keepdim=True)
        pooled = torch.bmm(weights[:, None], value.float())[:, 0]
        self.means[list(batch.segments), layer] = pooled.cpu()
