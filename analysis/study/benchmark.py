"""The stage that evaluates models on tasks of the evaluation harness."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from probes import DENSE
from pruning.code_version import code_version
from pruning.files import content_sha256, file_sha256

from ..frames import dense_columns, read_frame, write_frame
from . import harness
from .context import Context
from .units import Advance, Output, Unit

#: Assumed tokens per question, to estimate the remaining time before the data is loaded.
_TOKENS = 200


class Benchmark:
    """A unit is one model and one task, group or tag of the harness."""

    name = "benchmark"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining tasks, model by model."""
        left = [
            (name, key, model, task)
            for name, key, model, task in results(context)
            if not context.records.finished(name, key)
        ]
        if left:
            harness.check_known(list(dict.fromkeys(task for *_, task in left)), _folders(context))
        work = _TOKENS * (context.study.tasks.limit or 500) * context.model.facts.body
        return [
            Unit(self.name, f"evaluating {model} on {task}", (Output(name, key),), work)
            for name, key, model, task in left
        ]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Evaluate one model on one task, and record its answers."""
        began = time.monotonic()
        (output,) = unit.outputs
        _, model, task = output.name.split("/", 2)
        config = context.study.tasks
        session = context.model.session
        variant = None if model == DENSE else context.variants.open(model)
        columns = variant.columns() if variant else dense_columns(context.study.model_name)
        with session.owner.pruned_to(variant) if variant else nullcontext():
            frame = harness.ask(
                session.model,
                session.tokenizer,
                _loaded(task, config.shots, _folders(context)),
                columns,
                limit=config.limit,
            )
        path = write_frame(_folder(context, model, task), "items", frame)
        context.records.finish(output.name, output.key, [path], time.monotonic() - began)
        advance(unit.work)


def results(context: Context) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, key, model and task of every result."""
    config = context.study.tasks
    if not config.harness:
        return
    tasks = harness.named_tasks(config.harness, context.study.languages)
    code = code_version("pruning", "probes", "analysis.study.harness")
    asked = [code, _harness_version(), config.shots, config.limit, _state(_folders(context))]
    for model in context.variants.models:
        for task in tasks:
            yield f"benchmark/{model}/{task}", content_sha256([asked, context.variants.key(model), task]), model, task


def answers(context: Context) -> Iterator[pd.DataFrame]:
    """Yield the models' answers as parts of the frame ``items``; a task in several groups is yielded once."""
    seen: set[tuple[str, str]] = set()
    for _, _, model, task in results(context):
        frame = read_frame(_folder(context, model, task) / "items.parquet")
        new = [name for name in frame["task"].unique() if (model, name) not in seen]
        seen |= {(model, name) for name in new}
        yield frame[frame["task"].isin(new)]


@cache
def _loaded(task: str, shots: int | None, folders: tuple[Path, ...]) -> dict[str, harness.Task]:
    return harness.load_tasks([task], shots=shots, folders=folders)


def _harness_version() -> str:
    try:
        return version("lm-eval")
    except PackageNotFoundError:  # reported when a task is looked up
        return ""


def _folders(context: Context) -> tuple[Path, ...]:
    return tuple(Path(folder) for folder in context.study.tasks.folders)


def _state(folders: Sequence[Path]) -> list[str]:
    """Return hashes of all files in the folders of tasks, including their data."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)


def _folder(context: Context, model: str, task: str) -> Path:
    return context.folder / "readings" / model / "harness" / task
