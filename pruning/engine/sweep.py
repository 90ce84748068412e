"""The sweep: all recipes and calibration sets advance through the model together, a block at a time.

A block's weights are loaded once for all of them. Statistics are shared wherever that is exact: by projections that
read the same input; by jobs that see the same states (everything before the first pruned block, and everything under
dense propagation); and by calibration sets, whose statistics are sums over the pieces of text that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..allocation import Budgets, allocation_named
from ..errors import ModelError, RecipeError
from ..models.anatomy import Anatomy
from ..patterns import BLOCKS
from ..projections import Key
from ..statistics import SIMILARITY, InputStatistics
from ..text.calibration import CalibrationSet, CalibrationText
from ..variants.codes import CodeSet
from ..variants.masks import MaskSet
from .budgets import Survey, needs_survey, settled, survey_needs, weighed
from .choosing import Choice, Derivatives, Packed, choose_masks
from .flow import Flow, StatisticsOf
from .gradients import derivatives_of, passes
from .jobs import Job, Schedule, check_calibrated, check_fits, covered_shapes
from .loss import BACKWARD
from .streams import Progress
from .units import choose
from .workspace import Workspace


@dataclass(frozen=True)
class Pruned:
    """Result of a job.

    Attributes
    ----------
    masks
        Masks of every projection in the recipe's scope.
    values
        For methods that update weights, the values of the kept ones, in mask order; otherwise empty.
    codes
        For methods that quantize, the quantized projections, which have no masks.
    biases
        Biases that differ from the dense model's.
    remarks
        Notes for the variant's record.
    """

    masks: MaskSet
    values: Mapping[Key, Tensor]
    codes: CodeSet
    biases: Mapping[Key, Tensor]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Swept:
    """Result of a sweep.

    Attributes
    ----------
    workspace
        Workspace that holds the results.
    set_aside
        Jobs that failed, with the reason.
    """

    workspace: Workspace
    set_aside: Mapping[Job, str]

    def __call__(self, job: Job) -> Pruned:
        """Return the result of a job, read from the workspace on access.

        Raises
        ------
        ModelError
            If the job was set aside.
        """
        if job in self.set_aside:
            raise ModelError(f"{job.id}: {self.set_aside[job]}")
        return Pruned(*self.workspace.results(job.id), self.workspace.remarks(job.id))


def sweep(
    anatomy: Anatomy,
    jobs: Sequence[Job],
    text: CalibrationText | None = None,
    *,
    batch_tokens: int = 2048,
    workspace: Workspace | None = None,
    progress: Progress = lambda tokens: None,
    exponents: dict[Key, float] | None = None,
) -> Swept:
    """Compute the masks, updated weights and codes of any number of variants, as far as their methods make them.

    The model is modified during the sweep and restored bit for bit afterwards. A job whose scores or updated weights
    are not finite, or whose allocation is infeasible, is set aside, and the others continue.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model.
    jobs
        The jobs.
    text
        Text of all their calibration sets.
    batch_tokens
        Tokens per batch.
    workspace
        Where to keep results; a killed sweep that is restarted with the same workspace resumes.
    progress
        Called with the number of tokens that passed through a block, or no longer need to; see :func:`sweep_work` for
        the total.
    exponents
        Tail exponents of the dense weights' spectra, as far as they are known from an earlier sweep of the same model;
        those that an allocation needs are added.

    Raises
    ------
    RecipeError
        If a recipe does not fit the model, or calibration text is missing.
    """
    jobs = list(dict.fromkeys(jobs))
    for recipe in dict.fromkeys(job.recipe for job in jobs):
        check_fits(anatomy, recipe)
    check_calibrated(jobs, text)
    run = _Sweep(anatomy, jobs, text, batch_tokens, workspace or Workspace(), progress, exponents)
    with torch.no_grad():
        run.everything()
    reasons = run.workspace.set_aside
    return Swept(run.workspace, {job: reasons[job.id] for job in jobs if job.id in reasons})


def sweep_work(anatomy: Anatomy, jobs: Sequence[Job], text: CalibrationText | None) -> int:
    """Return how many tokens a sweep will pass through blocks in total, as its `progress` counts them."""
    work = Schedule(anatomy, streaming(jobs), text).work + Schedule(anatomy, list(surveyed(jobs)), text).work
    return work + differentiated_tokens(jobs) * len(anatomy.blocks)


def differentiated_tokens(jobs: Sequence[Job]) -> int:
    """Return how many tokens would take a forward pass as long as all passes for derivatives of the loss."""
    tokens = 0
    for some in _differentiating(jobs):
        for calibration, needs in _differentiated(some).items():
            tokens += calibration.samples * calibration.length * passes(needs)
    return tokens * BACKWARD


def streaming(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs that read text block by block while they choose what to remove."""
    return [job for job in jobs if job.recipe.of_inputs and not _at_once(job)]


def _differentiating(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Return the jobs that need derivatives of the loss: those that read text block by block too, and the others."""
    both: tuple[list[Job], list[Job]] = ([], [])
    for job in jobs:
        if job.recipe.scoring.differentiates:
            both[not job.recipe.scoring.of_inputs].append(job)
    return both


def _at_once(job: Job) -> bool:
    """Whether a job's weights are chosen without any statistics but those of a survey."""
    return not job.recipe.needs or (job.recipe.pattern == BLOCKS and bool(job.recipe.of_inputs))


def surveyed(jobs: Sequence[Job]) -> dict[Job, list[Job]]:
    """Return the surveys that pass text through the dense model, and the jobs that need each."""
    surveys: dict[Job, list[Job]] = {}
    for job in jobs:
        if needs_survey(job.recipe) and survey_needs(job.recipe):
            dense = Job(job.recipe.model_copy(update={"propagation": "dense"}), job.calibration)
            surveys.setdefault(dense, []).append(job)
    return surveys


def _differentiated(jobs: Sequence[Job]) -> dict[CalibrationSet, frozenset[str]]:
    """Return the calibration sets whose loss is differentiated, and the derivatives that are needed of each."""
    sets: dict[CalibrationSet, frozenset[str]] = {}
    for job in jobs:
        if job.calibration is not None:
            scoring = job.recipe.scoring
            sets[job.calibration] = sets.get(job.calibration, frozenset()) | (scoring.needs - scoring.of_inputs)
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
        exponents: dict[Key, float] | None,
    ) -> None:
        self.anatomy = anatomy
        self.jobs = jobs
        self.text = text
        self.batch_tokens = batch_tokens
        self.workspace = workspace
        self.progress = progress
        self.exponents = {} if exponents is None else exponents
        self.derivatives: dict[CalibrationSet | None, Derivatives] = {}
        self.budgets: dict[Job, Budgets] = settled(anatomy, jobs)
        self.chosen: dict[Job, dict[int, Packed]] = {}  # masks by the loss's derivatives that are yet to be corrected

    def everything(self) -> None:
        if self.workspace.is_complete:
            self.progress(sweep_work(self.anatomy, self.jobs, self.text))
            return
        with_inputs, alone = _differentiating(self.jobs)
        self._keep_derivatives(with_inputs)
        self._survey()
        self._differentiate(alone)
        self._stream(streaming(self.jobs), [job for job in self.jobs if _at_once(job)])
        self.workspace.complete()

    def _left(self, jobs: Iterable[Job]) -> list[Job]:
        """Return the jobs that were not set aside."""
        return [job for job in jobs if job.id not in self.workspace.set_aside]

    @contextmanager
    def _or_set_aside(self, *jobs: Job) -> Iterator[None]:
        """Set jobs aside if the body of the ``with`` block fails."""
        try:
            yield
        except (ModelError, RecipeError) as error:
            for job in jobs:
                self.workspace.give_up(job.id, str(error))

    def _flow(self, schedule: Schedule, workspace: Workspace, needs: Callable[[Job], frozenset[str]]) -> Flow:
        return Flow(
            self.anatomy,
            schedule,
            workspace,
            needs=needs,
            batch_tokens=self.batch_tokens,
            progress=self.progress,
        )

    def _begin(self, job: Job) -> None:
        self.workspace.begin(job.id, covered_shapes(self.anatomy, job.recipe))

    # -- the survey ------------------------------------------------------------------------------------------

    def _survey(self) -> None:
        """Determine the budgets that depend on the whole dense model, unless the method needs derivatives alone."""
        for job in self._left(self.jobs):
            if allocation_named(job.recipe.allocation).weighs:
                with self._or_set_aside(job):
                    self.budgets[job] = weighed(self.anatomy, job.recipe, self.exponents)
        reading = surveyed(self.jobs)
        surveys = {dense: Survey(dense) for dense in reading}
        for layer, statistics in self._dense_pass(list(reading)):
            for dense, survey in surveys.items():
                readers = self._left(reading[dense])
                if readers:
                    with self._or_set_aside(*readers):
                        passage = statistics.passage(dense) if SIMILARITY in survey_needs(dense.recipe) else None
                        derivatives = self.derivatives.get(dense.calibration)
                        survey.look(self.anatomy, layer, statistics(dense), derivatives, passage)
        for dense, survey in surveys.items():
            for job in self._left(reading[dense]):
                self._settle(job, survey)
        for job in self._left(self.jobs):
            if job not in self.budgets and not job.recipe.scoring.needs:
                survey = Survey(job)
                with self._or_set_aside(job):
                    for layer in range(len(self.anatomy.blocks)):
                        with self.anatomy.loaded(layer, to_read=True):
                            survey.look(self.anatomy, layer, {})
                    self._settle(job, survey)

    def _settle(self, job: Job, survey: Survey) -> None:
        with self._or_set_aside(job):
            self.budgets[job], remarks = survey.budgets(self.anatomy)
            self.workspace.remark(job.id, remarks)

    def _dense_pass(self, jobs: Sequence[Job]) -> Iterator[tuple[int, StatisticsOf]]:
        """Pass the text of jobs through the dense model; yield each block's statistics."""
        if not jobs:
            return
        schedule = Schedule(self.anatomy, jobs, self.text)
        aside = self.workspace.aside()
        flow = self._flow(schedule, aside, lambda job: survey_needs(job.recipe))
        for layer in range(schedule.blocks):
            with self.anatomy.loaded(layer):
                flow.enter(layer)
                yield layer, flow.through_dense(layer)
                flow.leave(layer)
            aside.checkpoint(layer + 1, flow.states())
        aside.close()

    # -- derivatives -----------------------------------------------------------------------------------------

    def _keep_derivatives(self, jobs: Sequence[Job]) -> None:
        """Compute the derivatives that jobs need beside statistics of their inputs."""
        for calibration, needs in _differentiated(jobs).items():
            readers = [job for job in jobs if job.calibration == calibration]
            derivatives = self._derivatives(calibration, needs, readers)
            if derivatives is not None:
                self.derivatives[calibration] = derivatives

    def _differentiate(self, jobs: Sequence[Job]) -> None:
        """Prune for the jobs that need nothing but derivatives."""
        for calibration, needs in _differentiated(jobs).items():
            readers = [job for job in jobs if job.calibration == calibration]
            derivatives = self._derivatives(calibration, needs, readers)
            if derivatives is None:
                continue
            for job in readers:
                with self._or_set_aside(job):
                    self._choose_by_derivatives(job, derivatives)

    def _derivatives(
        self, calibration: CalibrationSet, needs: frozenset[str], readers: Sequence[Job]
    ) -> Derivatives | None:
        """Return derivatives of the loss on a calibration set, or ``None`` if this failed and set the jobs aside."""
        assert self.text is not None
        left = self.text.size(calibration) * passes(needs)

        def told(tokens: int) -> None:
            nonlocal left
            left -= tokens
            self.progress(BACKWARD * tokens * len(self.anatomy.blocks))

        found: Derivatives | None = None
        with self._or_set_aside(*readers), torch.enable_grad():
            pieces = [self.text.tokens[piece] for piece in self.text.pieces[calibration]]
            found = derivatives_of(self.anatomy, pieces, needs, progress=told)
        if found is None:
            told(left)
        return found

    def _choose_by_derivatives(self, job: Job, derivatives: Derivatives) -> None:
        layers = range(len(self.anatomy.blocks))
        if job not in self.budgets:
            survey = Survey(job)
            for layer in layers:
                survey.look(self.anatomy, layer, {}, derivatives)
            self.budgets[job], remarks = survey.budgets(self.anatomy)
            self.workspace.remark(job.id, remarks)
        if not job.recipe.follows:
            self._begin(job)
        for layer in layers:
            if job.recipe.covers_block(layer):
                if job.recipe.follows:
                    choice = choose_masks(self.anatomy, layer, job.recipe, self.budgets[job], {}, derivatives)
                    self.chosen.setdefault(job, {})[layer] = Packed.of(choice.masks)
                else:
                    choice = choose(self.anatomy, layer, job.recipe, self.budgets[job], {}, derivatives)
                    self.workspace.put(job.id, layer, choice)

    # -- block by block --------------------------------------------------------------------------------------

    def _stream(self, jobs: Sequence[Job], at_once: Sequence[Job]) -> None:
        schedule = Schedule(self.anatomy, jobs, self.text)
        spared = sum(schedule.drop(job) for job in jobs if job.id in self.workspace.set_aside)
        if spared:
            self.progress(spared)
        flow = self._flow(schedule, self.workspace, lambda job: job.recipe.of_inputs)
        start = flow.resume() if schedule.jobs else 0
        if start:
            self.progress(sum(schedule.tokens(layer) for layer in range(start)))
        else:
            for job in self._left([*at_once, *jobs]):
                self._begin(job)
        for layer in range(start, schedule.blocks):
            if not self._left([*at_once, *jobs]):
                break
            with self.anatomy.loaded(layer):
                for job in self._left(at_once):
                    if job.recipe.covers_block(layer):
                        self._choose(job, layer, {})
                flow.enter(layer)
                statistics = flow.through_dense(layer)
                for job in schedule.on_pieces(layer):
                    self._choose_and_go_on(job, layer, statistics(job), flow)
                del statistics
                for job in schedule.on_their_own(layer):
                    self._choose_and_go_on(job, layer, flow.own_statistics(job, layer), flow)
                flow.leave(layer)
            if jobs and layer + 1 < schedule.blocks:
                self.workspace.checkpoint(layer + 1, flow.states())

    def _choose(self, job: Job, layer: int, statistics: Mapping[str, InputStatistics]) -> Choice | None:
        """Return what was chosen for a job in a block, or ``None`` if the job was set aside."""
        with self._or_set_aside(job):
            masks = self.chosen[job][layer].masks(self.anatomy.device) if job in self.chosen else None
            derivatives = self.derivatives.get(job.calibration)
            choice = choose(self.anatomy, layer, job.recipe, self.budgets[job], statistics, derivatives, masks)
            self.workspace.put(job.id, layer, choice)
            return choice
        return None

    def _choose_and_go_on(self, job: Job, layer: int, statistics: Mapping[str, InputStatistics], flow: Flow) -> None:
        choice = self._choose(job, layer, statistics) if job.recipe.covers_block(layer) else Choice()
        if choice is None:
            self.progress(flow.schedule.drop(job, layer))
        else:
            flow.through_pruned(job, layer, choice)
