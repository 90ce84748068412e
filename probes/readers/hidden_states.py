"""Reader: the mean hidden state of every segment after every block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batches import Batch
from .base import Reader


class PooledStates(Reader):
    """Mean over a segment's counted tokens of the residual stream after each block.

    Parameters
    ----------
    means
        Filled in, float32 ``[layers, segments, hidden]``.
    """

    sites = frozenset({"residual"})

    def __init__(self, means: Tensor) -> None:
        self.means = means
        self._waiting: list[tuple[int, tuple[int, ...], Tensor]] = []

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Pool one block's output over tokens."""
        weights = batch.counted / batch.counted.sum(dim=1, keepdim=True)
        self._waiting.append((layer, batch.segments, torch.bmm(weights[:, None], value.float())[:, 0]))

    def flush(self) -> None:
        """Write the means of the batches that were read."""
        if self._waiting:
            pooled = torch.cat([found for *_, found in self._waiting]).cpu()  # one wait for the device, not many
            parts = pooled.split([len(found) for *_, found in self._waiting])
            for (layer, segments, _), part in zip(self._waiting, parts, strict=True):
                self.means[layer, list(segments)] = part
        self._waiting.clear()
