"""Reading in lockstep: the dense model and its variants advance together, one block at a time.

The outer loop is over blocks. A block's dense weights are loaded once; for the dense model and then each variant, the
block takes on that model's weights and all the text of a wave passes through it, one nnsight trace per batch. Each
variant's masks are thus applied once per wave and block, however much text there is. In an encoder-decoder the output
of every model's encoder is kept for the blocks of its decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruning.engine.streams import Arguments, StackStarter
from pruning.errors import ModelError
from pruning.models.anatomy import Stack
from pruning.variants.owner import Block
from pruning.variants.variant import Variant

from .batches import Batch, within_memory
from .readers.base import Reader
from .readers.keep import Keep
from .readers.signal import SIGNAL_SITES
from .reading_plan import ReadingPlan
from .scoring import Progress
from .session import Session
from .streams import DENSE, Stream, read_stack

#: Stands for the encoder's output of whichever model reads.
_MEMORY = object()


@dataclass
class _Passage:
    """One batch of one stream on its way through the blocks.

    Attributes
    ----------
    hidden
        Model to its hidden states before the current block, ``[batch, tokens, hidden]``.
    memory
        Model to the output of its encoder, for the decoder of an encoder-decoder, likewise.
    arguments
        Model to the other arguments of each block of the current stack, without the encoder's output, in whose place is
        :data:`_MEMORY`. They are the same objects for all models unless a variant has other tables of positions.
    dense
        Site to the dense model's activations in the current block, while variants are compared with them.
    """

    stream: Stream
    number: int
    hidden: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, list[Arguments]] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> Batch:
        return self.stream.batches[self.number]

    def readers(self, model: str) -> Sequence[Reader]:
        return self.stream.readers(model, self.number)

    def runs_in(self, stack: Stack) -> bool:
        """Whether the batch has a part for a stack."""
        return stack.first == 0 or self.batch.decoder is not None


def read_streams(
    session: Session,
    streams: Sequence[Stream],
    variants: Mapping[str, Variant],
    plan: ReadingPlan,
    progress: Progress = lambda tokens: None,
) -> None:
    """Read all streams with all their models; the results are stored in the streams.

    Parameters
    ----------
    session
        The dense model's session, in memory or streamed from its checkpoint.
    streams
        What to read.
    variants
        Id to variant, for every model of the streams except the dense one.
    plan
        The plan that :func:`probes.plan_reading` returned for these streams.
    progress
        Called with the number of tokens read, as reading proceeds.

    Raises
    ------
    VariantError
        If a variant was not made from this model.
    """
    for variant in variants.values():
        session.owner.check(variant)
    passages = [_Passage(stream, number) for stream in streams for number in range(len(stream.batches))]
    sizes = [plan.held(passage.batch, len(passage.stream.models)) for passage in passages]
    with ExitStack() as places:
        for stream in streams:
            places.enter_context(stream.opened())
        for wave in within_memory(passages, sizes, plan.wave_bytes):
            _Wave(session, variants, plan, wave, progress).run()


class _Wave:
    """Passages that pass through all blocks together."""

    def __init__(
        self,
        session: Session,
        variants: Mapping[str, Variant],
        plan: ReadingPlan,
        passages: Sequence[_Passage],
        progress: Progress,
    ) -> None:
        self.session = session
        self.anatomy = session.anatomy
        self.plan = plan
        self.passages = passages
        self.progress = progress
        wanted = dict.fromkeys(model for passage in passages for model in passage.stream.models)
        self.variants = {model: variants[model] for model in wanted if model != DENSE}

    def run(self) -> None:
        with ExitStack() as end:
            if any(passage.stream.at_head.throughout for passage in self.passages):
                end.enter_context(self.anatomy.loaded_for_end())  # once, not after every block
            if not self._run_blocks():
                return
            if not any(passage.stream.at_head.throughout for passage in self.passages):
                end.enter_context(self.anatomy.loaded_for_end())
            self._end(self.passages)

    def _run_blocks(self) -> bool:
        """Run all blocks; return whether anything comes to their end."""
        for stack in self.anatomy.stacks:
            passages = [passage for passage in self.passages if passage.runs_in(stack)]
            if not passages:  # a wave of nothing but whole segments for the encoder
                return False
            self._begin(stack, passages)
            for layer in range(stack.first, stack.stop):
                with self.session.owner.block(layer, changes=bool(self.variants)) as block:
                    for group in self._groups(layer, passages):
                        self._read_group(layer, block, group)
            if stack is not self.anatomy.stacks[-1]:
                self._encode(passages)
        return True

    def _begin(self, stack: Stack, passages: Sequence[_Passage]) -> None:
        """Start the states of all models, and find the arguments of the stack's blocks.

        They are the same for all models but those with embeddings of their own.
        """
        owner = self.session.owner
        apart = [name for name, variant in self.variants.items() if not owner.starts_alike(variant, stack)]
        with self.anatomy.loaded(stack.first, to_read=True), self.anatomy.loaded_for_start():
            starter = self.session.starter(stack)
            for passage in passages:
                hidden, arguments = self._started(starter, stack, passage)
                alike = [model for model in passage.stream.models if model not in apart]
                passage.arguments = dict.fromkeys(alike, arguments)
                passage.hidden = dict.fromkeys(alike, hidden)
            for model in apart:
                with owner.beside(self.variants[model], owner.names_at_start(stack)):
                    for passage in passages:
                        if model in passage.stream.models:
                            passage.hidden[model], passage.arguments[model] = self._started(starter, stack, passage)

    def _started(self, starter: StackStarter, stack: Stack, passage: _Passage) -> tuple[Tensor, list[Arguments]]:
        memory = next(iter(passage.memory.values()), None)
        if memory is not None:
            memory = memory.to(self.anatomy.device)
        hidden, arguments = starter.begin(**self.session.stack_inputs(passage.batch, stack, memory))
        if memory is not None:
            self._check_handed_on(memory, arguments)
            arguments = [call.replaced(memory, _MEMORY) for call in arguments]
        return self._held(hidden), arguments

    def _check_handed_on(self, memory: Tensor, arguments: Sequence[Arguments]) -> None:
        if not all(memory in call for call in arguments):
            raise ModelError(
                f'this "{self.anatomy.kind}" model changes the output of its encoder on the way to the blocks of its '
                "decoder; such a model cannot be run block by block"
            )

    def _encode(self, passages: Sequence[_Passage]) -> None:
        """Keep the encoder's output of every model for the decoder."""
        with torch.no_grad(), self.anatomy.loaded_for_start():
            for model in (DENSE, *self.variants):
                with self._beside(model, self.anatomy.names_for_encoded()):
                    for passage in passages:
                        if passage.batch.decoder is not None and model in passage.hidden:
                            passage.memory[model] = self._held(self.anatomy.encoded(passage.hidden[model]))
        for passage in passages:
            passage.hidden, passage.arguments = {}, {}

    def _beside(self, model: str, names: Collection[str]) -> AbstractContextManager[None]:
        """Context manager in which loaded parameters outside the blocks are those of a model."""
        return nullcontext() if model == DENSE else self.session.owner.beside(self.variants[model], names)

    def _groups(self, layer: int, passages: Sequence[_Passage]) -> Iterator[list[_Passage]]:
        """Yield groups of passages whose dense activations in a block, kept for the comparison, fit into memory."""
        width = self.plan.compared_width(layer)
        sizes = [
            passage.batch.last.ids.numel() * width if self._compares(passage, layer) else 0 for passage in passages
        ]
        return within_memory(passages, sizes, self.plan.compared_bytes)

    def _compares(self, passage: _Passage, layer: int) -> bool:
        return bool(passage.stream.compares and self.variants and self._reads(passage, layer))

    def _reads(self, passage: _Passage, layer: int) -> bool:
        return self.anatomy.stack_of(layer) is read_stack(self.anatomy, passage.batch)

    def _read_group(self, layer: int, block: Block, group: Sequence[_Passage]) -> None:
        for model in (DENSE, *self.variants):
            reading = [passage for passage in group if model in passage.hidden]
            if not reading:
                continue
            if model == DENSE:
                block.restore()
            else:
                block.become(self.variants[model])
            used: dict[int, Reader] = {}
            for passage in reading:
                readers = passage.readers(model) if self._reads(passage, layer) else ()
                used |= {id(reader): reader for reader in readers}
                self._read_passage(layer, model, passage, readers)
            at_head = any(passage.stream.at_head.throughout for passage in reading)
            with self._beside(model, self.anatomy.names_for_end() if at_head else ()):
                for reader in used.values():
                    reader.flush()
        for passage in group:
            passage.dense = {}

    def _read_passage(self, layer: int, model: str, passage: _Passage, readers: Sequence[Reader]) -> None:
        hidden = passage.hidden[model].to(self.anatomy.device, non_blocking=True)
        keep = Keep(SIGNAL_SITES if model == DENSE and self._compares(passage, layer) else ())
        arguments = passage.arguments[model][layer - self.anatomy.stack_of(layer).first]
        if passage.memory:
            arguments = arguments.replaced(_MEMORY, passage.memory[model].to(self.anatomy.device, non_blocking=True))
        after = self.session.read_block(layer, hidden, arguments, passage.batch, [*readers, keep], passage.dense)
        if keep.values:
            passage.dense = {site: value for (_, site), value in keep.values.items()}
        passage.hidden[model] = self._held(after)
        self._advance(passage, layer)

    def _end(self, passages: Sequence[_Passage]) -> None:
        """Read the states after the last block, with the final norm and head of each model."""
        for model in (DENSE, *self.variants):
            with self._beside(model, self.anatomy.names_for_end()):
                for passage in passages:
                    if model in passage.hidden:
                        hidden = passage.hidden.pop(model).to(self.anatomy.device, non_blocking=True)
                        readers = passage.readers(model)
                        self.session.read_final(hidden, passage.batch, readers)
                        for reader in readers:
                            reader.flush()
                        self._advance(passage, len(self.anatomy.blocks))
        for passage in passages:
            passage.arguments, passage.memory = {}, {}

    def _advance(self, passage: _Passage, layer: int) -> None:
        """Report a block, or the end, as a share of the tokens that are read."""
        shares = (
            len(self.anatomy.blocks) + 1 if passage.runs_in(self.anatomy.stacks[-1]) else self.anatomy.stacks[0].stop
        )
        self.progress(passage.batch.n_tokens / shares)

    def _held(self, hidden: Tensor) -> Tensor:
        """Return states where they wait for the next block: on the device, or on the host if they do not fit."""
        return hidden.cpu() if self.plan.states_on_host else hidden
