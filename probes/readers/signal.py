"""Readers: the signal of a pruned model against that of the dense model, on the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..session import Batch

#: What is compared: the output of every projection that a block of a decoder has (outside of experts), and the residual
#: stream after every block. Sums of sites that a block has not are NaN.
SIGNAL_SITES = ("q", "k", "v", "o", "gate", "up", "down", "residual")

#: ``(layer, site)`` to the whole output of one batch, ``[batch, tokens, width]``, in the model's dtype.
Activations = dict[tuple[int, str], Tensor]


class DenseSignal:
    """Keeps the dense model's activations of one batch, for pruned models to be compared with, and sums up their power.

    Attributes
    ----------
    power
        Sum over a segment's counted tokens of ``‖x‖²``, float64 ``[segments, layers, sites]``; NaN where a block lacks
        the site.
    tokens
        Counted tokens of each segment, int64 ``[segments]``.
    """

    sites = frozenset(SIGNAL_SITES)

    def __init__(self, segments: int, layers: int) -> None:
        self._activations: Activations = {}
        self.power = torch.full((segments, layers, len(SIGNAL_SITES)), torch.nan, dtype=torch.float64)
        self.tokens = torch.zeros(segments, dtype=torch.int64)

    def read(self, layer: int, site: str, value: Tensor, batch: Batch) -> None:
        """Keep one site's output and sum up its power."""
        self._activations[layer, site] = value.detach()
        _accumulate(self.power, layer, site, value, batch)
        if layer == 0:
            self.tokens[list(batch.segments)] = batch.counted.sum(dim=1).long().cpu()

    def take_activations(self) -> Activations:
        """Hand over the activations of the batch that was read last; the reader keeps none."""
        taken, self._activations = self._activations, {}
        return taken


class SignalError:
    """Sums the squared difference from the dense model.

    Parameters
    ----------
    dense
        The activations of the same batch in the dense model.
    error
        Accumulates the sum over a segment's counted tokens of ``‖x − x̂‖²``, float64 ``[segments, layers, sites]``.
    """

    sites = frozenset(SIGNAL_SITES)

    def __init__(self, dense: Activations, error: Tensor) -> None:
        self.dense = dense
        self.error = error

    def read(self, layer: int, site: str, value: Tensor, batch: Batch) -> None:
        """Compare one site's output."""
        _accumulate(self.error, layer, site, value - self.dense[layer, site], batch)


def _accumulate(sums: Tensor, layer: int, site: str, value: Tensor, batch: Batch) -> None:
    """Write each segment's sum of squares over its counted tokens."""
    norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    squares = (norms.double().square() * batch.counted).sum(dim=1)
    sums[list(batch.segments), layer, SIGNAL_SITES.index(site)] = squares.cpu()
