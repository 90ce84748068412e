"""What reading will need, before it starts: memory of host and device, and time; and how to keep within a cap."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
from humanize import naturaldelta, naturalsize

from pruning.engine.plan import MemoryCapError
from pruning.models.anatomy import Anatomy

from .batches import Batch
from .readers.loss import log_likelihood, tile_rows
from .readers.signal import SIGNAL_SITES
from .session import Session
from .streams import DENSE, Stream, readable_neurons

#: Bytes that Python, torch, transformers, nnsight and a tokenizer take before any model is there.
_BASE = 800 << 20
#: Memory that is taken over what is held: gaps that the allocator leaves, as in pruning.
_SLACK = 1.4
#: Share of what is left for text that the dense model's values of a block may take; the rest is for hidden states.
_COMPARED = 0.4
#: Readers' own work over a forward pass, measured on the embedded model.
_READERS = 1.15
_FLOAT = 4
#: Of making a block a variant's: three passes over memory, at 5 GB/s.
_SECONDS_A_BYTE = 6e-10
#: Tokens whose loss is timed.
_TRIED = 256


@dataclass(frozen=True)
class ReadingPlan:
    """What a lockstep pass will need.

    Attributes
    ----------
    memory, device_memory
        Bytes at the most, estimated; of the device 0 on a CPU.
    wave_bytes
        Hidden states and arguments that are held at a time.
    compared_bytes
        Dense values of a block that are held at a time.
    states_on_host
        Whether hidden states wait on the host, since the device has no room for them.
    waves
        How often the blocks are gone through.
    seconds
        Estimated from a trial with one batch.
    tokens, models
        Tokens that are read by each model, the sum over models; and the number of models.
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
        """Return the bytes that a batch takes between blocks: hidden states of its models, and arguments."""
        return self._needs.held(batch, models)

    def compared_width(self, layer: int) -> int:
        """Return the bytes of the dense model's values in a block that variants are compared with, a token."""
        return self._needs.compared_width(layer)


def plan_reading(
    session: Session,
    streams: Sequence[Stream],
    *,
    memory: int | None = None,
    device_memory: int | None = None,
    trial: bool = True,
) -> ReadingPlan:
    """Work out what reading will need, and how many waves keep it within a cap.

    Parameters
    ----------
    session, streams
        As for :func:`probes.read_streams`.
    memory
        Cap on the process's resident memory, in bytes; by default what it has and nine tenths of what is free.
    device_memory
        Cap on the memory of a GPU, likewise.
    trial
        Whether to time one batch, for the estimate of the time.

    Raises
    ------
    MemoryCapError
        If the cap cannot hold one block and one batch with what they need.
    """
    needs = _Needs(session, streams)
    on_device = session.anatomy.device.type != "cpu"
    if device_memory is not None and not on_device:
        raise MemoryCapError("there is no device memory to cap: the model is on the CPU; use --memory")
    cap = memory if memory is not None else _free_on_host()
    device_cap = (device_memory if device_memory is not None else _free_on_device(session)) if on_device else 0
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
        _needs=needs,
    )


def _refuse(cap: int, device_cap: int, needed: float, device_needed: float, on_device: bool) -> None:
    what, given, wanted = ("device memory", device_cap, device_needed) if on_device else ("memory", cap, needed)
    raise MemoryCapError(
        f"{naturalsize(given, binary=True)} of {what} cannot hold one block and one batch with what they need: about "
        f"{naturalsize(wanted, binary=True)} for this model and these variants; "
        f"raise --{what.replace(' ', '-')}, or lower evaluation.batch_tokens"
    )


def _free_on_host() -> int:
    return int(psutil.Process().memory_info().rss + 0.9 * psutil.virtual_memory().available)


def _free_on_device(session: Session) -> int:
    free, _ = torch.cuda.mem_get_info(session.anatomy.device)
    return int(torch.cuda.memory_allocated(session.anatomy.device) + 0.9 * free)


class _Needs:
    """Estimates for one model and some streams, in bytes unless it says otherwise."""

    def __init__(self, session: Session, streams: Sequence[Stream]) -> None:
        self.session = session
        self.anatomy = anatomy = session.anatomy
        self.streams = streams
        self.element = anatomy.element_size
        self.variants = len({model for stream in streams for model in stream.models} - {DENSE})
        self.widest = max(anatomy.shape(*key)[0] for key in anatomy)

    # -- what does not depend on the amount of text --------------------------------------------------------------

    def fixed(self, on_device: bool) -> tuple[int, int]:
        """Return what is held beside text, on the host and on the device."""
        anatomy = self.anatomy
        sizes = [sum(p.numel() for p in block.parameters()) * self.element for block in anatomy.blocks]
        beside = anatomy.other_numel * self.element
        weights = (max(sizes) + beside) if anatomy.streamed else sum(sizes) + beside
        weights += max(sizes) if self.variants else 0
        working = self._passing() + self._scoring()
        unpacking = max((out * inputs // 8 for out, inputs in (anatomy.shape(*key) for key in anatomy)), default=0)
        results = sum(map(self._results, self.streams))
        if on_device:
            return _BASE + results + (max(sizes) if anatomy.streamed else 0), weights + working + unpacking
        return _BASE + results + weights + working + unpacking, 0

    def _results(self, stream: Stream) -> int:
        """Return what is kept of a stream until all is read; what is written to files is mapped and not counted."""
        files = stream.files
        layers = len(self.anatomy.blocks)
        rows = sum(len(batch.segments) for batch in stream.batches)
        a_model = layers * (rows * (self.anatomy.hidden_size * 4 + 128) + readable_neurons(self.anatomy) * 32)
        if stream.compares:
            return a_model * sum(model not in files for model in stream.models)
        return a_model if stream.models == (DENSE,) else 0

    def _passing(self) -> int:
        """Return what a batch needs on its way through a block."""
        longest = max((batch.ids.shape[1] for batch in self._batches()), default=0)
        heads = int(self.anatomy.config.num_attention_heads)
        width = self.widest * 5 + self.anatomy.hidden_size * 6 + heads * longest
        return max((batch.ids.numel() for batch in self._batches()), default=0) * width * max(self.element, _FLOAT)

    def _scoring(self) -> int:
        """Return what the logits of a batch take, a tile of the vocabulary at a time, with the head's own tile."""
        tokens = max((batch.ids.numel() for batch in self._batches()), default=0)
        tile = tile_rows(self.anatomy.device)
        return (tokens * (3 * tile + self.anatomy.hidden_size) + tile * self.anatomy.hidden_size) * _FLOAT

    # -- what does ---------------------------------------------------------------------------------------------------

    def held(self, batch: Batch, models: int) -> int:
        """Return what a batch takes between blocks."""
        tokens = batch.ids.numel()
        masks = 2 * tokens * batch.ids.shape[1]  # bool; some models have one for sliding and one for full attention
        rotary = 4 * tokens * 256 * _FLOAT
        return tokens * self.anatomy.hidden_size * self.element * (models + 1) + masks + rotary

    def compared_width(self, layer: int) -> int:
        """Return the bytes a token of the dense values of a block."""
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
        return self._widest_compared() * sum(batch.ids.numel() for batch in self._compared())

    def largest_compared(self) -> int:
        return self._widest_compared() * max((batch.ids.numel() for batch in self._compared()), default=0)

    def largest_batch(self) -> int:
        """Return the least that any text takes."""
        return self.largest_held() + self.largest_compared()

    @property
    def tokens(self) -> int:
        return sum(len(stream.models) * batch.n_tokens for stream in self.streams for batch in stream.batches)

    # -- time --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def seconds(self, waves: int) -> float:
        """Try one batch in the first block and one tile of the vocabulary, and scale up."""
        batches = list(self._batches())
        if not batches:
            return 0.0
        batch = max(batches, key=lambda one: one.ids.numel())
        session, anatomy = self.session, self.anatomy
        with anatomy.loaded(0, to_read=True), anatomy.loaded_for_start():
            hidden, arguments = session.starter().begin(**session.stack_inputs(batch))
        with session.owner.block(0, changes=False):
            a_block = _timed(lambda: session.read_block(0, hidden, arguments[0], batch), anatomy)
        states = hidden.flatten(0, 1)[:_TRIED]
        index = torch.arange(len(states), device=states.device)
        with anatomy.loaded_for_end():
            head = _timed(lambda: log_likelihood(anatomy, states, index, batch.ids.flatten()[:_TRIED]), anatomy, 1)
        padded = sum(len(stream.models) * one.ids.numel() for stream in self.streams for one in stream.batches)
        scored = sum(
            len(stream.models) * one.ids.numel()
            for stream in self.streams
            for one in stream.batches
            if stream.models != (DENSE,) or stream.compares
        )
        block_bytes = sum(p.numel() for p in anatomy.blocks[0].parameters()) * self.element
        applying = waves * self.variants * len(anatomy.blocks) * block_bytes * _SECONDS_A_BYTE
        passes = padded * a_block / batch.ids.numel() * len(anatomy.blocks) * _READERS
        return passes + scored * head / len(states) + applying

    def _batches(self) -> Sequence[Batch]:
        return [batch for stream in self.streams for batch in stream.batches]

    def _compared(self) -> Sequence[Batch]:
        return [batch for stream in self.streams if stream.compares for batch in stream.batches]

    def _widest_compared(self) -> int:
        return max(self.compared_width(layer) for layer in range(len(self.anatomy.blocks)))


def _timed(run: Callable[[], object], anatomy: Anatomy, repeats: int = 2) -> float:
    """Return the shortest of some times in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if anatomy.device.type == "cuda":
            torch.cuda.synchronize(anatomy.device)
        times.append(time.perf_counter() - began)
    return min(times)
