"""The sweep: all recipes and calibration sets advance through the model together, a block at a time.

A block's weights are loaded once for all of them. Statistics are shared wherever that is exact: by projections that
read the same input; by jobs that see the same states (everything before the first pruned block, and everything under
dense propagation); and by calibration sets, whose statistics are sums over the pieces of text that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..allocation import Budgets
from ..errors import RecipeError
from ..models.anatomy import Anatomy, InputGroup, Stack
from ..statistics import CURVATURE, GRADIENT, InputStatistics, together
from ..text.calibration import CalibrationSet, CalibrationText, Piece
from ..variants.masks import Key, MaskSet
from .budgets import Survey, needs_survey, settled, survey_needs
from .choosing import Choice, Derivatives, choose
from .gradients import differentiate
from .jobs import Job, Schedule, check_fits
from .streams import Progress, StackStarter, Stream, gather, run_block
from .workspace import Workspace

_OF_THE_LOSS = frozenset({GRADIENT, CURVATURE})
_Needs = Callable[[Job], frozenset[str]]
#: Tokens whose loss is differentiated at a time: whole logits are held for them.
GRADIENT_TOKENS = 256


@dataclass(frozen=True)
class Pruned:
    """What a job came to.

    Attributes
    ----------
    masks
        Kept weights of every projection in the recipe's scope.
    values
        For methods that correct weights, the values of the kept ones, in the order of the mask.
    remarks
        What a reader of the recipe should know.
    """

    masks: MaskSet
    values: Mapping[Key, Tensor] | None
    remarks: tuple[str, ...]


def sweep(
    anatomy: Anatomy,
    jobs: Sequence[Job],
    text: CalibrationText | None = None,
    *,
    batch_tokens: int = 2048,
    workspace: Workspace | None = None,
    progress: Progress = lambda tokens: None,
) -> Callable[[Job], Pruned]:
    """Choose the masks, and the weights where a method corrects them, of any number of variants.

    The model is changed while the sweep runs and is the dense model again afterwards, bit for bit.

    Parameters
    ----------
    anatomy
        Of the dense model.
    jobs
        What to make.
    text
        Of the calibration sets of all jobs that have one.
    batch_tokens
        Tokens that go through a block at a time.
    workspace
        Where to keep what is done; a killed sweep that is started again with the same workspace goes on.
    progress
        Told of the tokens as they go through a block; see :func:`sweep_work` for the total.

    Returns
    -------
    callable
        From a job to what it came to, read from the workspace when it is asked for.

    Raises
    ------
    RecipeError
        If a recipe does not fit the model, or needs text and has none.
    ModelError
        If a weight or an activation is not finite.
    """
    jobs = list(dict.fromkeys(jobs))
    for job in jobs:
        check_fits(anatomy, job.recipe)
        if job.recipe.calibrated and (job.calibration is None or text is None):
            raise RecipeError(f"{job.recipe.method} needs calibration text")
    run = _Sweep(anatomy, jobs, text, batch_tokens, workspace or Workspace(), progress)
    with torch.no_grad():
        run.everything()
    return run.pruned


def sweep_work(anatomy: Anatomy, jobs: Sequence[Job], text: CalibrationText | None) -> int:
    """Return how many tokens a sweep will send through blocks in all, as its `progress` counts them."""
    differentiating, streaming = _split(jobs)
    work = Schedule(anatomy, streaming, text).work + Schedule(anatomy, list(_surveyed(jobs)), text).work
    for calibration, curvature in _differentiated(differentiating).items():
        work += calibration.samples * calibration.length * 3 * len(anatomy.blocks) * (1 + curvature)
    return work


def _split(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Return the jobs that differentiate the loss, and those that read text block by block."""
    differentiating = [job for job in jobs if job.recipe.scoring.differentiates]
    return differentiating, [job for job in jobs if job.recipe.scoring.needs - _OF_THE_LOSS]


def _surveyed(jobs: Sequence[Job]) -> dict[Job, list[Job]]:
    """Return the surveys that send text through the dense model, and the jobs that each is for."""
    surveys: dict[Job, list[Job]] = {}
    for job in jobs:
        if needs_survey(job.recipe) and survey_needs(job.recipe):
            dense = Job(job.recipe.model_copy(update={"propagation": "dense"}), job.calibration)
            surveys.setdefault(dense, []).append(job)
    return surveys


def _differentiated(jobs: Sequence[Job]) -> dict[CalibrationSet, bool]:
    """Return the calibration sets whose loss is differentiated, and whether twice."""
    sets: dict[CalibrationSet, bool] = {}
    for job in jobs:
        if job.calibration is not None:
            sets[job.calibration] = sets.get(job.calibration, False) or CURVATURE in job.recipe.scoring.needs
    return sets


class _Sweep:
    def __init__(
        self,
        anatomy: Anatomy,
        jobs: Sequence[Job],
        text: CalibrationText | None,
        batch_tokens: int,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.anatomy = anatomy
        self.jobs = jobs
        self.text = text
        self.batch_tokens = batch_tokens
        self.workspace = workspace
        self.progress = progress
        self.budgets: dict[Job, Budgets] = settled(anatomy, jobs)

    def everything(self) -> None:
        differentiating, streaming = _split(self.jobs)
        self._survey()
        self._differentiate(differentiating)
        at_once = [job for job in self.jobs if not job.recipe.scoring.needs]
        self._stream(streaming, at_once)

    def pruned(self, job: Job) -> Pruned:
        packed = {key: tensor.numpy() for key, tensor in self.workspace.results(job.id, "mask").items()}
        order = [key for key in self.anatomy if key in packed]
        inputs = {key: self.anatomy.shape(*key)[1] for key in order}
        masks = MaskSet({key: packed[key] for key in order}, inputs)
        values = self.workspace.results(job.id, "kept")
        return Pruned(masks, values or None, self.workspace.remarks(job.id))

    # -- the survey ------------------------------------------------------------------------------------------

    def _survey(self) -> None:
        """Find the budgets that depend on the dense model as a whole, and need no derivatives."""
        reading = _surveyed(self.jobs)
        surveys = {dense: Survey(dense) for dense in reading}
        for layer, statistics in self._dense_pass(list(reading)):
            for dense, survey in surveys.items():
                survey.look(self.anatomy, layer, statistics(dense))
        for dense, survey in surveys.items():
            for job in reading[dense]:
                self._settle(job, survey)
        for job in self.jobs:
            if job not in self.budgets and not job.recipe.scoring.needs:
                survey = Survey(job)
                for layer in range(len(self.anatomy.blocks)):
                    with self.anatomy.loaded(layer, to_read=True):
                        survey.look(self.anatomy, layer, {})
                self._settle(job, survey)

    def _settle(self, job: Job, survey: Survey) -> None:
        self.budgets[job], remarks = survey.budgets(self.anatomy)
        self.workspace.remark(job.id, remarks)

    def _dense_pass(self, jobs: Sequence[Job]) -> Iterator[tuple[int, _StatisticsOf]]:
        """Send the text of jobs through the dense model; yield each block's statistics."""
        if not jobs:
            return
        schedule = Schedule(self.anatomy, jobs, self.text)
        aside = self.workspace.aside()
        flow = _Flow(self, schedule, aside, needs=lambda job: survey_needs(job.recipe))
        for layer in range(schedule.blocks):
            with self.anatomy.loaded(layer):
                flow.enter(layer)
                yield layer, flow.through_dense(layer)
                flow.leave(layer)
            aside.checkpoint(layer + 1, flow.states())
        aside.close()

    # -- derivatives -----------------------------------------------------------------------------------------

    def _differentiate(self, jobs: Sequence[Job]) -> None:
        for calibration, curvature in _differentiated(jobs).items():
            assert self.text is not None
            batches = [
                batch
                for piece in self.text.pieces[calibration]
                for batch in self.text.tokens[piece].split(max(1, GRADIENT_TOKENS // piece.length))
            ]
            with torch.enable_grad():
                derivatives = differentiate(
                    self.anatomy, batches, curvature=curvature, progress=self._derivatives_progress
                )
            for job in jobs:
                if job.calibration == calibration:
                    self._choose_by_derivatives(job, derivatives)

    def _derivatives_progress(self, tokens: int) -> None:
        self.progress(3 * tokens * len(self.anatomy.blocks))  # a pass back costs about two forwards

    def _choose_by_derivatives(self, job: Job, derivatives: Derivatives) -> None:
        layers = range(len(self.anatomy.blocks))
        if job not in self.budgets:
            survey = Survey(job)
            for layer in layers:
                survey.look(self.anatomy, layer, {}, derivatives)
            self._settle(job, survey)
        for layer in layers:
            if job.recipe.covers_block(layer):
                self._put(job, layer, choose(self.anatomy, layer, job.recipe, self.budgets[job], {}, derivatives))
        self.workspace.finish_block(-1 - self.jobs.index(job))

    # -- block by block --------------------------------------------------------------------------------------

    def _stream(self, jobs: Sequence[Job], at_once: Sequence[Job]) -> None:
        schedule = Schedule(self.anatomy, jobs, self.text)
        flow = _Flow(self, schedule, self.workspace, needs=lambda job: job.recipe.scoring.needs - _OF_THE_LOSS)
        start = flow.resume() if jobs else 0
        if start:
            self.progress(sum(schedule.tokens(layer) for layer in range(start)))
        for layer in range(start, schedule.blocks):
            with self.anatomy.loaded(layer):
                for job in at_once:
                    if job.recipe.covers_block(layer):
                        self._put(job, layer, choose(self.anatomy, layer, job.recipe, self.budgets[job], {}))
                flow.enter(layer)
                statistics = flow.through_dense(layer)
                for job in schedule.on_pieces(layer):
                    self._choose(job, layer, statistics(job), flow)
                del statistics
                for job in schedule.on_their_own(layer):
                    self._choose(job, layer, flow.own_statistics(job, layer), flow)
                flow.leave(layer)
            self.workspace.finish_block(layer)
            if jobs and layer + 1 < schedule.blocks:
                self.workspace.checkpoint(layer + 1, flow.states())

    def _choose(self, job: Job, layer: int, statistics: Mapping[str, InputStatistics], flow: _Flow) -> None:
        choice = Choice()
        if job.recipe.covers_block(layer):
            choice = choose(self.anatomy, layer, job.recipe, self.budgets[job], statistics)
            self._put(job, layer, choice)
        flow.through_pruned(job, layer, choice)

    def _put(self, job: Job, layer: int, choice: Choice) -> None:
        self.workspace.put(job.id, layer, choice)


class _StatisticsOf:
    """Statistics of one block, by job: those of its pieces together, worked out once for each calibration set."""

    def __init__(self, schedule: Schedule, by_piece: Mapping[Piece, Mapping[str, InputStatistics]]) -> None:
        self._schedule = schedule
        self._by_piece = by_piece
        self._by_set: dict[CalibrationSet, dict[str, InputStatistics]] = {}

    def __call__(self, job: Job) -> dict[str, InputStatistics]:
        assert job.calibration is not None
        if job.calibration not in self._by_set:
            pieces = [self._by_piece[piece] for piece in self._schedule.pieces_of(job)]
            self._by_set[job.calibration] = {
                leader: together(piece[leader] for piece in pieces) for leader in pieces[0]
            }
        return self._by_set[job.calibration]


class _Flow:
    """The streams of a schedule on their way through the blocks."""

    def __init__(self, run: _Sweep, schedule: Schedule, workspace: Workspace, *, needs: _Needs) -> None:
        self.anatomy = run.anatomy
        self.schedule = schedule
        self.workspace = workspace
        self.needs = needs
        self.progress = run.progress
        self.batch_tokens = run.batch_tokens
        self.pieces: dict[Piece, Stream] = {}
        self.own: dict[Job, Stream] = {}
        self._next: dict[Piece, Sequence[Tensor]] = {}
        self._next_own: dict[Job, Stream] = {}
        self._starter: tuple[Stack, StackStarter] | None = None
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
        """Bring all streams to a block that begins a stack."""
        stack = self.anatomy.stack_of(layer)
        if layer == stack.first:
            with self.anatomy.loaded_for_start():
                for name, stream in self._named():
                    if stack.first > 0:  # a decoder, which reads what the encoder before it has made
                        stream.memory = [self.anatomy.encoded(hidden) for hidden in stream.hidden]
                    self._start(stack, stream)
                    # Under a name of its own: what came before it must stay, to go on from after a kill.
                    stream.hidden = self.workspace.keep(layer, name, "begun", stream.hidden)

    def _start(self, stack: Stack, stream: Stream) -> None:
        if self._starter is None or self._starter[0] is not stack:
            self._starter = (stack, StackStarter(self.anatomy, stack))
        self._starter[1](stream)

    def through_dense(self, layer: int) -> _StatisticsOf:
        """Send every shared piece of text through the dense block."""
        jobs = self.schedule.on_pieces(layer)
        go_on = set(self.schedule.pieces(layer + 1)) if layer + 1 < self.schedule.blocks else set()
        by_piece = {}
        for piece in self.schedule.pieces(layer):
            readers = [job for job in jobs if piece in self.schedule.pieces_of(job)]
            wanted = self._wanted(layer, readers)
            by_piece[piece], outputs = gather(
                self.anatomy, layer, self.pieces[piece], wanted, self.progress, to_the_end=piece in go_on
            )
            if piece in go_on:
                self._next[piece] = self.workspace.keep(layer + 1, _piece_name(piece), "hidden", outputs)
        return _StatisticsOf(self.schedule, by_piece)

    def own_statistics(self, job: Job, layer: int) -> dict[str, InputStatistics]:
        """Send the states of one job through the dense block."""
        wanted = self._wanted(layer, [job])
        if not wanted:
            return {}
        return gather(self.anatomy, layer, self.own[job], wanted, self.progress, to_the_end=False)[0]

    def through_pruned(self, job: Job, layer: int, choice: Choice) -> None:
        """Send a job's states through the block that it has pruned, if it has states of its own from here on."""
        if self.schedule.departs(job, layer):
            stream = self._stream(self.schedule.pieces_of(job))
            parts = [self.pieces[piece] for piece in self.schedule.pieces_of(job)]
            stream.hidden = [hidden for part in parts for hidden in part.hidden]
            stream.arguments = [arguments for part in parts for arguments in part.arguments]
            if parts[0].memory is not None:
                stream.memory = [memory for part in parts for memory in part.memory or ()]
        elif job in self.own and self.schedule.goes_on(job, layer):
            stream = self.own[job]
        else:
            return
        with _pruned(self.anatomy, layer, choice):
            runs = run_block(self.anatomy.blocks[layer], stream, layer, self.anatomy.stack_of(layer), self.progress)
            outputs = list(runs)
        kept = self.workspace.keep(layer + 1, job.id, "hidden", outputs)
        self._next_own[job] = Stream(stream.tokens, stream.languages, kept, stream.memory, stream.arguments)

    def leave(self, layer: int) -> None:
        """Go on to the next block."""
        self.pieces = {piece: self.pieces[piece] for piece in self._next}
        for piece, hidden in self._next.items():
            self.pieces[piece].hidden = hidden
        self.own, self._next_own, self._next = self._next_own, {}, {}

    def states(self) -> dict[str, dict[str, Sequence[Tensor]]]:
        """Return all that is needed to go on before the next block."""
        return {
            name: {"hidden": stream.hidden} | ({"memory": stream.memory} if stream.memory else {})
            for name, stream in self._named()
        }

    def resume(self) -> int:
        """Take up the states that a killed sweep has left; return the block to go on with."""
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
                stream.memory = list(parts["memory"]) if "memory" in parts else None
                if layer != stack.first:
                    self._start(stack, stream)
                stream.hidden = parts["hidden"]
        return layer

    def _wanted(self, layer: int, jobs: Sequence[Job]) -> dict[InputGroup, frozenset[str]]:
        wanted: dict[InputGroup, frozenset[str]] = {}
        for group in self.anatomy.groups(layer):
            readers = [job for job in jobs if any(job.recipe.covers(layer, role) for role in group.roles)]
            if readers:
                wanted[group] = frozenset().union(*(self.needs(job) for job in readers))
        return wanted

    def _named(self) -> list[tuple[str, Stream]]:
        pieces = [(_piece_name(piece), stream) for piece, stream in self.pieces.items()]
        return pieces + [(job.id, stream) for job, stream in self.own.items()]


def _piece_name(piece: Piece) -> str:
    return f"{piece.language}-s{piece.seed}-{piece.length}-{piece.start}-{piece.stop}"


@contextmanager
def _pruned(anatomy: Anatomy, layer: int, choice: Choice) -> Iterator[None]:
    """Make a block what a job has made of it, for a while."""
    dense = {role: anatomy.weight(layer, role).clone() for role in choice.masks}
    try:
        for role, mask in choice.masks.items():
            weight = choice.weights[role] if role in choice.weights else dense[role].masked_fill(~mask, 0)
            anatomy.set_weight(layer, role, weight)
        yield
    finally:
        for role, weight in dense.items():
            anatomy.set_weight(layer, role, weight)
