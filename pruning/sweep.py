"""The block-by-block engine: one calibration set, any number of recipes, in one go.

Recipes advance in lockstep. They share a block's statistics for as long as its input is the same for them: all of
them at the first block, and those with dense propagation everywhere. A block that only gathers statistics is not
run to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .anatomy import ROLES, Anatomy
from .errors import ModelError, RecipeError
from .masks import Key, MaskSet
from .patterns import pattern_named
from .recipes import Recipe
from .statistics import InputStatistics

#: Called with the number of tokens that have just gone through one block.
Progress = Callable[[int], None]


@dataclass
class _Stream:
    """Hidden states before a block, ``[batch, tokens, hidden]`` each, and the recipes that see exactly these."""

    hidden: list[Tensor]
    recipes: list[Recipe]


class _EndOfStatistics(Exception):
    """Raised once the last input of a block has been seen."""


@torch.no_grad()
def sweep(
    model: nn.Module,
    recipes: Sequence[Recipe],
    tokens: Int[Tensor, "samples length"] | None = None,
    *,
    batch_tokens: int = 2048,
    progress: Progress = lambda tokens: None,
) -> dict[Recipe, MaskSet]:
    """Choose the masks of several recipes with the same calibration text.

    The model is changed while the sweep runs and is the dense model again afterwards, bit for bit.

    Parameters
    ----------
    model
        Dense model of a supported architecture.
    recipes
        What to make. Recipes whose method needs no text may be among them.
    tokens
        Full blocks of calibration text; ``None`` if no method needs them.
    batch_tokens
        Tokens that go through a block at a time; bounds the memory.
    progress
        Told of the work as it is done; see :func:`sweep_work` for the total.

    Returns
    -------
    dict
        Recipe to masks. Embeddings and ``lm_head`` are never in them.

    Raises
    ------
    RecipeError
        If a method needs text and there is none.
    ModelError
        If the architecture is unknown or a weight is not finite.
    """
    anatomy = Anatomy(model)
    masks: dict[Recipe, dict[Key, Tensor]] = {recipe: {} for recipe in recipes}
    calibrated = [recipe for recipe in masks if recipe.scoring.calibrated]
    uncalibrated = [recipe for recipe in masks if not recipe.scoring.calibrated]
    streams: list[_Stream] = []
    arguments: list[list[_Arguments]] = []
    if calibrated:
        if tokens is None:
            raise RecipeError(f"{calibrated[0].method} needs calibration text")
        batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
        hidden, arguments = _block_arguments(anatomy, batches)
        streams.append(_Stream(hidden, calibrated))

    for layer, block in enumerate(anatomy.blocks):
        for recipe in uncalibrated:
            masks[recipe].update(_choose(anatomy, layer, recipe, {}))
        next_streams: list[_Stream] = []
        for stream in streams:
            dense = [recipe for recipe in stream.recipes if recipe.propagation == "dense"]
            runs = _Runs(block, stream.hidden, [batch[layer] for batch in arguments], progress)
            statistics, outputs = _gather(anatomy, layer, runs, to_the_end=bool(dense))
            if dense:
                next_streams.append(_Stream(outputs, dense))
            for recipe in stream.recipes:
                chosen = _choose(anatomy, layer, recipe, statistics)
                masks[recipe].update(chosen)
                if recipe.propagation == "pruned" and layer + 1 < len(anatomy.blocks):
                    with _pruned(anatomy, chosen):
                        next_streams.append(_Stream(list(runs()), [recipe]))
        streams = next_streams
    return {recipe: MaskSet.pack(chosen) for recipe, chosen in masks.items()}


def sweep_work(anatomy: Anatomy, recipes: Sequence[Recipe], tokens: int) -> int:
    """Return how many tokens a sweep will send through a block in all, as its `progress` counts them."""
    blocks = len(anatomy.blocks)
    calibrated = [recipe for recipe in recipes if recipe.scoring.calibrated]
    pruned = sum(recipe.propagation == "pruned" for recipe in calibrated)
    dense = pruned < len(calibrated)
    gathers = (1 if calibrated else 0) + (blocks - 1) * (pruned + dense)
    return tokens * (gathers + (blocks - 1) * pruned)


@dataclass(frozen=True)
class _Arguments:
    """What a block is called with beside the hidden states: position embeddings, attention mask and so on."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class _Runs:
    """Runs of one block over all batches of a stream."""

    block: nn.Module
    hidden: list[Tensor]
    arguments: list[_Arguments]
    progress: Progress

    def __call__(self) -> Iterator[Tensor]:
        for hidden, arguments in zip(self.hidden, self.arguments, strict=True):
            try:
                yield self.block(hidden, *arguments.positional, **arguments.named)
            except _EndOfStatistics:
                yield hidden.new_empty(0)
            self.progress(hidden.shape[0] * hidden.shape[1])


def _block_arguments(anatomy: Anatomy, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[_Arguments]]]:
    """Return the first block's input, and the other arguments of every block, for each batch.

    The body runs with its blocks replaced by a stand-in that notes its arguments and passes the hidden states on, so
    that whatever an architecture hands to its blocks is caught as it is, at the cost of an embedding.
    """
    inputs: list[Tensor] = []
    arguments: list[list[_Arguments]] = []

    def stand_in(hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        if not arguments[-1]:
            inputs.append(hidden_states)
        arguments[-1].append(_Arguments(positional, named))
        return hidden_states

    device = next(anatomy.body.parameters()).device
    with ExitStack() as stack:
        for block in anatomy.blocks:
            stack.enter_context(_replaced_forward(block, stand_in))
        for batch in batches:
            arguments.append([])
            anatomy.body(input_ids=batch.to(device), use_cache=False)
    return inputs, arguments


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    before = vars(module).get("forward")  # nnsight, for one, puts a forward of its own on the instance
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward  # the class's own method shows again
        else:
            module.forward = before


def _gather(
    anatomy: Anatomy, layer: int, runs: _Runs, *, to_the_end: bool
) -> tuple[dict[str, InputStatistics], list[Tensor]]:
    """Run a dense block and return the statistics of its projections' inputs by leading role, and its outputs."""
    statistics: dict[str, InputStatistics] = {}
    leaders = [group[0] for group in anatomy.layout.shared_inputs]
    with ExitStack() as stack:
        for role in leaders:
            weight = anatomy.weight(layer, role)
            statistics[role] = InputStatistics.empty(weight.shape[1], weight.device)
            last = role == leaders[-1] and not to_the_end

            def observe(module: nn.Module, inputs: tuple[Tensor, ...], role: str = role, last: bool = last) -> None:
                statistics[role].add(inputs[0])
                if last:
                    raise _EndOfStatistics

            handle = anatomy.projection(layer, role).register_forward_pre_hook(observe)
            stack.callback(handle.remove)
        outputs = list(runs())
    return statistics, outputs


def _choose(anatomy: Anatomy, layer: int, recipe: Recipe, statistics: dict[str, InputStatistics]) -> dict[Key, Tensor]:
    """Return one recipe's masks for one block."""
    pattern = pattern_named(recipe.pattern)
    masks = {}
    for role in ROLES:
        weight = anatomy.weight(layer, role)
        scores = recipe.scoring.score(weight, statistics.get(anatomy.leader(role)))
        if not bool(torch.isfinite(scores).all()):
            raise ModelError(
                f"block {layer}, role {role}: a weight or an activation is NaN or infinite; "
                "check the checkpoint, or load it with dtype float32 or bfloat16"
            )
        masks[layer, role] = pattern(scores, recipe.sparsity)
    return masks


@contextmanager
def _pruned(anatomy: Anatomy, masks: dict[Key, Tensor]) -> Iterator[None]:
    """Remove weights for a while."""
    dense = {key: anatomy.weight(*key).clone() for key in masks}
    try:
        for key, mask in masks.items():
            anatomy.weight(*key).mul_(mask)
        yield
    finally:
        for key, weight in dense.items():
            anatomy.weight(*key).copy_(weight)
