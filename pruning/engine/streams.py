"""Running blocks on text: their hidden states and arguments, and the statistics of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..input_parts import InputPart
from ..models.anatomy import Anatomy, InputGroup, Stack
from ..statistics import InputStatistics

#: Maximum number of distinct argument tensors kept for reuse.
_KEPT_ONCE = 64
#: Called with the number of tokens that have just passed through one block.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Arguments:
    """Arguments of a block other than the hidden states: position embeddings, attention mask and so on."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def replaced(self, old: object, new: object) -> Arguments:
        """Return them with one object replaced, such as the encoder's output by that of another model."""
        return Arguments(
            tuple(new if value is old else value for value in self.positional),
            {name: new if value is old else value for name, value in self.named.items()},
        )

    def __contains__(self, value: object) -> bool:
        """Whether this very object is one of them."""
        return any(value is one for one in (*self.positional, *self.named.values()))


@dataclass
class Stream:
    """Text and its hidden states before a block.

    Attributes
    ----------
    tokens
        Token ids of each batch, ``[blocks, length]``.
    languages
        Language of each batch.
    hidden
        Hidden states of each batch, ``[blocks, length, hidden]``.
    memory
        Encoder output of each batch, for the blocks of a decoder.
    arguments
        Arguments of every block of the current stack, for each batch.
    """

    tokens: list[Tensor]
    languages: list[str]
    hidden: Sequence[Tensor] = ()
    memory: list[Tensor] | None = None
    arguments: list[list[Arguments]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return sum(batch.numel() for batch in self.tokens)


class StackStarter:
    """Computes the input of a stack's first block, and captures the arguments of all its blocks.

    The stack runs with its blocks replaced by stand-ins that record their arguments and return the hidden states
    unchanged, so this works for whatever arguments an architecture uses. Where blocks return more than hidden states
    (position biases), the first block really runs, once per batch, and the stand-ins return its additional outputs.
    Arguments that are equal for several batches are stored once.

    Captured arguments are reused for every variant of this stack, so they must not depend on what the blocks compute.
    To check this, the first batch is run twice, the second time with different hidden states.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model. What :meth:`Anatomy.loaded_for_start` loads and the stack's first block must be in
        memory during each call.
    stack
        One of the model's stacks.
    """

    def __init__(self, anatomy: Anatomy, stack: Stack) -> None:
        self._anatomy = anatomy
        self._stack = stack
        self._known: list[Tensor] = []
        self._checked = False
        self._tuples = True  # whether blocks return a tuple; known after the first batch

    def __call__(self, stream: Stream, sink: Callable[[Tensor], object] | None = None) -> None:
        """Set the hidden states and arguments of `stream` before the first block; a `sink` gets the states instead."""
        stream.arguments = []
        states: list[Tensor] = []
        for i, ids in enumerate(stream.tokens):
            memory = None if stream.memory is None else stream.memory[i]
            hidden, arguments = self.begin(**stack_inputs(self._anatomy, ids, memory))
            (sink or states.append)(hidden)
            stream.arguments.append(arguments)
        stream.hidden = states

    @torch.no_grad()
    def begin(self, **inputs: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Run the stack up to its first block.

        Parameters
        ----------
        inputs
            Inputs of the stack's module by name: ``input_ids`` ``[batch, tokens]``; with padding, ``attention_mask``
            ``[batch, tokens]``; for the decoder of an encoder-decoder, ``encoder_hidden_states``. They are moved to the
            model's device.

        Returns
        -------
        tuple
            The hidden states before the first block, ``[batch, tokens, hidden]``, and the arguments of every block.

        Raises
        ------
        ModelError
            If the stack modifies hidden states between its blocks, or if a block's arguments depend on what earlier
            blocks computed.
        """
        inputs = {name: value.to(self._anatomy.device) for name, value in inputs.items()}
        hidden, arguments = self._catch(inputs)
        if not self._checked:
            _, others = self._catch(inputs, alter=lambda hidden: hidden.roll(1, dims=-1).neg())
            for number, (one, other) in enumerate(zip(arguments, others, strict=True)):
                if not _same((one.positional, one.named), (other.positional, other.named)):
                    raise ModelError(
                        f'block {self._stack.first + number} of this "{self._anatomy.kind}" model is called with '
                        "values that depend on what earlier blocks computed; such a model cannot be run block by block"
                    )
            self._checked = True
        given = {id(value): value for value in inputs.values()}  # the caller's inputs need not be compared
        return hidden, [
            Arguments(self._kept_once(call.positional, given), self._kept_once(call.named, given)) for call in arguments
        ]

    def _catch(
        self, inputs: dict[str, Tensor], alter: Callable[[Tensor], Tensor] = lambda hidden: hidden
    ) -> tuple[Tensor, list[Arguments]]:
        """Run the stack with stand-ins for its blocks; `alter` changes the hidden states that they return."""
        blocks = self._anatomy.blocks[self._stack.first : self._stack.stop]
        arguments: list[Arguments] = []
        begun: list[Tensor] = []
        passed: list[Any] = []
        original = blocks[0].forward

        def stand_in(hidden_states: Tensor, *positional: Any, **named: Any) -> Any:
            arguments.append(Arguments(positional, named))
            if not begun:
                begun.append(hidden_states)
                real = original(alter(hidden_states), *positional, **named) if self._tuples else None
                self._tuples = isinstance(real, tuple)
                passed.append((alter(hidden_states), *real[1:]) if isinstance(real, tuple) else alter(hidden_states))
            elif not _same(hidden_states, passed[0][0] if self._tuples else passed[0]):
                raise ModelError(
                    f'this "{self._anatomy.kind}" model changes hidden states between block '
                    f"{self._stack.first + len(arguments) - 2} and the next; such a model cannot be run block by block"
                )
            return passed[0]

        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(_replaced_forward(block, stand_in))
            self._anatomy.stack_module(self._stack)(**inputs, use_cache=False)
        return begun[0], arguments

    def _kept_once(self, value: Any, found: dict[int, Tensor]) -> Any:
        """Return `value` with every tensor replaced by an equal one that is already stored, if there is one.

        `found` maps the tensors of this batch by identity, so that arguments shared by all blocks are compared once.
        """
        if isinstance(value, Tensor):
            if id(value) not in found:
                found[id(value)] = next((known for known in self._known if _same(known, value)), value)
                if found[id(value)] is value and len(self._known) < _KEPT_ONCE:
                    self._known.append(value)
            return found[id(value)]
        if isinstance(value, tuple | list):
            return type(value)(self._kept_once(item, found) for item in value)
        if isinstance(value, dict):
            return {name: self._kept_once(item, found) for name, item in value.items()}
        return value


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors in two nested values are equal."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return not isinstance(one, Tensor | tuple | list | dict) and type(one) is type(other)


def stack_inputs(anatomy: Anatomy, ids: Tensor, memory: Tensor | None) -> dict[str, Tensor]:
    """Return the inputs of a stack's module for token ids; `memory` is the encoder output, for a decoder."""
    if not anatomy.encoder_decoder:
        return {"input_ids": ids}
    if memory is None:
        return {"input_ids": encoder_ids(ids)}
    return {"input_ids": decoder_ids(anatomy, ids), "encoder_hidden_states": memory}


def encoder_ids(ids: Tensor) -> Tensor:
    """Return the part of a block of text that an encoder reads: the first half."""
    return ids[:, : ids.shape[1] // 2]


def decoder_labels(ids: Tensor) -> Tensor:
    """Return the part that the decoder predicts: the second half."""
    return ids[:, ids.shape[1] // 2 :].contiguous()


def decoder_ids(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """Return the decoder's input: the second half, shifted by one token."""
    model: Any = anatomy.model
    shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=decoder_labels(ids))
    return shifted


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")  # nnsight, for one, sets a forward on the instance
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward  # uncovers the method of the class
        else:
            module.forward = before


class _EndOfStatistics(Exception):
    """Raised once all requested inputs of a block have been seen."""


def run_block(block: nn.Module, stream: Stream, layer: int, stack: Stack, progress: Progress) -> Iterator[Tensor]:
    """Yield a block's output for every batch, or an empty tensor if the forward pass was stopped early."""
    device = next(block.parameters()).device
    for ids, hidden, arguments in zip(stream.tokens, stream.hidden, stream.arguments, strict=True):
        call = arguments[layer - stack.first]
        try:
            output = block(hidden.to(device), *call.positional, **call.named)
            yield output[0] if isinstance(output, tuple) else output
        except _EndOfStatistics:
            yield hidden.new_empty(0)
        progress(ids.numel())


@torch.no_grad()
def gather(
    anatomy: Anatomy,
    layer: int,
    stream: Stream,
    wanted: dict[InputGroup, frozenset[str]],
    progress: Progress,
    sink: Callable[[Tensor], object] | None = None,
    parts: Mapping[str, Mapping[str, InputPart]] | None = None,
) -> dict[str, InputStatistics]:
    """Run a dense block; return the statistics of the requested inputs, by leading role.

    `sink` receives the block's output for each batch. Without it, the forward pass stops as soon as all inputs have
    been seen, which saves the most expensive matrix product. `parts` are those of the inputs, by leading role, that
    recipes may give less weight.
    """
    block, stack = anatomy.blocks[layer], anatomy.stack_of(layer)
    device = next(block.parameters()).device
    statistics = {
        group.leader: InputStatistics(
            anatomy.shape(layer, group.leader)[1], needs, device, (parts or {}).get(group.leader)
        )
        for group, needs in wanted.items()
    }
    places: dict[str, list[InputGroup]] = {}
    for group in wanted:
        places.setdefault(group.module, []).append(group)
    seen: set[str] = set()
    language = ""

    def observe(module: nn.Module, inputs: tuple[Tensor, ...], path: str) -> None:
        groups = places[path]
        if groups[0].expert is None:
            for group in groups:
                statistics[group.leader].add(inputs[0], language)
        else:
            _observe_experts(anatomy, layer, groups, inputs, statistics, language)
        seen.add(path)
        if sink is None and len(seen) == len(places):
            raise _EndOfStatistics

    with ExitStack() as hooks:
        for path in places:
            handle = anatomy.module(layer, path).register_forward_pre_hook(partial(observe, path=path))
            hooks.callback(handle.remove)
        runs = run_block(block, stream, layer, stack, progress)
        for batch_language in stream.languages:
            language = batch_language
            seen.clear()
            output = next(runs)
            if sink is not None:
                sink(output)
            if len(seen) < len(places):
                missing = ", ".join(sorted(set(places) - seen))
                raise ModelError(f"block {layer}: {missing} did not run; this model does not match its layout")
        next(runs, None)  # lets it report the last batch
    return statistics


def _observe_experts(
    anatomy: Anatomy,
    layer: int,
    groups: Sequence[InputGroup],
    inputs: tuple[Tensor, ...],
    statistics: dict[str, InputStatistics],
    language: str,
) -> None:
    """Add the inputs of each expert's projections: the tokens routed to it, and the input of its ``down``."""
    hidden, chosen = inputs[0].flatten(0, -2), inputs[1]
    experts: dict[int, dict[bool, InputGroup]] = {}
    for group in groups:
        assert group.expert is not None
        experts.setdefault(group.expert, {})[group.inner] = group
    for expert, wanted in experts.items():
        rows = hidden[(chosen.reshape(len(hidden), -1) == expert).any(dim=1)]
        if len(rows) == 0:
            continue
        if False in wanted:
            statistics[wanted[False].leader].add(rows, language)
        if True in wanted:
            statistics[wanted[True].leader].add(anatomy.expert_inner(layer, expert, rows), language)
