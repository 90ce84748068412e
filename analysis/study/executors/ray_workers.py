"""Running units as Ray tasks: an actor for each GPU, or for a share of a node's CPUs, keeps a model and takes units."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, TypeVar, cast

from ray.exceptions import RayError

from pruning.errors import DiskError, shortened
from pruning.files import write_text

from ..context import Context
from ..progress import WorkProgress
from ..units import SHARES, Stage, Unit
from .ray_cluster import connected
from .ray_crew import Crew, Hired
from .worker import Answer

#: How often a unit is tried.
ATTEMPTS = 3
LOGS = "logs"

_Answer = TypeVar("_Answer")


@dataclass
class _Tried:
    """What a unit has come to so far: the reports of its failures, and the work that is counted as done."""

    reports: list[str] = field(default_factory=list)
    done: float = 0.0


class RayWorkers:
    """Runs units on the workers of a Ray cluster.

    A worker that is lost costs the unit that it runs, which is started again by another one. A unit that fails for
    the third time, or with an error that trying again cannot change, is left, and the others go on.

    Parameters
    ----------
    context
        Context of the study; its model is never loaded in this process.
    address
        Address of the cluster; empty: the one that this machine belongs to, or one that is started here.
    """

    def __init__(self, context: Context, address: str) -> None:
        self._context = context
        self._address = address
        self._open = ExitStack()
        self._told: set[str] = set()
        self._numbers = count()
        self._failed: dict[Unit, str] = {}

    @property
    def failed(self) -> Mapping[Unit, str]:
        """Units that failed for good, with what is said of each."""
        return self._failed

    def machines(self) -> Sequence[Mapping[str, Any]]:
        """The machines that workers were started on."""
        return self._crew.machines

    def __enter__(self) -> RayWorkers:
        """Connect to the cluster, check its nodes, and start the workers.

        Raises
        ------
        StudyError
            If there is no cluster, or a node lacks something.
        """
        with ExitStack() as opening:
            opening.enter_context(connected(self._address))
            self._crew = Crew(self._context)
            opening.callback(self._crew.dismiss)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers; a unit that is running is left as a killed run leaves it."""
        self._open.close()

    # -- what is asked of them -----------------------------------------------------------------------------------------

    def ask(self, question: Callable[[Context], _Answer]) -> _Answer:
        """Return a worker's answer to a question about the study.

        Raises
        ------
        PrunescopeError
            If the answer is one, or no worker is left.
        """
        answer = Answer()
        for _ in range(ATTEMPTS):
            worker = self._someone_idle()
            worker.due = worker.actor.ask.remote(question)
            answer = next(iter(self._answers_of(worker)))
            self._follow(None, {})
            if answer.error is not None:
                raise answer.error
            if not answer.log:
                return cast(_Answer, answer.value)
            self._crew.replace(worker, answer.log.strip().splitlines()[-1])
        raise RuntimeError(answer.log)

    def _someone_idle(self) -> Hired:
        while True:
            for worker in self._crew.workers:
                if worker.idle:
                    return worker
            self._crew.settle()
            self._follow(None, {})

    def _answers_of(self, worker: Hired) -> list[Answer]:
        while True:
            answers = [answer for who, answer in self._crew.settle() if who is worker]
            self._follow(None, {})
            if answers:
                return answers

    def run(self, stages: Sequence[Stage], units: Sequence[Unit], progress: WorkProgress) -> None:
        """Run units, those that take longest first; what fails for good is noted.

        Raises
        ------
        StudyError
            If no worker is left.
        """
        self._crew.at_work = True
        by_name = {stage.name: stage for stage in stages}
        counts = Counter(unit.stage for unit in units)
        begun: set[str] = set()
        tried = {unit: _Tried() for unit in units}
        waiting = deque(sorted(units, key=lambda unit: -unit.work))
        running: dict[int, Unit] = {}
        while waiting or running:
            self._crew.look_for_nodes()
            for worker in self._crew.workers:
                if waiting and worker.idle:
                    unit = waiting.popleft()
                    worker.number = next(self._numbers)
                    running[worker.number] = worker.unit = unit
                    worker.due = worker.actor.run.remote(by_name[unit.stage], unit, worker.number)
                    more = f" and {counts[unit.stage] - 1} more" if counts[unit.stage] > 1 and not unit.work else ""
                    said = bool(unit.work) or unit.stage not in begun
                    begun.add(unit.stage)
                    progress.stage(unit.title, more if more else f" ({worker.slot.name})", said=said)
                    progress.worker(worker.slot.name, unit.title, unit.work)
            for worker, answer in self._crew.settle():
                unit = running.pop(worker.number)
                progress.worker(worker.slot.name)
                worker.unit = None
                work = unit.work or progress.total * SHARES.get(unit.stage, 0.0) / counts[unit.stage]
                if not answer.log:
                    progress.advance(work - tried[unit].done)
                    (self._log(unit)).unlink(missing_ok=True)
                    continue
                progress.advance(-tried[unit].done)
                tried[unit].done = 0.0
                self._crew.replace(worker, answer.log.strip().splitlines()[-1])
                tried[unit].reports.append(f"on {worker.slot.name}:\n{answer.log}")
                if self._is_final(answer) or len(tried[unit].reports) == ATTEMPTS:
                    self._give_up(unit, answer, tried[unit].reports)
                else:
                    why = shortened(answer.log.strip().splitlines()[-1], 200)
                    self._tell(f"{unit.title} is started again, since it failed on {worker.slot.name}: {why}")
                    waiting.append(unit)
            self._follow(progress, {number: tried[unit] for number, unit in running.items()})

    def _is_final(self, answer: Answer) -> bool:
        """Whether trying again cannot help: what the user has to change, unless it is the disk of one node."""
        return answer.error is not None and not isinstance(answer.error, DiskError)

    def _give_up(self, unit: Unit, answer: Answer, reports: Sequence[str]) -> None:
        log = self._log(unit)
        write_text(log, f"{unit.title}\n\n" + "\n".join(reports))
        said = str(answer.error or answer.log.strip().splitlines()[-1])
        times = f" ({len(reports)} times)" if len(reports) > 1 else ""
        self._failed[unit] = f"{said}{times}, see {log}"
        self._tell(f"failed: {unit.title}: {self._failed[unit]}")

    def _log(self, unit: Unit) -> Any:
        return self._context.folder / LOGS / f"{unit.outputs[0].name.replace('/', '-')}.log"

    # -- what they say -------------------------------------------------------------------------------------------------

    def _follow(self, progress: WorkProgress | None, running: Mapping[int, _Tried]) -> None:
        """Show what workers have said since the last time."""
        try:
            messages = self._crew.messages.get_nowait_batch(self._crew.messages.qsize())
        except RayError:
            return
        for kind, *said in messages:
            if kind == "told":
                self._tell_once(said[0])
            elif progress is not None and said[0] in running:
                number, done = said
                progress.advance(done - running[number].done)
                running[number].done = done
                worker = next((worker for worker in self._crew.workers if worker.number == number), None)
                if worker is not None and worker.unit is not None:
                    progress.worker(worker.slot.name, worker.unit.title, worker.unit.work, done)

    def _tell(self, words: str) -> None:
        self._context.tell(words)

    def _tell_once(self, words: str) -> None:
        """Say what a worker says, unless one has said something on this subject before: most say the same."""
        subject = words.partition(":")[0]
        if subject not in self._told:
            self._told.add(subject)
            self._tell(words)
