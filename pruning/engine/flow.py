"""Passing calibration text through the blocks: one shared stream until jobs diverge, then one stream per job."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..input_parts import InputPart
from ..models.anatomy import Anatomy, InputGroup, Stack
from ..statistics import SIMILARITY, InputStatistics, Passage
from ..text.calibration import CalibrationSet, Piece
from ..variants.biases import biased
from .choosing import Choice
from .jobs import Job, Schedule
from .parts import StreamParts
from .shelves import Joined
from .streams import Progress, StackStarter, Stream, gather, run_block
from .workspace import Workspace


class StatisticsOf:
    """Statistics of one block by job: sums over the pieces of its text, once per calibration set.

    A piece is added to the sums of its sets as it comes, in the order of each set, and kept no longer than that takes
    (:func:`pruning.engine.jobs.most_held`).
    """

    def __init__(self, schedule: Schedule, layer: int) -> None:
        self._schedule = schedule
        self._passages: dict[Piece, Passage] = {}
        self._pieces: dict[Piece, dict[str, InputStatistics]] = {}
        self._by_set: dict[CalibrationSet, dict[str, InputStatistics]] = {}
        self._left = schedule.pieces_by_set(layer)

    def take(self, piece: Piece, statistics: dict[str, InputStatistics], passage: Passage | None = None) -> None:
        """Add those of one piece."""
        self._pieces[piece] = statistics
        if passage is not None:
            self._passages[piece] = passage
        for calibration, left in self._left.items():
            while left and left[0] in self._pieces:
                self._add(calibration, self._pieces[left.pop(0)])
        wanted = {piece for left in self._left.values() for piece in left}
        self._pieces = {piece: own for piece, own in self._pieces.items() if piece in wanted}

    def _add(self, calibration: CalibrationSet, own: dict[str, InputStatistics]) -> None:
        if calibration not in self._by_set:
            self._by_set[calibration] = dict(own)
            return
        sums = self._by_set[calibration]
        for leader in list(sums):  # one after the other: only one sum is there beside what it is of
            if leader in own:
                sums[leader] = sums[leader] + own[leader]
            else:  # other sets alone read it
                del sums[leader]

    def __call__(self, job: Job) -> dict[str, InputStatistics]:
        assert job.calibration is not None
        return self._by_set[job.calibration]

    def passage(self, job: Job) -> Passage:
        """Return what the block does to the residual stream of a job that needs to know."""
        return sum((self._passages[piece] for piece in self._schedule.pieces_of(job)), Passage())


class Flow:
    """Passes the streams of a schedule through the blocks.

    Parameters
    ----------
    anatomy, schedule
        The blocks, and which text passes through them for which jobs.
    workspace
        Stores hidden states between blocks.
    needs
        Returns the statistics that a job needs.
    batch_tokens
        Tokens per batch.
    progress
        Called with the number of tokens after each batch.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        schedule: Schedule,
        workspace: Workspace,
        *,
        needs: Callable[[Job], frozenset[str]],
        batch_tokens: int,
        progress: Progress,
    ) -> None:
        self.anatomy = anatomy
        self.schedule = schedule
        self.workspace = workspace
        self.needs = needs
        self.progress = progress
        self.batch_tokens = batch_tokens
        self.pieces: dict[Piece, Stream] = {}
        self.own: dict[Job, Stream] = {}
        self._next: dict[Piece, Sequence[Tensor]] = {}
        self._next_own: dict[Job, Stream] = {}
        self._starter: tuple[Stack, StackStarter] | None = None
        self._stream_parts = StreamParts(anatomy)
        for piece in schedule.pieces(0):
            self.pieces[piece] = self._stream([piece])

    def _stream(self, pieces: Sequence[Piece]) -> Stream:
        assert self.schedule.text is not None
        stream = Stream([], [])
        for piece in pieces:
            batches = self.schedule.text.tokens[piece].split(max(1, self.batch_tokens // piece.length))
            stream.tokens += batches
            stream.languages += [piece.language] * len(batches)
        return stream

    def enter(self, layer: int) -> None:
        """Start all streams if the block is the first of a stack."""
        stack = self.anatomy.stack_of(layer)
        if layer == stack.first:
            with self.anatomy.loaded_for_start():
                for name, stream in self._named():
                    if stack.first > 0:  # a decoder, which reads the output of the encoder
                        stream.memory = [self.anatomy.encoded(hidden) for hidden in stream.hidden]
                    # Under a separate name: the previous states must stay, so that a killed run can resume.
                    shelf = self.workspace.shelf(layer, name, "begun", len(stream.tokens))
                    self._start(stack, stream, shelf.add)
                    stream.hidden = shelf.done()

    def _start(self, stack: Stack, stream: Stream, sink: Callable[[Tensor], object]) -> None:
        if self._starter is None or self._starter[0] is not stack:
            self._starter = (stack, StackStarter(self.anatomy, stack))
        self._starter[1](stream, sink)

    def through_dense(self, layer: int) -> StatisticsOf:
        """Pass every shared piece of text through the dense block."""
        jobs = self.schedule.on_pieces(layer)
        go_on = set(self.schedule.pieces(layer + 1)) if layer + 1 < self.schedule.blocks else set()
        statistics = StatisticsOf(self.schedule, layer)
        for piece in self.schedule.pieces(layer):
            readers = [job for job in jobs if piece in self.schedule.pieces_of(job)]
            wanted = self._wanted(layer, readers)
            stream, shelf = self.pieces[piece], None
            if piece in go_on:
                shelf = self.workspace.shelf(layer + 1, _piece_name(piece), "hidden", len(stream.tokens))
            sink: Callable[[Tensor], object] | None = None if shelf is None else shelf.add
            passage = Passage() if any(SIMILARITY in self.needs(job) for job in readers) else None
            if passage is not None:
                sink = _compared(passage, stream, sink)
            parts = self._parts(layer, wanted, readers)
            found = gather(self.anatomy, layer, stream, wanted, self.progress, sink, parts)
            statistics.take(piece, found, passage)
            del found  # the sums have it
            if shelf is not None:
                self._next[piece] = shelf.done()
        return statistics

    def own_statistics(self, job: Job, layer: int) -> dict[str, InputStatistics]:
        """Pass the states of one job through the dense block."""
        wanted = self._wanted(layer, [job])
        if not wanted:
            return {}
        parts = self._parts(layer, wanted, [job])
        return gather(self.anatomy, layer, self.own[job], wanted, self.progress, parts=parts)

    def through_pruned(self, job: Job, layer: int, choice: Choice) -> None:
        """Pass a job's states through its pruned block, if the job has its own states from here on."""
        if self.schedule.departs(job, layer):
            stream = self._stream(self.schedule.pieces_of(job))
            parts = [self.pieces[piece] for piece in self.schedule.pieces_of(job)]
            stream.hidden = Joined([part.hidden for part in parts])
            stream.arguments = [arguments for part in parts for arguments in part.arguments]
            if parts[0].memory is not None:
                stream.memory = [memory for part in parts for memory in part.memory or ()]
        elif job in self.own and self.schedule.goes_on(job, layer):
            stream = self.own[job]
        else:
            return
        with _pruned(self.anatomy, layer, choice):
            shelf = self.workspace.shelf(layer + 1, job.id, "hidden", len(stream.tokens))
            stack = self.anatomy.stack_of(layer)
            for output in run_block(self.anatomy.blocks[layer], stream, layer, stack, self.progress):
                shelf.add(output)
        self._next_own[job] = Stream(stream.tokens, stream.languages, shelf.done(), stream.memory, stream.arguments)

    def leave(self, layer: int) -> None:
        """Advance to the next block."""
        self.pieces = {piece: self.pieces[piece] for piece in self._next}
        for piece, hidden in self._next.items():
            self.pieces[piece].hidden = hidden
        self.own, self._next_own, self._next = self._next_own, {}, {}
        self._stream_parts.leave()

    def states(self) -> dict[str, dict[str, Sequence[Tensor]]]:
        """Return the states needed to resume before the next block."""
        return {
            name: {"hidden": stream.hidden} | ({"memory": stream.memory} if stream.memory else {})
            for name, stream in self._named()
        }

    def resume(self) -> int:
        """Load the states saved by a killed sweep; return the block to resume at."""
        found = self.workspace.resumed()
        if found is None:
            return 0
        layer, states = found
        stack = self.anatomy.stack_of(layer)
        self.pieces = {piece: self._stream([piece]) for piece in self.schedule.pieces(layer)}
        self.own = {job: self._stream(self.schedule.pieces_of(job)) for job in self.schedule.on_their_own(layer)}
        with self.anatomy.loaded(stack.first), self.anatomy.loaded_for_start():
            for name, stream in self._named():
                parts = states[name]
                memory = parts.get("memory")
                stream.memory = None if memory is None else [batch.to(self.anatomy.device) for batch in memory]
                if layer != stack.first:
                    self._start(stack, stream, lambda hidden: None)
                stream.hidden = parts["hidden"]
        return layer

    def _wanted(self, layer: int, jobs: Sequence[Job]) -> dict[InputGroup, frozenset[str]]:
        wanted: dict[InputGroup, frozenset[str]] = {}
        for group in self.anatomy.groups(layer):
            readers = [job for job in jobs if any(job.recipe.reads(layer, role) for role in group.roles)]
            if readers:
                needed = (self.needs(job) - job.recipe.spares(group.roles) for job in readers)
                wanted[group] = frozenset().union(*needed)
        return wanted

    def _parts(self, layer: int, wanted: Iterable[InputGroup], jobs: Sequence[Job]) -> dict[str, dict[str, InputPart]]:
        """Return the parts of the requested inputs that jobs give less weight, by leading role."""
        subspaces = list(dict.fromkeys(job.recipe.subspaces for job in jobs if job.recipe.subspaces is not None))
        return {group.leader: self._stream_parts.of(layer, group.leader, subspaces) for group in wanted}

    def _named(self) -> list[tuple[str, Stream]]:
        pieces = [(_piece_name(piece), stream) for piece, stream in self.pieces.items()]
        return pieces + [(job.id, stream) for job, stream in self.own.items()]


def _compared(passage: Passage, stream: Stream, sink: Callable[[Tensor], object] | None) -> Callable[[Tensor], object]:
    """Return a sink for a block's output that compares it with the input, batch by batch, and passes it on."""
    inputs = iter(stream.hidden)

    def take(after: Tensor) -> None:
        passage.add(next(inputs).to(after.device), after)
        if sink is not None:
            sink(after)

    return take


def _piece_name(piece: Piece) -> str:
    kind = f"-items{zlib.crc32(piece.items.encode())}" if piece.items else ""  # a category may have any characters
    return f"{piece.language}{kind}-{piece.length}-{piece.start}-{piece.stop}"


@contextmanager
def _pruned(anatomy: Anatomy, layer: int, choice: Choice) -> Iterator[None]:
    """Context manager that replaces a block's weights by a job's pruned or quantized ones."""
    dense = {role: anatomy.weight(layer, role).clone() for role in (*choice.masks, *choice.codes)}
    try:
        for role, quantized in choice.codes.items():
            anatomy.set_weight(layer, role, quantized.weight())
        for role, mask in choice.masks.items():
            weight = choice.weights[role] if role in choice.weights else dense[role].masked_fill(~mask, 0)
            anatomy.set_weight(layer, role, weight)
        with biased(anatomy, {(layer, role): bias for role, bias in choice.biases.items()}):
            yield
    finally:
        for role, weight in dense.items():
            anatomy.set_weight(layer, role, weight)
