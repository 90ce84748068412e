"""Estimates of the memory and time that reading will need, and a split into waves that keeps within a memory cap."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from humanize import naturaldelta, naturalsize
from torch import Tensor

from pruning.engine.plan import MemoryCapError
from pruning.memory import free_memory
from pruning.models.anatomy import Anatomy, Stack, role_kind

from .batches import Batch
from .readers.firing import FOLDS
from .readers.lens import AT_ONCE
from .readers.loss import log_likelihood, tile_rows
from .readers.signal import SIGNAL_SITES
from .session import Session
from .streams import DENSE, FittingStream, Stream, most_experts, readable_neurons

#: Bytes taken by Python, torch, transformers, nnsight and a tokenizer before a model is loaded.
_BASE = 800 << 20
#: Resident memory over memory in use, because of allocator fragmentation, as in pruning.
_SLACK = 1.4
#: Largest share of the room for text given to the dense activations of a block; the rest is for hidden states.
_COMPARED = 0.4
#: Cost of a pass with readers over a bare forward pass, measured on the embedded model.
READERS = 1.15
_FLOAT = 4
#: Cost of applying a variant to a block: three passes over memory, at 5 GB/s.
_SECONDS_A_BYTE = 6e-10
#: Number of tokens whose loss is timed.
_TRIED = 256


@dataclass(frozen=True)
class ReadingPlan:
    """What a lockstep pass will need.

    Attributes
    ----------
    memory, device_memory
        Estimated peak in bytes, on the host and on the device; the latter is 0 on a CPU.
    wave_bytes
        Bytes of hidden states and arguments held at a time.
    compared_bytes
        Bytes of the dense model's activations in a block held at a time.
    states_on_host
        Whether hidden states are offloaded to the host because they do not fit on the device.
    waves
        Number of passes over the blocks.
    seconds
        Estimated from a trial with one batch; 0 without a trial.
    tokens, models
        Number of tokens read, summed over models; number of models.
    kept
        Bytes of the results on disk, for streams that write theirs to files.
    """

    memory: int
    device_memory: int
    wave_bytes: int
    compared_bytes: int
    states_on_host: bool
    waves: int
    seconds: float
    tokens: int
    models: int
    kept: int
    _needs: _Needs

    def __str__(self) -> str:
        """Return the plan in one line."""
        parts = [
            f"{self.models} model{'s' * (self.models != 1)}, {self.tokens:,} tokens in all",
            *([f"in {self.waves} waves"] if self.waves > 1 else []),
            f"memory about {naturalsize(self.memory, binary=True)}",
            *([f"{naturalsize(self.device_memory, binary=True)} on the device"] if self.device_memory else []),
            *(["hidden states on the host"] if self.states_on_host else []),
            *([f"about {naturaldelta(self.seconds)}"] if self.seconds else []),
        ]
        return "reading plan: " + ", ".join(parts)

    def held(self, batch: Batch, models: int) -> int:
        """Return the bytes that a batch takes between blocks: hidden states of all models, and arguments."""
        return self._needs.held(batch, models)

    def compared_width(self, layer: int) -> int:
        """Return the bytes per token of the dense model's activations that variants are compared with in a block."""
        return self._needs.compared_width(layer)


def plan_reading(
    session: Session,
    streams: Sequence[Stream],
    *,
    memory: int | None = None,
    device_memory: int | None = None,
    trial: bool = True,
    replaced: int = 0,
) -> ReadingPlan:
    """Estimate what reading will need, and split it into waves that keep within the memory cap.

    Parameters
    ----------
    session, streams
        As for :func:`probes.read_streams`.
    memory
        Cap on the process's resident memory, in bytes; by default what it has now plus 90% of what is free.
    device_memory
        The same for a GPU's memory.
    trial
        Whether to time one batch in order to estimate the total time.
    replaced
        Number of values that the variant with most of them has of its own beside the projections, such as embeddings:
        they are held beside the dense model's.

    Raises
    ------
    MemoryCapError
        If one block and one batch do not fit under the cap.
    """
    needs = _Needs(session, streams, replaced)
    on_device = session.anatomy.device.type != "cpu"
    if device_memory is not None and not on_device:
        raise MemoryCapError("there is no device memory to cap: the model is on the CPU; use --memory")
    cap = memory if memory is not None else free_memory()
    device_cap = 0
    if on_device:
        device_cap = device_memory if device_memory is not None else free_memory(session.anatomy.device)
    fixed, device_fixed = needs.fixed(on_device)
    least = needs.largest_batch()
    room = int((device_cap - device_fixed if on_device else cap - fixed) / _SLACK)
    if room < least:
        _refuse(cap, device_cap, fixed + least * _SLACK, device_fixed + least * _SLACK, on_device)
    total = needs.total_held()
    compared = min(needs.total_compared(), max(int(room * _COMPARED), needs.largest_compared()))
    wave = min(total, room - compared)
    states_on_host = False
    if on_device and total > room - compared:
        host_room = int((cap - fixed) / _SLACK)
        if host_room > wave:
            states_on_host, wave = True, min(total, host_room)
    wave = max(wave, needs.largest_held())
    on_host = wave if states_on_host or not on_device else 0
    memory_needed = fixed + int(_SLACK * (on_host + (0 if on_device else compared)))
    if memory_needed > cap:
        _refuse(cap, device_cap, memory_needed, device_fixed, on_device)
    models = {model for stream in streams for model in stream.models}
    waves = -(-total // wave) if total else 0
    return ReadingPlan(
        memory=memory_needed,
        device_memory=device_fixed + int(_SLACK * (compared + (0 if states_on_host else wave))) if on_device else 0,
        wave_bytes=wave,
        compared_bytes=compared,
        states_on_host=states_on_host,
        waves=waves,
        seconds=needs.seconds(waves) if trial else 0.0,
        tokens=needs.tokens,
        models=len(models),
        kept=needs.kept(),
        _needs=needs,
    )


def _refuse(cap: int, device_cap: int, needed: float, device_needed: float, on_device: bool) -> None:
    what, given, wanted = ("device memory", device_cap, device_needed) if on_device else ("memory", cap, needed)
    raise MemoryCapError(
        f"{naturalsize(given, binary=True)} of {what} cannot hold one block and one batch: this model and these "
        f"variants need about {naturalsize(wanted, binary=True)}; "
        f"raise --{what.replace(' ', '-')}, or lower evaluation.batch_tokens"
    )


class _Needs:
    """Estimates for one model and some streams, in bytes unless stated otherwise."""

    def __init__(self, session: Session, streams: Sequence[Stream], replaced: int) -> None:
        self.session = session
        self.anatomy = anatomy = session.anatomy
        self.streams = streams
        self.replaced = replaced
        self.element = anatomy.element_size
        self.variants = len({model for stream in streams for model in stream.models} - {DENSE})
        self.widest = max(anatomy.shape(*key)[0] for key in anatomy)

    # -- independent of the amount of text -----------------------------------------------------------------------

    def fixed(self, on_device: bool) -> tuple[int, int]:
        """Return what everything but the text takes, on the host and on the device."""
        anatomy = self.anatomy
        sizes = [sum(p.numel() for p in block.parameters()) * self.element for block in anatomy.blocks]
        beside = anatomy.other_numel * self.element
        weights = (max(sizes) + beside) if anatomy.streamed else sum(sizes) + beside
        weights += max(sizes) + self.replaced * self.element if self.variants else 0
        working = self._passing() + self._scoring()
        unpacking = max((out * inputs // 8 for out, inputs in (anatomy.shape(*key) for key in anatomy)), default=0)
        results = sum(map(self._results, self.streams))
        if on_device:
            return _BASE + results + (max(sizes) if anatomy.streamed else 0), weights + working + unpacking
        return _BASE + results + weights + working + unpacking, 0

    def _results(self, stream: Stream) -> int:
        """Return what a stream's results take until reading ends; those in files are memory-mapped and not counted."""
        a_model = self._result(stream)
        if stream.compares:
            return a_model * sum(model not in stream.files for model in stream.models)
        return a_model if isinstance(stream, FittingStream) else 0

    def kept(self) -> int:
        """Return what the results of all streams take in their files."""
        return sum(self._result(stream) * len(stream.files) for stream in self.streams)

    def _result(self, stream: Stream) -> int:
        """Return what a stream's results of one model take."""
        layers = len(self.anatomy.blocks)
        rows = sum(len(batch.segments) for batch in stream.batches if batch.decoder is None)
        pooled_and_routed = (self.anatomy.hidden_size + most_experts(self.anatomy)) * 4
        power_and_error = 2 * len(SIGNAL_SITES) * 8
        return layers * (rows * (pooled_and_routed + power_and_error) + readable_neurons(self.anatomy) * FOLDS * 4)

    def _passing(self) -> int:
        """Return the working memory of a batch inside a block."""
        parts = [part for batch in self._batches() for part in _parts(batch)]
        longest = max((part.ids.shape[1] for part in parts), default=0)
        heads = int(self.anatomy.config.num_attention_heads)
        width = self.widest * 5 + self.anatomy.hidden_size * 6 + heads * longest
        if most_experts(self.anatomy):  # each token passes through several
            shapes = (self.anatomy.shape(*key) for key in self.anatomy if role_kind(key[1]) != key[1])
            expert = max(outputs + inputs for outputs, inputs in shapes)
            width += int(self.anatomy.config.num_experts_per_tok) * expert * 4
        return max((part.ids.numel() for part in parts), default=0) * width * max(self.element, _FLOAT)

    def _scoring(self) -> int:
        """Return what a batch's logits, or a lens's, take, one vocabulary tile at a time, and that of the head."""
        tokens = max((batch.last.ids.numel() for batch in self._batches()), default=0)
        tile = tile_rows(self.anatomy.device)
        width = self.anatomy.hidden_size
        positions = min(max((stream.at_head.positions for stream in self.streams), default=0), AT_ONCE)
        at_lens = positions * (8 * tile + 4 * width)
        return (max(tokens * (3 * tile + width), at_lens) + tile * width) * _FLOAT

    # -- proportional to the amount of text --------------------------------------------------------------------------

    def held(self, batch: Batch, models: int) -> int:
        """See :meth:`ReadingPlan.held`."""
        if self.anatomy.encoder_decoder:
            return self._held_twice(batch, models)
        tokens = batch.ids.numel()
        masks = 2 * tokens * batch.ids.shape[1]  # bool; some models have one each for sliding and full attention
        rotary = 4 * tokens * 256 * _FLOAT
        return tokens * self.anatomy.hidden_size * self.element * (models + 1) + masks + rotary

    def _held_twice(self, batch: Batch, models: int) -> int:
        """Return the same for an encoder-decoder: the output of every model's encoder is held, too.

        Position biases and masks are one tensor with a value a head and pair of tokens: of the encoder, then of the
        decoder, for its own tokens and those of the encoder.
        """
        heads = int(self.anatomy.config.num_attention_heads)
        rows, first = batch.ids.shape
        second = batch.decoder.ids.shape[1] if batch.decoder is not None else 0
        states = rows * (first + second) * self.anatomy.hidden_size * self.element * (models + 1)
        pairs = rows * max(first * first, second * (first + second))
        return states + pairs * (heads + 1) * max(self.element, _FLOAT)

    def compared_width(self, layer: int) -> int:
        """See :meth:`ReadingPlan.compared_width`."""
        if not self.variants:
            return 0
        anatomy = self.anatomy
        width = sum(anatomy.shape(layer, role)[0] for role in anatomy.roles(layer) if role in SIGNAL_SITES)
        return (width + anatomy.hidden_size) * self.element

    def total_held(self) -> int:
        return sum(self.held(batch, len(stream.models)) for stream in self.streams for batch in stream.batches)

    def largest_held(self) -> int:
        sizes = [self.held(batch, len(stream.models)) for stream in self.streams for batch in stream.batches]
        return max(sizes, default=0)

    def total_compared(self) -> int:
        return self._widest_compared() * sum(batch.last.ids.numel() for batch in self._compared())

    def largest_compared(self) -> int:
        return self._widest_compared() * max((batch.last.ids.numel() for batch in self._compared()), default=0)

    def largest_batch(self) -> int:
        """Return the minimum that must fit for any text to be read."""
        return self.largest_held() + self.largest_compared()

    @property
    def tokens(self) -> int:
        return sum(len(stream.models) * batch.n_tokens for stream in self.streams for batch in stream.batches)

    # -- time --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def seconds(self, waves: int) -> float:
        """Time one batch in the first block of each stack and in the head, and extrapolate."""
        if not self._batches():
            return 0.0
        passes = sum(map(self._seconds_in, self.anatomy.stacks))
        block_bytes = sum(p.numel() for block in self.anatomy.blocks for p in block.parameters()) * self.element
        return passes * READERS + self._seconds_to_score() + waves * self.variants * block_bytes * _SECONDS_A_BYTE

    def _seconds_in(self, stack: Stack) -> float:
        """Return what all text takes in a stack."""
        session, anatomy, layer = self.session, self.anatomy, stack.first
        found = [batch for batch in self._batches() if layer == 0 or batch.decoder is not None]
        if not found:
            return 0.0
        batch = max(found, key=lambda one: _part(one, layer).ids.numel())
        memory = None
        with anatomy.loaded(layer, to_read=True), anatomy.loaded_for_start():
            if layer > 0:  # what the encoder's output is makes no difference
                memory = self._zeros(*batch.ids.shape)
            hidden, arguments = session.starter(stack).begin(**session.stack_inputs(batch, stack, memory))
        with session.owner.block(layer, changes=False):
            a_block = _timed(lambda: session.read_block(layer, hidden, arguments[0], batch), anatomy)
        padded = sum(
            len(stream.models) * _part(one, layer).ids.numel()
            for stream in self.streams
            for one in stream.batches
            if layer == 0 or one.decoder is not None
        )
        return padded * a_block / _part(batch, layer).ids.numel() * (stack.stop - stack.first)

    def _seconds_to_score(self) -> float:
        """Return what the logits of all text take, and those of a lens."""
        anatomy = self.anatomy
        scored = sum(
            len(stream.models) * one.last.ids.numel()
            for stream in self.streams
            for one in stream.batches
            if stream.at_head.all_tokens and (one.decoder is not None or not anatomy.encoder_decoder)
        )
        scored += sum(len(stream.models) * stream.at_head.products for stream in self.streams)
        if not scored:
            return 0.0
        batch = max(self._batches(), key=lambda one: one.last.ids.numel())
        ids = batch.last.ids.flatten()[:_TRIED]
        with anatomy.loaded_for_end():
            states = self._zeros(len(ids))
            index = torch.arange(len(states), device=states.device)
            head = _timed(lambda: log_likelihood(anatomy, states, index, ids), anatomy, 1)
        return scored * head / len(states)

    def _zeros(self, *size: int) -> Tensor:
        model: Any = self.anatomy.model
        return torch.zeros(*size, self.anatomy.hidden_size, dtype=model.dtype, device=self.anatomy.device)

    def _batches(self) -> Sequence[Batch]:
        return [batch for stream in self.streams for batch in stream.batches]

    def _compared(self) -> Sequence[Batch]:
        return [batch for stream in self.streams if stream.compares for batch in stream.batches]

    def _widest_compared(self) -> int:
        return max(self.compared_width(layer) for layer in range(len(self.anatomy.blocks)))


def _part(batch: Batch, first: int) -> Batch:
    """Return what the stack reads that begins with a block."""
    return batch if first == 0 else batch.last


def _parts(batch: Batch) -> Sequence[Batch]:
    return [batch] if batch.decoder is None else [batch, batch.decoder]


def _timed(run: Callable[[], object], anatomy: Anatomy, repeats: int = 2) -> float:
    """Return the shortest of several run times, in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if anatomy.device.type == "cuda":
            torch.cuda.synchronize(anatomy.device)
        times.append(time.perf_counter() - began)
    return min(times)
