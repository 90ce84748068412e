"""Reader: how often every MLP neuron fires."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from pruning.models.anatomy import Anatomy, expert_site

from ..batches import Batch
from ..routing import Routed
from .base import Reader

#: Parts that a text is counted in, so that an analyzer can tell what is due to the choice of text.
FOLDS = 8


def fold_of(segments: Tensor) -> Tensor:
    """Return the fold of each segment, by its index in the text."""
    return segments % FOLDS


def neuron_places(anatomy: Anatomy) -> dict[tuple[int, str], slice]:
    """Return the neurons of each expert, and of the MLPs that all tokens pass through, by block and site.

    Neurons are numbered within a block as :meth:`pruning.Anatomy.neuron_groups` has them: neuron n of expert e is
    number e · (neurons of an expert) + n.
    """
    places: dict[tuple[int, str], slice] = {}
    for layer in range(len(anatomy.blocks)):
        groups = anatomy.neuron_groups(layer)
        stops = accumulate(groups.values())
        places |= {
            (layer, site): slice(stop - size, stop) for (site, size), stop in zip(groups.items(), stops, strict=True)
        }
    return places


class NeuronFiring(Reader):
    """Counts, over counted tokens, of a positive activation (Tang et al., ACL 2024, sec. 2.2).

    It is read after the activation function: before the product with ``up`` in a gated MLP, before ``down`` in one
    without gates. Of experts it is computed again from their input, on the tokens that were routed to each: a third of
    the experts' share of a forward pass.

    Parameters
    ----------
    fired
        Added to, int32 ``[folds, layers, neurons]``: segment i is counted in fold i mod :data:`FOLDS`.
    places
        Block and site to its part of the neurons, as from :func:`neuron_places`; by default a site has all of them.
    """

    sites = frozenset({"activation", "shared_activation", "routing"})

    def __init__(self, fired: Tensor, places: Mapping[tuple[int, str], slice] | None = None) -> None:
        self.fired = fired
        self._places = places or {}
        self._counts: dict[int, Tensor] = {}

    def read(self, layer: int, site: str, value: Tensor | Routed, batch: Batch, dense: Tensor | None = None) -> None:
        """Count one block's firing neurons."""
        folds = fold_of(torch.tensor(batch.segments, device=batch.counted.device))
        weights = ((folds == torch.arange(FOLDS, device=folds.device)[:, None])[..., None] * batch.counted).flatten(1)
        counts = weights.new_zeros(FOLDS, self.fired.shape[2])
        if isinstance(value, Routed):
            for expert in range(len(value.slots)):
                tokens = value.tokens(expert)
                if len(tokens):
                    place = self._places.get((layer, expert_site(expert)), slice(None))
                    counts[:, place] = _fired(weights[:, tokens], value.activation(expert))
        else:
            place = self._places.get((layer, site), slice(None))
            counts[:, place] = _fired(weights, value.flatten(0, 1))
        found = counts.round().int()
        self._counts[layer] = self._counts[layer].add_(found) if layer in self._counts else found

    def flush(self) -> None:
        """Add the counts of the batches that were read."""
        for layer, counts in self._counts.items():
            self.fired[:, layer] += counts.cpu()
        self._counts.clear()


def _fired(weights: Tensor, activation: Tensor) -> Tensor:
    """Return on how many tokens each neuron fires, float32 ``[folds, neurons]``: exact below 2^24 tokens."""
    return weights @ (activation > 0).float()
