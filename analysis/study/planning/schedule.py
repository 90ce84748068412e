"""Which worker runs what, and when: list scheduling of tasks that depend on each other."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Something for one worker to run without a break.

    Attributes
    ----------
    name
        Its name, unique among the tasks of a schedule.
    seconds
        How long it takes.
    memory
        Bytes that it takes meanwhile.
    after
        Names of the tasks that must be finished before it starts.
    """

    name: str
    seconds: float
    memory: int = 0
    after: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Placed:
    """A task with its worker, counted from 0, and its start in seconds."""

    task: Task
    worker: int
    start: float

    @property
    def end(self) -> float:
        """When it is finished, in seconds."""
        return self.start + self.task.seconds


@dataclass(frozen=True)
class Schedule:
    """All tasks with their places.

    Attributes
    ----------
    workers
        Number of workers, whether all of them are needed or not.
    placed
        The tasks, in order of their start.
    """

    workers: int
    placed: tuple[Placed, ...]

    @property
    def makespan(self) -> float:
        """When the last task is finished, in seconds."""
        return max((place.end for place in self.placed), default=0.0)

    @property
    def utilization(self) -> float:
        """Share of the workers' time in which they run something; 1 if there is nothing to run."""
        whole = self.workers * self.makespan
        return sum(place.task.seconds for place in self.placed) / whole if whole else 1.0

    @property
    def memory(self) -> int:
        """Most memory in bytes that tasks take at the same time, all workers together."""
        changes = [(place.start, place.task.memory) for place in self.placed if place.task.seconds]
        changes += [(place.end, -place.task.memory) for place in self.placed if place.task.seconds]
        taken = most = 0
        for _, change in sorted(changes):  # where one task ends as another begins, the end comes first
            taken += change
            most = max(most, taken)
        return max([most, *(place.task.memory for place in self.placed)])


def schedule(tasks: Sequence[Task], workers: int) -> Schedule:
    """Give tasks to workers: whenever one is idle, it takes the task with the longest path behind it.

    The path counts the task itself and the longest chain of tasks that must wait for it; of tasks that nothing waits
    for, the longest thus comes first. No worker is idle while a task could run, so that whatever the tasks are, the
    makespan is at most 2 − 1/workers times the shortest possible one (Graham, Bounds on multiprocessing timing
    anomalies, SIAM Journal on Applied Mathematics 17, 1969).

    Parameters
    ----------
    tasks
        In order of preference where paths are equally long.
    workers
        Number of workers; at least one.

    Raises
    ------
    ValueError
        If two tasks have the same name, a task waits for one that does not exist, or tasks wait for each other.
    """
    urgency = _lengths(tasks)
    followers: dict[str, list[int]] = {task.name: [] for task in tasks}
    for number, task in enumerate(tasks):
        for name in task.after:
            followers[name].append(number)
    waits = [len(task.after) for task in tasks]
    ready = [(-urgency[task.name], number) for number, task in enumerate(tasks) if not task.after]
    heapq.heapify(ready)
    idle = list(range(workers))
    running: list[tuple[float, int, int]] = []
    placed: list[Placed] = []
    now = 0.0
    while ready or running:
        while ready and idle:
            _, number = heapq.heappop(ready)
            placed.append(Placed(tasks[number], heapq.heappop(idle), now))
            heapq.heappush(running, (placed[-1].end, placed[-1].worker, number))
        now = running[0][0]
        while running and running[0][0] <= now:
            _, worker, number = heapq.heappop(running)
            heapq.heappush(idle, worker)
            for follower in followers[tasks[number].name]:
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(ready, (-urgency[tasks[follower].name], follower))
    return Schedule(workers, tuple(placed))


def longest_path(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return the chain of tasks, each waiting for the one before it, that takes longest: no schedule is shorter.

    Raises
    ------
    ValueError
        As for :func:`schedule`.
    """
    lengths = _lengths(tasks)
    path: list[Task] = []
    left = list(tasks)
    while left:
        path.append(max(left, key=lambda task: lengths[task.name]))
        left = [task for task in tasks if path[-1].name in task.after]
    return tuple(path)


def _lengths(tasks: Sequence[Task]) -> dict[str, float]:
    """Return how long each task and the longest chain of tasks behind it take together."""
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise ValueError("two tasks have the same name")
    for task in tasks:
        for name in task.after - by_name.keys():
            raise ValueError(f'"{task.name}" waits for "{name}", which does not exist')
    followers = dict.fromkeys(by_name, 0)
    for task in tasks:
        for name in task.after:
            followers[name] += 1
    lengths = {task.name: task.seconds for task in tasks}
    settled = [name for name, count in followers.items() if not count]
    for name in settled:  # grows while it is read
        for before in by_name[name].after:
            lengths[before] = max(lengths[before], by_name[before].seconds + lengths[name])
            followers[before] -= 1
            if not followers[before]:
                settled.append(before)
    if len(settled) < len(tasks):
        raise ValueError("tasks wait for each other")
    return lengths
