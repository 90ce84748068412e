"""What the router of a block did with the tokens of a batch, and what each expert makes of those that it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pruning.models.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Routed:
    """The arguments of the module that holds a block's experts.

    What single experts compute cannot be seen from outside of it, since it multiplies all of them at once. It is
    computed again here, from the same input and with the block's present weights, for the tokens routed to each.

    Attributes
    ----------
    anatomy, layer
        The model, and the block.
    hidden
        The experts' input, ``[tokens, hidden]``, the tokens of all rows of the batch one after the other.
    chosen
        The experts that each token is routed to, int64 ``[tokens, k]``, all different.
    weights
        The router's weights of their outputs, ``[tokens, k]``.
    """

    anatomy: Anatomy
    layer: int
    hidden: Float[Tensor, "tokens hidden"]
    chosen: Int64[Tensor, "tokens k"]
    weights: Float[Tensor, "tokens k"]

    @classmethod
    def of(cls, anatomy: Anatomy, layer: int, given: tuple[Sequence[Any], Mapping[str, Any]]) -> Routed:
        """Take positional and named arguments of the module: hidden states, experts and weights, in this order."""
        hidden, chosen, weights = (*given[0], *given[1].values())
        tokens = len(hidden.flatten(0, -2))
        return cls(anatomy, layer, hidden.flatten(0, -2), chosen.reshape(tokens, -1), weights.reshape(tokens, -1))

    @cached_property
    def slots(self) -> tuple[Tensor, ...]:
        """For each expert, which of the ``tokens * k`` slots are its own; a device waits once, for all of them."""
        experts = self.chosen.flatten()
        counts = experts.new_zeros(self.anatomy.n_experts(self.layer))
        counts.scatter_add_(0, experts, torch.ones_like(experts))
        return experts.argsort(stable=True).split(counts.tolist())

    @cached_property
    def _tokens(self) -> tuple[Tensor, ...]:
        return (torch.cat(self.slots) // self.chosen.shape[1]).split([len(own) for own in self.slots])

    def tokens(self, expert: int) -> Int64[Tensor, " routed"]:
        """Return which tokens were routed to an expert."""
        return self._tokens[expert]

    def activation(self, expert: int) -> Float[Tensor, "routed neurons"]:
        """Return the activations of an expert's neurons on the tokens that were routed to it."""
        return self.anatomy.expert_activation(self.layer, expert, self.hidden[self.tokens(expert)])

    def added(self, expert: int) -> Float[Tensor, "routed hidden"]:
        """Return what an expert adds to each of the tokens that were routed to it: its output times its weight."""
        output = self.anatomy.expert_output(self.layer, expert, self.hidden[self.tokens(expert)])
        return (output * self.weights.flatten()[self.slots[expert], None]).to(self.hidden.dtype)

    def contribution(self, expert: int) -> Float[Tensor, "tokens hidden"]:
        """Return what an expert adds to every token, 0 to those that were not routed to it."""
        return torch.zeros_like(self.hidden).index_copy(0, self.tokens(expert), self.added(expert))

    def contributions(self) -> Float[Tensor, "tokens k hidden"]:
        """Return what each of a token's experts adds to it, in the order of :attr:`chosen`."""
        found = self.hidden.new_empty(self.chosen.numel(), self.hidden.shape[1])
        for expert, slots in enumerate(self.slots):
            if len(slots):
                found[slots] = self.added(expert)
        return found.unflatten(0, self.chosen.shape)
