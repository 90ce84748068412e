"""Reader: how often every MLP neuron fires."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batches import Batch
from .base import Reader

#: Parts that a text is counted in, so that an analyzer can tell what is due to the choice of text.
FOLDS = 8


def fold_of(segments: Tensor) -> Tensor:
    """Return the fold of each segment, by its index in the text."""
    return segments % FOLDS


class NeuronFiring(Reader):
    """Counts, over counted tokens, of a positive activation (Tang et al., ACL 2024, sec. 2.2).

    It is read after the activation function: before the product with ``up`` in a gated MLP, before ``down`` in one
    without gates. Neurons of experts are out of reach.

    Parameters
    ----------
    fired
        Added to, int32 ``[folds, layers, neurons]``: segment i is counted in fold i mod :data:`FOLDS`.
    """

    sites = frozenset({"activation"})

    def __init__(self, fired: Tensor) -> None:
        self.fired = fired
        self._counts: dict[int, Tensor] = {}

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Count one block's firing neurons."""
        positive = (value > 0).flatten(0, 1).float()  # a float32 sum of ones is exact below 2^24 tokens
        folds = fold_of(torch.tensor(batch.segments, device=value.device))
        weights = (folds == torch.arange(FOLDS, device=value.device)[:, None])[..., None] * batch.counted
        counts = (weights.flatten(1) @ positive).round().int()
        self._counts[layer] = self._counts[layer].add_(counts) if layer in self._counts else counts

    def flush(self) -> None:
        """Add the counts of the batches that were read."""
        for layer, counts in self._counts.items():
            self.fired[:, layer] += counts.cpu()
        self._counts.clear()
