"""A plan as tables and sentences."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import takewhile

from humanize import naturalsize
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from probes import DENSE

from ..report import REPORT_FILE
from .estimates import Estimate, by_stage
from .plan import StudyPlan
from .schedule import Task, longest_path, schedule

#: Columns of a table that no terminal limits.
_WIDE = 160
#: Most units of the longest path that are named.
_NAMED = 6
_STARRED = "*"


def plan_text(plan: StudyPlan, command: str, *, workers: int | None = None) -> Iterator[RenderableType]:
    """Yield what to print: tables and lines.

    Parameters
    ----------
    plan
        The plan.
    command
        The command that carries it out.
    workers
        Number of workers to schedule the units on; no schedule by default.
    """
    study, facts = plan.study, plan.facts
    where = (
        "a CPU" if facts.device == "cpu" else "a device with its own memory" if facts.device == "meta" else facts.device
    )
    yield (
        f"{study.model_name}, {facts.blocks} blocks, {facts.body / 1e9:.3g} billion prunable weights, computed in "
        f"{facts.dtype.removeprefix('torch.')} on {where}; results in {plan.folder}"
    )
    if not plan.estimates:
        yield f"Nothing is left to do: {plan.folder / REPORT_FILE} is up to date."
        return
    yield _stages(plan)
    yield from _notes(plan)
    if workers is not None:
        yield ""
        yield from _schedules(plan, workers)
    yield f"\nNext: {command}"


def printed(console: Console, parts: Iterator[RenderableType]) -> None:
    """Print tables and lines; without a terminal, tables are not cut to its width."""
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDE)
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(part)


def command_line(study: str, folder: str, options: Sequence[tuple[str, str | None]]) -> str:
    """Return the command that runs a study."""
    words = ["prunescope", "run", study, "--out", folder]
    for name, value in options:
        words += [name, value] if value is not None else []
    return shlex.join(words)


# -- what each stage needs --------------------------------------------------------------------------------------------


def _stages(plan: StudyPlan) -> Table:
    found = by_stage(plan.estimates)
    on_device = any(one.device_memory for one in plan.estimates)
    columns = [
        "Stage",
        "Units",
        "Makes",
        "Memory",
        *(["On the device"] if on_device else []),
        "Disk",
        "Temporary",
        "Time",
    ]
    table = _table(columns, left=("Stage", "Makes"))
    if plan.loading:
        table.add_row("load", "", "", "", *([""] if on_device else []), "", "", duration(plan.loading))
    for stage, own in found.items():
        share = any(one.share for one in own)
        table.add_row(
            stage,
            _count(own),
            _made(stage, own),
            _largest([one.memory for one in own]),
            *([_largest([one.device_memory for one in own])] if on_device else []),
            _size(sum(one.kept for one in own)) if any(one.kept for one in own) else "small",
            _largest([one.scratch for one in own], none=""),
            duration(sum(one.seconds for one in own)) + _STARRED * share,
        )
    table.add_section()
    table.add_row(
        "total",
        _count(plan.estimates),
        "",
        _largest([one.memory for one in plan.estimates]),
        *([_largest([one.device_memory for one in plan.estimates])] if on_device else []),
        _size(plan.kept),
        _size(plan.scratch) if plan.scratch else "",
        duration(plan.seconds),
    )
    return table


def _count(own: Sequence[Estimate]) -> str:
    """Return how many units there are; with a plus sign if some cannot be counted yet."""
    return str(len(own)) + "+" * any(not one.results for one in own)


def _made(stage: str, own: Sequence[Estimate]) -> str:
    """Say what a stage produces."""
    results = list(dict.fromkeys(result for one in own for result in one.results))
    parts = [result.split("/", 2) for result in results]
    if stage == "prune":
        return _of(len(parts), "variant")
    if stage == "read":
        models = {model for _, model, _ in parts}
        said = f"{_of(len(models), 'model')} in {_of(len({language for *_, language in parts}), 'language')}"
        kinds = {"readings": "text", "questions": "questions", "fitting": "subspaces"}
        kinds |= {"lens": "lens", "margins": "lens on questions"}
        there = dict.fromkeys(kind for kind in kinds for part in parts if part[0] == kind)
        dense = "" if models - {DENSE} else " (dense)"
        return f"{said}{dense}: {', '.join(kinds[kind] for kind in there)}"
    if stage == "benchmark":
        return (
            f"{_of(len({model for _, model, _ in parts}), 'model')}, {_of(len({task for *_, task in parts}), 'task')}"
        )
    if stage == "frames":
        return _of(len(parts), "frame")
    if stage in ("figures", "tables"):
        return _of(len(parts), stage.removesuffix("s")) if parts else "listed once there are frames"
    return REPORT_FILE


def _notes(plan: StudyPlan) -> Iterator[str]:
    yield f"{plan.basis}."
    if any(one.share for one in plan.estimates):
        yield (
            f"{_STARRED} Not measured: the share of a run that such stages usually take; their memory and disk are "
            "small beside the others'."
        )
    if any(one.stage == "benchmark" for one in plan.estimates):
        yield "Tasks of the harness: 200 tokens a question and, without a limit, 500 questions a task are assumed."
    needed = plan.kept + plan.scratch
    if needed > plan.free:
        yield f"The disk has {_size(plan.free)} free, and {_size(needed)} are needed: choose another --out."
    yield from (f"{remark}." for remark in plan.remarks)


# -- schedules over workers -------------------------------------------------------------------------------------------


def _schedules(plan: StudyPlan, workers: int) -> Iterator[RenderableType]:
    tasks = plan.tasks
    scratch = sorted(one.scratch for one in plan.estimates)
    table = _table(["Workers", "Time", "Busy", "Memory together", "Temporary disk"])
    counts = [*takewhile(lambda count: count < workers, (2**n for n in range(workers.bit_length()))), workers]
    for count in counts:
        found = schedule(tasks, count)
        table.add_row(
            str(count),
            duration(plan.loading + found.makespan),
            f"{found.utilization:.0%}",
            _size(found.memory),
            _size(sum(scratch[-count:])),
        )
    yield table
    path = longest_path(tasks)
    least = sum(task.seconds for task in path)
    chosen = schedule(tasks, workers)
    yield (
        f"{_of(workers, 'worker')}: {duration(plan.loading + chosen.makespan)}. The longest path takes "
        f"{duration(plan.loading + least)}, which no number of workers undercuts: {_path(path, plan.loading)}."
    )
    enough = next(count for count in range(1, len(tasks) + 1) if schedule(tasks, count).makespan <= 1.05 * least)
    if enough <= workers:
        yield f"{_of(enough, 'worker')} come{'s' * (enough == 1)} within 5 % of that; more would wait."
    yield (
        "Assumed: workers that are alike and do not slow each other down, each with the memory and cores that these "
        "times are for; each loads the model once; units as listed, the longest path first; reading waits for the "
        "variants that it reads, frames for all readings."
    )


def _path(path: Sequence[Task], loading: float) -> str:
    steps = [f"{task.name} ({duration(task.seconds)})" for task in path]
    if len(steps) > _NAMED:
        half = _NAMED // 2
        steps = [*steps[:half], f"{len(steps) - 2 * half} more", *steps[-half:]]
    return ", ".join([*([f"loading ({duration(loading)})"] if loading else []), *steps])


# -- words ------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.2), duration(48.4), duration(754.0), duration(11_100.0), duration(200_000.0)
    ('under 1 s', '48 s', '13 min', '3 h 05 min', '2 d 7 h')
    """
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _table(columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _largest(sizes: Sequence[int], none: str = "small") -> str:
    most = max(sizes, default=0)
    return _size(most) if most else none


def _size(number: int) -> str:
    return naturalsize(number, binary=True)
