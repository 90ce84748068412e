"""Whether blocks can be removed: a block without weights must pass on its input unchanged."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from ..errors import RecipeError
from ..models.anatomy import Anatomy
from ..models.streaming import Described, residence_of
from ..variants.biases import biased
from .streams import StackStarter, Stream, run_block


@torch.no_grad()
def check_blocks_removable(anatomy: Anatomy) -> None:
    """Check on a few tokens that the first block of each stack, once its weights and biases are zero, does nothing.

    Blocks that add to the residual stream do, with norms before or after what they add; blocks that normalise the sum
    do not (OPT-350M). A model that is known by its configuration only cannot be tried, and is not: it is checked once
    its weights are there.

    Raises
    ------
    RecipeError
        If it changes the hidden states.
    """
    model: Any = anatomy.model
    if isinstance(residence_of(model), Described):
        return
    for stack in anatomy.stacks:
        layer = stack.first
        ids = torch.arange(1, 9)[None] % anatomy.vocabulary
        stream = Stream([ids], [""])
        with ExitStack() as present:
            present.enter_context(anatomy.loaded(layer))
            present.enter_context(anatomy.loaded_for_start())
            if layer:  # a decoder, whose encoder's output does not matter here
                stream.memory = [torch.zeros(1, ids.shape[1], anatomy.hidden_size, dtype=model.dtype)]
            StackStarter(anatomy, stack)(stream)
            dense = {role: anatomy.weight(layer, role).clone() for role in anatomy.roles(layer)}
            biases = {(layer, role): anatomy.bias(layer, role) for role in dense}
            zeros = {key: torch.zeros_like(bias) for key, bias in biases.items() if bias is not None}
            try:
                with biased(anatomy, zeros):
                    for role, weight in dense.items():
                        anatomy.set_weight(layer, role, torch.zeros_like(weight))
                    (after,) = run_block(anatomy.blocks[layer], stream, layer, stack, lambda tokens: None)
            finally:
                for role, weight in dense.items():
                    anatomy.set_weight(layer, role, weight)
        if not torch.equal(after, stream.hidden[0].to(after)):
            raise RecipeError(
                f'the blocks of this "{anatomy.kind}" model do more than add to the residual stream, so they cannot be '
                'removed; use pattern "neurons+heads"'
            )
