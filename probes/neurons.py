"""Reader: how often every MLP neuron fires."""

from __future__ import annotations

import torch
from torch import Tensor

from .session import Batch


class NeuronFiring:
    """Counts, over counted tokens, of a positive activation (Tang et al., ACL 2024, sec. 2.2).

    It is read after the activation function: before the product with ``up`` in a gated MLP, before ``down`` in one
    without gates. Neurons of experts are out of reach.

    Attributes
    ----------
    fired
        int64 ``[layers, neurons]``.
    tokens
        Number of counted tokens.
    """

    sites = frozenset({"activation"})

    def __init__(self, layers: int, neurons: int) -> None:
        self.fired = torch.zeros(layers, neurons, dtype=torch.int64)
        self.tokens = 0

    def read(self, layer: int, site: str, value: Tensor, batch: Batch) -> None:
        """Count one block's firing neurons."""
        positive = (value > 0).flatten(0, 1).float()  # a float32 sum of ones is exact below 2^24 tokens
        self.fired[layer] += (batch.counted.flatten() @ positive).round().long().cpu()
        if layer == 0:
            self.tokens += int(batch.counted.sum())
