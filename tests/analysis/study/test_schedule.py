"""List scheduling against schedules worked out by hand, and against the best of all schedules of a few tasks."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.study.planning.schedule import Schedule, Task, longest_path, schedule


def task(name: str, seconds: float, *after: str, memory: int = 0) -> Task:
    return Task(name, float(seconds), memory, frozenset(after))


def places(found: Schedule) -> dict[str, tuple[int, float]]:
    return {place.task.name: (place.worker, place.start) for place in found.placed}


def test_the_longest_task_comes_first():
    found = schedule([task("a", 3), task("b", 3), task("c", 2), task("d", 2), task("e", 2)], 2)
    assert places(found) == {"a": (0, 0), "b": (1, 0), "c": (0, 3), "d": (1, 3), "e": (0, 5)}
    assert found.makespan == 7  # the classic case: 6 would be possible
    assert found.utilization == pytest.approx(12 / 14)


def test_a_short_task_comes_first_if_much_must_wait_for_it():
    found = schedule([task("long", 5), task("key", 1), task("behind", 6, "key")], 1)
    assert list(places(found)) == ["key", "behind", "long"]
    assert schedule([task("long", 5), task("key", 1), task("behind", 6, "key")], 2).makespan == 7


def test_readings_wait_for_their_variants_only():
    tasks = [
        task("prune 1", 4),
        task("prune 2", 2),
        task("read both", 3, "prune 1", "prune 2"),
        task("ask 2", 5, "prune 2"),
        task("frames", 1, "read both", "ask 2"),
    ]
    found = schedule(tasks, 2)
    assert places(found) == {
        "prune 1": (0, 0),
        "prune 2": (1, 0),
        "ask 2": (1, 2),
        "read both": (0, 4),
        "frames": (0, 7),
    }
    assert found.makespan == 8
    assert [one.name for one in longest_path(tasks)] == ["prune 1", "read both", "frames"]
    assert schedule(tasks, 1).makespan == 15
    assert schedule(tasks, 1).utilization == 1


def test_memory_is_that_of_tasks_that_run_at_the_same_time():
    tasks = [task("a", 4, memory=3), task("b", 2, memory=5), task("c", 3, "b", memory=4)]
    assert schedule(tasks, 2).memory == 8  # a beside b; c begins as b ends
    assert schedule(tasks, 1).memory == 5


def test_nothing_to_run_takes_no_time():
    found = schedule([], 3)
    assert (found.makespan, found.utilization, found.placed) == (0, 1, ())
    assert longest_path([]) == ()


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([task("a", 1), task("a", 2)], "same name"),
        ([task("a", 1, "b")], 'waits for "b"'),
        ([task("a", 1, "b"), task("b", 1, "a"), task("c", 1)], "wait for each other"),
    ],
)
def test_tasks_that_cannot_be_scheduled_are_refused(tasks, words):
    for run in (lambda: schedule(tasks, 2), lambda: longest_path(tasks)):
        with pytest.raises(ValueError, match=words):
            run()


@st.composite
def few_tasks(draw):
    """Up to six tasks; each may wait for earlier ones."""
    count = draw(st.integers(1, 6))
    return [
        task(
            str(number),
            draw(st.integers(0, 9)),
            *draw(st.sets(st.sampled_from([str(i) for i in range(number)]), max_size=2) if number else st.just(set())),
            memory=draw(st.integers(0, 9)),
        )
        for number in range(count)
    ]


def shortest(tasks: list[Task], workers: int) -> float:
    """Try every order: each task starts as early as its turn, its worker and what it waits for allow.

    The shortest possible schedule is among these: it is found by taking the tasks in the order of their starts in it.
    """
    best = float("inf")
    for order in permutations(tasks):
        ends: dict[str, float] = {}
        free = [0.0] * workers
        for one in order:
            if not one.after <= ends.keys():
                break
            worker = min(range(workers), key=free.__getitem__)
            ends[one.name] = free[worker] = max([free[worker], *(ends[name] for name in one.after)]) + one.seconds
        else:
            best = min(best, max(ends.values()))
    return best


@given(few_tasks(), st.integers(1, 3))
@settings(max_examples=100)
def test_a_schedule_keeps_to_the_rules_and_within_its_bound(tasks, workers):
    found = schedule(tasks, workers)
    ends = {place.task.name: place.end for place in found.placed}
    assert sorted(ends) == sorted(one.name for one in tasks)
    for place in found.placed:
        assert all(ends[name] <= place.start for name in place.task.after)
    for worker in range(workers):
        own = [place for place in found.placed if place.worker == worker]
        assert all(one.end <= other.start for one, other in pairwise(own))
    best = shortest(tasks, workers)
    path = sum(one.seconds for one in longest_path(tasks))
    assert path == shortest(tasks, len(tasks))  # what no number of workers undercuts
    assert max(path, sum(one.seconds for one in tasks) / workers) <= found.makespan + 1e-9
    assert best <= found.makespan <= (2 - 1 / workers) * best
    moments = {place.start for place in found.placed}
    together = [sum(p.task.memory for p in found.placed if p.start <= now < p.end) for now in moments] + [
        one.memory for one in tasks
    ]
    assert found.memory == max(together)
