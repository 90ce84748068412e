"""The workers of a study on a Ray cluster: started, replaced when they are lost, and ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Queue

from pruning.errors import StudyError, first_line
from pruning.models.checkpoint import Shards
from pruning.models.loading import checkpoint_folder

from ..context import Context
from ..model import ModelFacts, needed_bytes
from ..units import Unit
from .ray_cluster import checked, nodes, on_a_node, on_node
from .slots import Node, Slot, places, threads_of_a_worker, uses_gpus
from .worker import Answer, Worker, own_code

#: How often a worker is started in one place before the place is given up.
ATTEMPTS = 3
#: Seconds between two looks at messages, and between two looks for new nodes.
_TICK, _LOOK = 0.5, 15.0
#: Seconds that workers may take to end, and after which it is said that they wait for others to free their place.
_END, _PATIENCE = 10.0, 60.0


@dataclass
class Hired:
    """A worker.

    Attributes
    ----------
    slot, actor
        Where it is, and its actor.
    due
        The answer to what it was asked last, unless it has come.
    ready
        Whether it has started.
    unit, number
        The unit that it runs, and a number for this attempt.
    """

    slot: Slot
    actor: Any
    due: Any
    ready: bool = False
    unit: Unit | None = None
    number: int = -1

    @property
    def idle(self) -> bool:
        """Whether it waits for something to do."""
        return self.ready and self.due is None


class Crew:
    """The workers of a study, on a cluster that this process is connected to.

    Parameters
    ----------
    context
        Context of the study; its model is never loaded in this process.

    Attributes
    ----------
    workers
        Those that there are at the moment.
    machines
        The machines that any of them was on.
    messages
        What they send.
    at_work
        Whether any unit has been run: before that, a worker that cannot take part is an error.

    Raises
    ------
    StudyError
        If a node lacks something, or none has room for a worker.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.workers: list[Hired] = []
        self.machines: list[Mapping[str, Any]] = []
        self.at_work = False
        self._facts: ModelFacts | None = None
        self._failed_starts: dict[Slot, int] = {}
        self._why = ""
        self._began = self._looked = time.monotonic()
        self._threads = threads_of_a_worker()
        found = nodes()
        self._known = {node.id for node in found}
        self._on_cpu = not uses_gpus(context.study, found)
        found = checked([node for node in found if self._usable(node)], context.folder, context.study)
        shards = Shards(checkpoint_folder(context.study.model))  # nothing but their headers is read
        dtype, copied = context.study.dtype, bool(context.whole)
        self._needed = needed_bytes(shards, dtype, on_cpu=self._on_cpu, copied=copied)
        slots = self._places(found)
        if not slots:
            wanted = f"{self._threads} CPU{'s' * (self._threads > 1)}" + ("" if self._on_cpu else " and a GPU")
            raise StudyError(
                f"no node of the Ray cluster has {wanted}, which a worker needs; set OMP_NUM_THREADS to the threads of "
                "a worker, or start nodes with more"
            )
        self._memory = min(slot.memory for slot in slots)
        self._count = len(slots)
        here = ray.get_runtime_context().get_node_id()
        self.messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": on_node(here)})
        for slot in slots:
            self._hire(slot)

    def _usable(self, node: Node) -> bool:
        return node.cpus >= self._threads and (self._on_cpu or node.gpus >= 1)

    def _places(self, found: Sequence[Node]) -> list[Slot]:
        return places(found, self._threads, on_cpu=self._on_cpu, needed=self._needed, cap=self._context.memory)

    def _hire(self, slot: Slot) -> None:
        """Start a worker; it loads its model while others work."""
        context = Context(
            self._context.study,
            self._context.folder.absolute(),
            self._memory,
            self._context.device_memory,
            self._context.whole,
            workers=self._count,
        )
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=self._threads,
                num_gpus=0 if self._on_cpu else 1,
                memory=min(self._memory, slot.memory),
                scheduling_strategy=on_node(slot.node.id),
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(context, self._threads, _Sender(self.messages.actor))
        )
        self.workers.append(Hired(slot, actor, actor.start.remote()))

    def replace(self, worker: Hired, why: str) -> None:
        """End a worker that failed; another one takes its place if its node is still there."""
        self.workers.remove(worker)
        ray.kill(worker.actor)
        self._why = f"node {worker.slot.node.name}: {why}"
        if worker.ready:
            self._failed_starts[worker.slot] = 0
        self._failed_starts[worker.slot] = self._failed_starts.get(worker.slot, 0) + (not worker.ready)
        if any(node.id == worker.slot.node.id for node in nodes()):
            if self._failed_starts[worker.slot] < ATTEMPTS:
                self._hire(worker.slot)
            else:
                self._context.tell(f"{self._why}; no worker could be started there, it is left out")
        else:
            self._context.tell(f"node {worker.slot.node.name} is lost")

    def look_for_nodes(self) -> None:
        """Start workers on nodes that have joined the cluster meanwhile, such as one in place of another that died."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        for node in nodes():
            if node.id in self._known or not self._usable(node):
                continue
            self._known.add(node.id)
            try:
                joined = checked([node], self._context.folder, self._context.study)
            except StudyError as error:
                self._context.tell(str(error))
                continue
            for slot in self._places(joined):
                if slot.memory >= self._memory:
                    self._hire(slot)

    def settle(self) -> list[tuple[Hired, Answer]]:
        """Return workers that answered, with their answers, after a short while if none does.

        Raises
        ------
        PrunescopeError
            If no worker is left, or the first ones cannot start.
        """
        if not self.machines and time.monotonic() - self._began > _PATIENCE:
            self._began = time.monotonic()
            self._context.tell("waiting for the first worker: it loads the model, or the cluster is busy with others")
        due = {worker.due: worker for worker in self.workers if worker.due is not None}
        if not due:
            if not self.workers:
                raise StudyError(
                    f"no worker is left ({self._why}); what is finished is kept, and the same command resumes the study"
                )
            return []
        answered = []
        for ref in ray.wait(list(due), num_returns=1, timeout=_TICK)[0]:
            worker = due[ref]
            worker.due = None
            try:
                answer = ray.get(ref)
            except RayError as error:
                answer = Answer(log=f"the worker was lost: {_readable(error)}")
            if worker.ready:
                answered.append((worker, answer))
            else:
                self._started(worker, answer)
        return answered

    def _started(self, worker: Hired, answer: Answer) -> None:
        node = worker.slot.node
        if answer.log and answer.error is None:
            self.replace(worker, answer.log.strip().splitlines()[-1])
            return
        error = answer.error and on_a_node(node, answer.error)
        if error is None and answer.value.code != own_code():
            error = StudyError(f"node {node.name} has another version of prunescope's code than this process")
        if error is None:
            facts = answer.value.facts
            self._facts = self._facts or facts
            if facts != self._facts:
                what = "weights" if facts.fingerprint != self._facts.fingerprint else "device or dtype"
                error = StudyError(f"node {node.name} has another {what} for this model than the other nodes")
        if error is not None:
            if not self.at_work:
                raise error
            self.workers.remove(worker)
            ray.kill(worker.actor)
            self._context.tell(f"{error}; it is left out")
            return
        worker.ready = True
        machine = {"node": worker.slot.node.name, **answer.value.machine}
        if machine not in self.machines:
            self.machines.append(machine)

    def dismiss(self) -> None:
        """End all workers, and wait until they have ended: nobody writes into the folder after that."""
        due = []
        for worker in self.workers:
            ray.kill(worker.actor)
            due += [worker.due if worker.due is not None else worker.actor.start.remote()]
        if due:
            ray.wait(due, num_returns=len(due), timeout=_END)
        self.workers.clear()


@dataclass(frozen=True)
class _Sender:
    """Sends a worker's messages to the process that started it, without waiting for them to arrive."""

    queue: Any

    def __call__(self, message: tuple[Any, ...]) -> None:
        self.queue.put_nowait.remote(message)


def _readable(error: RayError) -> str:
    """Return Ray's explanation in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or first_line(error)
