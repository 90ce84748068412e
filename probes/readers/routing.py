"""Readers: which experts tokens are routed to, and whether the dense model chose the same; what each expert adds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batches import Batch
from ..routing import Routed
from .base import Reader

#: The dense model's choices in the block that is being read, by the segments of a batch.
Choices = dict[tuple[int, ...], Tensor]


class RouterChoices(Reader):
    """Counts the counted tokens of each segment that are routed to each expert.

    Parameters
    ----------
    routed
        Filled in, int32 ``[segments, layers, experts]``.
    agreed
        Filled in with the number of a token's experts that the dense model chooses for it too, summed over counted
        tokens, int32 ``[segments, layers]``.
    dense
        Where the dense model's reader leaves its choices for those of the variants, which read the same block after it.
    reference
        Whether this is the dense model's reader.
    """

    sites = frozenset({"routing"})

    def __init__(self, routed: Tensor, agreed: Tensor, dense: Choices, *, reference: bool) -> None:
        self.routed = routed
        self.agreed = agreed
        self._dense = dense
        self._reference = reference
        self._waiting: list[tuple[int, tuple[int, ...], Tensor]] = []

    def read(self, layer: int, site: str, value: Tensor | Routed, batch: Batch, dense: Tensor | None = None) -> None:
        """Count one block's choices."""
        assert isinstance(value, Routed)
        rows = len(batch.segments)
        chosen = value.chosen.view(rows, -1, value.chosen.shape[1])
        if self._reference:
            self._dense[batch.segments] = chosen.to(torch.int16)
        theirs = self._dense[batch.segments]
        same = (chosen[..., None] == theirs[..., None, :]).any(dim=-1).sum(dim=-1)
        counts = torch.zeros(rows, value.anatomy.n_experts(layer), device=chosen.device)
        counted = batch.counted[..., None].expand(chosen.shape)
        counts.scatter_add_(1, chosen.flatten(1), counted.flatten(1))
        agreed = (same * batch.counted).sum(dim=1, keepdim=True)
        self._waiting.append((layer, batch.segments, torch.cat([counts, agreed], dim=1).round().int()))

    def flush(self) -> None:
        """Write the counts of the batches that were read."""
        if self._waiting:
            flat = [found.flatten() for *_, found in self._waiting]  # blocks may differ in their number of experts
            parts = torch.cat(flat).cpu().split([len(found) for found in flat])  # one wait for the device, not many
            for (layer, segments, found), part in zip(self._waiting, parts, strict=True):
                counts, agreed = part.view(found.shape).split([found.shape[1] - 1, 1], dim=1)
                self.routed[list(segments), layer, : counts.shape[1]] = counts
                self.agreed[list(segments), layer] = agreed[:, 0]
        self._waiting.clear()


@dataclass(frozen=True, eq=False)
class Added:
    """What the experts of a block add to each token.

    Attributes
    ----------
    experts
        How many the block has.
    chosen
        Those that each token is routed to, int64 ``[tokens, k]``.
    values
        What each of these adds, ``[tokens, k, hidden]``.
    """

    experts: int
    chosen: Tensor
    values: Tensor


class KeepAdded(Reader):
    """Keeps what every expert adds to the tokens of one batch, on the model's device and without a graph.

    Parameters
    ----------
    layers
        The blocks that are wanted.

    Attributes
    ----------
    added
        By block.
    """

    sites = frozenset({"routing"})

    def __init__(self, layers: Collection[int]) -> None:
        self._layers = layers
        self.added: dict[int, Added] = {}

    def wants(self, layer: int, site: str) -> bool:
        """Whether it is one of the blocks that are wanted."""
        return site in self.sites and layer in self._layers

    def read(self, layer: int, site: str, value: Tensor | Routed, batch: Batch, dense: Tensor | None = None) -> None:
        """Keep one block's."""
        assert isinstance(value, Routed)
        with torch.no_grad():
            self.added[layer] = Added(value.anatomy.n_experts(layer), value.chosen, value.contributions())
