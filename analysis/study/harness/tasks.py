"""Tasks of the harness: finding them by name, loading them, and turning their results into frames."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import langcodes
import numpy as np
import torch

from pruning.errors import StudyError, did_you_mean, shortened
from pruning.text.languages import language_tag

from .folder import BUNDLED_TASK
from .presets import STUDY_BENCHMARKS

#: Language of a task whose language is unknown.
UNDETERMINED = "und"
#: Seed for few-shot examples.
SEED = 1234
#: Metrics that say whether an answer is right, in order of preference.
_RIGHT = ("exact_match", "acc", "em")
#: A language in the name of a dataset's configuration or a task: ``sw``, ``swh_Latn``.
_LANGUAGE = re.compile(r"[a-z]{2}|[a-z]{3}_[A-Z][a-z]{3}")


def check_known(names: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Check that the harness is installed and knows these tasks, before anything expensive starts.

    Raises
    ------
    StudyError
        If it is not installed, or a task is unknown.
    """
    with quiet():
        _indexes(names, folders)


def known_tasks() -> list[str]:
    """Return the names of all tasks, groups and tags of the installed harness; the first call takes several seconds.

    Raises
    ------
    StudyError
        If the harness is not installed.
    """
    return list(_installed_tasks().all_tasks)


#: What an item says about itself.
_PLACE = ("twin", "category", "kind", "template", "grade", "domain")


@dataclass(frozen=True)
class Task:
    """A loaded task of the harness, with its columns in frames.

    `metric` says whether an answer is right; it is None for a multiple-choice task without such a metric.
    """

    harness: Any
    language: str
    category: str
    metric: str | None

    def row(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Convert one model's answers, as logged by the harness, to columns of the frame ``items``."""
        way = answers[-1]["filter"]
        observed = [row for answer in answers if answer["filter"] == way for row in self._observations(answer)]
        columns = ("item", *_PLACE, "choice", "metric", "value")
        values = map(list, zip(*observed, strict=True))
        return {"language": self.language, "task": self.harness.task_name} | dict(zip(columns, values, strict=True))

    def _observations(self, answer: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        if self.harness.task_name.startswith(BUNDLED_TASK):
            document = answer["doc"]
        else:
            number = str(answer["doc_id"])
            document = {"id": number, "twin": number, "template": number, "category": self.category}
        place = document["id"], *(document.get(column) or None for column in _PLACE)
        margin = None
        if _multiple_choice(self.harness):
            right = self._right(answer)
            # with mutual information, every choice is scored a second time, without the prompt
            scores = np.array([response[0][0] for response in answer["resps"][: len(right)]])
            for choice, score in enumerate(scores):
                yield *place, choice, "log_likelihood", float(score)
            if right.any() and not right.all():
                margin = float(scores[right].max() - scores[~right].max())
                yield *place, None, "margin", margin
        correct = answer[self.metric] if self.metric else float(margin is not None and margin > 0)
        if correct not in (0, 1):
            raise _not_right_or_wrong(self.harness)
        yield *place, None, "correct", float(correct)

    def _right(self, answer: Mapping[str, Any]) -> np.ndarray:
        """Return which choices are right; a task may give one or several, by number or by text."""
        choices = self.harness.doc_to_choice(answer["doc"])
        said = self.harness.doc_to_text(answer["doc"]) if self.harness.multiple_input else answer["target"]
        given = said if isinstance(said, list) else [said]
        return np.array([number in given or choice in given for number, choice in enumerate(choices)])


def imported_harness() -> Any:
    """Return the package ``lm_eval``, imported lazily since this takes seconds."""
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise StudyError(
            "tasks of lm-evaluation-harness need the lm-eval library: pip install 'prunescope[tasks]'"
        ) from error
    return lm_eval


@cache
def _installed_tasks() -> Any:
    tasks = imported_harness().tasks
    with quiet():
        return tasks.TaskManager()


def _indexes(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the index that contains each task or group: that of the folders, or that of the harness."""
    for folder in folders:
        if not any(folder.rglob("*.yaml")):
            raise StudyError(f"there are no tasks in {folder}; give a folder with YAML task files (.yaml)")
    tasks = imported_harness().tasks
    given = tasks.TaskManager(include_path=list(folders), include_defaults=False)
    indexes = {name: given if name in given.task_index else _installed_tasks() for name in names}
    for name, index in indexes.items():
        if name not in index.task_index:
            close = get_close_matches(name, {*given.all_tasks, *index.all_tasks}, n=5)
            hint = did_you_mean(name, close) if close else "list all tasks with: lm-eval ls tasks"
            raise StudyError(f'lm-evaluation-harness has no task "{shortened(name)}"; {hint}')
    return indexes


def load_tasks(
    names: Sequence[str],
    *,
    shots: int | None = None,
    folders: Sequence[Path] = (),
    languages: Mapping[str, str] | None = None,
) -> dict[str, Task]:
    """Load tasks, including all tasks of groups, and check that each can be run.

    The parameters are those of :func:`analysis.study.harness.evaluate`.

    Raises
    ------
    StudyError
        If the harness is not installed, or a task is unknown, cannot be loaded or has no items that are right or wrong.
    """
    with quiet(), seeded():
        return _loaded(_indexes(names, folders), shots, languages or {})


def _loaded(indexes: Mapping[str, Any], shots: int | None, languages: Mapping[str, str]) -> dict[str, Task]:
    from datasets.exceptions import DatasetsError

    loaded: dict[str, Task] = {}
    for name, index in indexes.items():
        try:
            tasks = index.load([name])["tasks"].values()
            for task in tasks:
                own = task.get_config("num_fewshot")
                task.set_config("num_fewshot", (own or 0) if shots is None or own == 0 else shots)
                task.set_fewshot_seed(SEED)
                task.build_all_requests(limit=1, rank=0, world_size=1)
        except (OSError, DatasetsError) as error:
            raise StudyError(
                f'the data of task "{name}" cannot be loaded ({_first_line(error)}); check the network and '
                "HF_HUB_OFFLINE, download the dataset beforehand, or leave the task out"
            ) from error
        except (ImportError, LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            raise StudyError(
                f'task "{name}" cannot be run{f" with {shots} shots" if shots else ""} ({_first_line(error)}); '
                "fix its YAML file, use fewer shots, or leave the task out"
            ) from error
        for task in tasks:
            loaded.setdefault(task.task_name, _described(task, name, languages))
    return loaded


def _described(task: Any, asked: str, languages: Mapping[str, str]) -> Task:
    """Determine language and category of a task, requested by its own name or that of its group."""
    name: str = task.task_name
    metrics = ("acc",) if _multiple_choice(task) else _RIGHT
    metric = next((metric for metric in metrics if metric in task.aggregation()), None)
    if metric is None and not _multiple_choice(task):
        raise _not_right_or_wrong(task)
    presets = {task: (tag, label) for label, tasks in STUDY_BENCHMARKS.items() for tag, task in tasks.items()}
    part = task.get_config("dataset_name") or name.rpartition("_")[2]
    language, category = UNDETERMINED, name
    if name in presets or asked in presets:
        language, category = presets[name if name in presets else asked]
    elif name.startswith(BUNDLED_TASK):
        language = name.removeprefix(BUNDLED_TASK)
    elif _LANGUAGE.fullmatch(part) and langcodes.tag_is_valid(part):
        language, category = langcodes.standardize_tag(part, macro=True), name.removesuffix(f"_{part}")
    if asked != name and asked not in presets and name not in presets:
        category = asked
    told = languages.get(name, languages.get(asked))
    return Task(task, language_tag(told) if told else language, category, metric)


def _multiple_choice(task: Any) -> bool:
    return bool(task.OUTPUT_TYPE == "multiple_choice")


def _not_right_or_wrong(task: Any) -> StudyError:
    return StudyError(
        f'task "{task.task_name}" has no metric that marks each item as right or wrong (its metrics: '
        f"{', '.join(task.aggregation())}); leave it out"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars and log messages of the harness."""
    from tqdm import tqdm

    log, draw = logging.getLogger("lm_eval"), tqdm.__init__
    level = log.level

    def hidden(bar: Any, *positional: Any, **settings: Any) -> None:
        draw(bar, *positional, **settings | {"disable": True})

    log.setLevel(logging.ERROR)
    try:
        with patch.object(tqdm, "__init__", hidden):
            yield
    finally:
        log.setLevel(level)


@contextmanager
def seeded(device: torch.device | None = None) -> Iterator[None]:
    """Seed all random generators inside a ``with`` block, and restore their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
