"""Reader: the signal of a pruned model against that of the dense model, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batches import Batch
from .base import Reader

#: What is compared: the output of every projection that a block has (outside of experts; ``cross_*``: of a decoder's
#: attention to the encoder's output), and the residual stream after every block. Sums of sites that a block lacks are
#: NaN.
SIGNAL_SITES = (
    *("q", "k", "v", "o"),
    *("cross_q", "cross_k", "cross_v", "cross_o"),
    *("gate", "up", "down", "residual"),
)


class SignalPower(Reader):
    """Sums the squared norm of every site over a segment's counted tokens.

    Parameters
    ----------
    sums
        Each is filled in with ``Σ‖x‖²``, float64 ``[segments, layers, sites]``, sites as in :data:`SIGNAL_SITES`; what
        it had before stays where a block lacks the site.
    """

    sites = frozenset(SIGNAL_SITES)

    def __init__(self, sums: Sequence[Tensor]) -> None:
        self.sums = sums
        self._waiting: list[tuple[int, str, tuple[int, ...], Tensor]] = []

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Sum one site's squares."""
        norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
        squares = (norms.double().square() * batch.counted).sum(dim=1)
        self._waiting.append((layer, site, batch.segments, squares))

    def flush(self) -> None:
        """Write the sums of the batches that were read."""
        if self._waiting:
            squares = torch.cat([found for *_, found in self._waiting]).cpu()  # one wait for the device, not many
            parts = squares.split([len(found) for *_, found in self._waiting])
            for (layer, site, segments, _), part in zip(self._waiting, parts, strict=True):
                for sums in self.sums:
                    sums[list(segments), layer, SIGNAL_SITES.index(site)] = part
        self._waiting.clear()


class SignalError(SignalPower):
    """Sums the squared difference from the dense model, ``Σ‖x − x̂‖²``, likewise."""

    compares = True

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Compare one site's output with the dense model's."""
        assert dense is not None
        super().read(layer, site, value - dense, batch)
