"""Benchmarks: dense and pruned models in EleutherAI's lm-evaluation-harness, as the frame ``items``.

The harness is asked for what it knows best: the tasks, their prompts and their answers. It reads the model that is
loaded already, turned into one variant after another, and every model answers the same items with the same examples
before them.

A choice is scored as the harness scores it: the log-likelihood of its tokens after the prompt, where prompt and choice
are tokenized together, with the special tokens that the tokenizer puts before any text (BOS). Spaces that end a prompt
count as the choice's; an empty prompt is a BOS token, or an EOS token where there is none.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import langcodes
import numpy as np
import pandas as pd
import torch

from probes.items import ItemSource
from probes.reading import Progress
from pruning.errors import StudyError, did_you_mean, shortened
from pruning.files import disk_errors
from pruning.text.languages import language_tag, language_tags, named
from pruning.variants.owner import DenseModel
from pruning.variants.variant import Variant

from ..frames import dense_columns, tidy

#: The benchmarks of the study that prunescope follows, and others in many languages: language to the harness's task.
#: Of the study's, MKQA is not in the harness, and Swahili has neither ARC nor HellaSwag, Chinese no HellaSwag.
STUDY_BENCHMARKS: dict[str, dict[str, str]] = {
    "belebele": {
        "ar": "belebele_arb_Arab",
        "de": "belebele_deu_Latn",
        "en": "belebele_eng_Latn",
        "es": "belebele_spa_Latn",
        "fr": "belebele_fra_Latn",
        "ru": "belebele_rus_Cyrl",
        "sw": "belebele_swh_Latn",
        "zh": "belebele_zho_Hans",
    },
    "arc": {"en": "arc_challenge"} | {tag: f"arc_{tag}" for tag in ("ar", "de", "es", "fr", "ru", "zh")},
    "hellaswag": {"en": "hellaswag"} | {tag: f"hellaswag_{tag}" for tag in ("ar", "de", "es", "fr", "ru")},
    "mmlu": {"sw": "global_mmlu_sw"} | {tag: f"m_mmlu_{tag}" for tag in ("ar", "de", "en", "es", "fr", "ru", "zh")},
    "xstorycloze": {tag: f"xstorycloze_{tag}" for tag in ("ar", "en", "es", "ru", "sw", "zh")},
    "xcopa": {tag: f"xcopa_{tag}" for tag in ("sw", "zh")},
    "xnli": {tag: f"xnli_{tag}" for tag in ("ar", "de", "en", "es", "fr", "ru", "sw", "zh")},
    "mgsm": {tag: f"mgsm_direct_{tag}" for tag in ("de", "en", "es", "fr", "ru", "sw", "zh")},
}
#: What stands for all of them.
PRESET = "preset"
#: What the tasks are called that :func:`bundled_task_folder` writes, before the language.
BUNDLED_TASK = "prunescope_"
#: The language of a task whose language cannot be told.
UNDETERMINED = "und"
#: Metrics that say whether an answer is right, the one to prefer first.
_RIGHT = ("exact_match", "acc", "em")
#: A language in the name of a dataset's configuration or a task: ``sw``, ``swh_Latn``.
_LANGUAGE = re.compile(r"[a-z]{2}|[a-z]{3}_[A-Z][a-z]{3}")
_SEED = 1234


def preset(language: str, known: Collection[str] | None = None) -> list[str]:
    """Return the tasks of :data:`STUDY_BENCHMARKS` in one language.

    Parameters
    ----------
    language
        BCP-47 tag.
    known
        Leave out tasks that are not among these, such as :func:`known_tasks` of an older harness.

    Raises
    ------
    StudyError
        If there are none.

    Examples
    --------
    >>> preset("sw", known=["belebele_swh_Latn", "xnli_sw"])
    ['belebele_swh_Latn', 'xnli_sw']
    """
    tag = language_tag(language)
    names = [tasks[tag] for tasks in STUDY_BENCHMARKS.values() if tag in tasks]
    names = [name for name in names if known is None or name in known]
    if not names:
        languages = sorted({language for tasks in STUDY_BENCHMARKS.values() for language in tasks})
        raise StudyError(
            f"no preset tasks for {named(tag)}; there are some for {', '.join(languages)}: name the harness's tasks"
        )
    return names


def named_tasks(names: Sequence[str], languages: Sequence[str]) -> list[str]:
    """Return tasks by name, ``preset`` replaced by the tasks of :func:`preset` in these languages."""
    tasks: dict[str, None] = {}
    for name in names:
        found = [task for language in languages for task in preset(language)] if name == PRESET else [name]
        tasks |= dict.fromkeys(found)
    return list(tasks)


def check_known(names: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Check that the harness is installed and knows these tasks, before anything expensive begins.

    Raises
    ------
    StudyError
        If it is not, or does not know one of them.
    """
    with _quiet():
        _indexes(names, folders)


def known_tasks() -> list[str]:
    """Return the names of all tasks, groups and tags of the installed harness; the first call takes some seconds.

    Raises
    ------
    StudyError
        If the harness is not installed.
    """
    return list(_installed_tasks().all_tasks)


def bundled_task_folder(folder: Path, languages: Sequence[str], source: ItemSource | None = None) -> list[str]:
    """Write items as tasks of the harness, ``prunescope_LANGUAGE``, into a folder for :func:`evaluate`.

    Items are asked without examples, whatever the `shots`: an example could be the twin of the item.

    Parameters
    ----------
    folder
        Made if need be. It holds a YAML and a JSONL file a language and must stay where it is.
    languages
        BCP-47 tags.
    source
        Where the items are; the bundled ones by default.

    Returns
    -------
    list of str
        The tasks' names.

    Raises
    ------
    TextError
        If the source has no items in one of the languages.
    DiskError
        If the folder cannot be written.
    """
    tags = language_tags(languages)
    items = {tag: (source or ItemSource()).items(tag) for tag in tags}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for tag in tags:
            data = folder.resolve() / f"{BUNDLED_TASK}{tag}.jsonl"
            data.write_text("".join(item.model_dump_json() + "\n" for item in items[tag]), encoding="utf-8")
            config = {
                "task": BUNDLED_TASK + tag,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "prompt",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "target_delimiter": "",
                "num_fewshot": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": 1.0},
            }
            text = json.dumps(config, indent=2, ensure_ascii=False)  # which is YAML, too
            data.with_suffix(".yaml").write_text(text + "\n", encoding="utf-8")
    return [BUNDLED_TASK + tag for tag in tags]


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    variants: Sequence[Variant] = (),
    *,
    shots: int | None = None,
    limit: int | None = None,
    folders: Sequence[Path] = (),
    languages: Mapping[str, str] | None = None,
    model_name: str | None = None,
    batch_size: int = 8,
    owner: DenseModel | None = None,
    progress: Progress = lambda tokens: None,
) -> pd.DataFrame:
    """Evaluate a dense model and variants of it on tasks of the harness, and return the frame ``items``.

    Of a multiple-choice task the frame has the log-likelihood of every choice, the margin, and ``correct`` as the
    harness has it in ``acc``: the likeliest choice is right, and of equally likely ones the first. Of any other task
    it has ``correct`` only: the task's metric ``exact_match``, ``acc`` or ``em``, and where the task reads an answer
    in several ways, that of the last one (MGSM: ``flexible-extract``). Tasks without such a metric, whose items are
    not simply right or wrong, are refused. ``category`` is the benchmark or group, ``item`` the number of the
    document; for tasks of :func:`bundled_task_folder` they are those of the items.

    Parameters
    ----------
    model, tokenizer
        As :func:`pruning.load_model` gives them; the model is unchanged afterwards, bit for bit.
    tasks
        Names of tasks, groups or tags.
    variants
        Of this model.
    shots
        Examples before every item; by default what the task says. Tasks that say 0 stay without.
    limit
        The first so many items of every task (of every one of a group); all by default.
    folders
        With YAML files of further tasks, which take precedence over the harness's own; a group in one of them holds
        tasks of these folders.
    languages
        Task or group to the BCP-47 tag of its language, for those whose names do not tell.
    model_name
        What frames call the model; its ``name_or_path`` by default.
    batch_size
        Sequences that the model reads at a time.
    owner
        Of the model's dense weights, if there is one already (``session.owner``).
    progress
        Told of the tokens, padding included, as one model after another reads or writes them.

    Raises
    ------
    StudyError
        If the harness is not installed, or a task is unknown, cannot be loaded or has no items that are right or wrong.
    VariantError
        If a variant was not made from this model.
    """
    if not tasks or (limit is not None and limit < 1) or (shots is not None and shots < 0):
        raise StudyError("there is nothing to evaluate; name a task or more, a limit from 1 and shots from 0")
    lm_eval = _harness()
    with _quiet(), _seeded(model):
        loaded = _loaded(_indexes(tasks, folders), shots, languages or {})
        reader = lm_eval.models.huggingface.HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a token to pad with
            batch_size=batch_size,
            softmax_dtype="float32",
        )
    name = model_name or str(model.name_or_path)
    owner = owner or DenseModel(model)
    rows: list[dict[str, Any]] = []
    for variant in (None, *variants):
        columns = variant.columns() | {"model": name} if variant else dense_columns(name)
        pruned = owner.pruned_to(variant) if variant else nullcontext()
        with pruned, _counted(model, progress), _quiet(), _seeded(model):
            for task in loaded.values():
                task.harness.set_fewshot_seed(_SEED)
            found = lm_eval.evaluator.evaluate(
                lm=reader,
                task_dict={"tasks": {task_name: task.harness for task_name, task in loaded.items()}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        rows += [columns | task.row(found["samples"][task_name]) for task_name, task in loaded.items()]
    return tidy("items", rows)


@dataclass(frozen=True)
class _Task:
    """A task of the harness that is ready to be asked, and what frames say of it.

    `metric` is the one that says whether an answer is right; None for a multiple-choice task that has only others.
    """

    harness: Any
    language: str
    category: str
    metric: str | None

    def row(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what one model's answers, as the harness logs them, are in the frame ``items``, by column."""
        way = answers[-1]["filter"]
        observed = [row for answer in answers if answer["filter"] == way for row in self._observations(answer)]
        columns = ("item", "twin", "category", "choice", "metric", "value")
        values = map(list, zip(*observed, strict=True))
        return {"language": self.language, "task": self.harness.task_name} | dict(zip(columns, values, strict=True))

    def _observations(self, answer: Mapping[str, Any]) -> Iterator[tuple[str, str, str, int | None, str, float]]:
        document = answer["doc"]
        place = (str(answer["doc_id"]),) * 2 + (self.category,)
        if self.harness.task_name.startswith(BUNDLED_TASK):
            place = document["id"], document["twin"], document["category"]
        margin = None
        if _multiple_choice(self.harness):
            right = self._right(answer)
            # with mutual information, every choice is asked for a second time, without its prompt
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
        """Return which choices are right; the harness lets a task say it by number or by text, one or several."""
        choices = self.harness.doc_to_choice(answer["doc"])
        said = self.harness.doc_to_text(answer["doc"]) if self.harness.multiple_input else answer["target"]
        given = said if isinstance(said, list) else [said]
        return np.array([number in given or choice in given for number, choice in enumerate(choices)])


def _harness() -> Any:
    """Return the package ``lm_eval``, imported as late as this since it takes seconds."""
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
    tasks = _harness().tasks
    with _quiet():
        return tasks.TaskManager()


def _indexes(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Return for every task or group the index that knows it: that of the folders, or that of the harness."""
    for folder in folders:
        if not any(folder.rglob("*.yaml")):
            raise StudyError(f"there are no tasks in {folder}; give a folder with the YAML files of tasks (.yaml)")
    tasks = _harness().tasks
    given = tasks.TaskManager(include_path=list(folders), include_defaults=False)
    indexes = {name: given if name in given.task_index else _installed_tasks() for name in names}
    for name, index in indexes.items():
        if name not in index.task_index:
            close = get_close_matches(name, {*given.all_tasks, *index.all_tasks}, n=5)
            hint = did_you_mean(name, close) if close else "list them: lm-eval ls tasks"
            raise StudyError(f'lm-evaluation-harness knows no task "{shortened(name)}"; {hint}')
    return indexes


def _loaded(indexes: Mapping[str, Any], shots: int | None, languages: Mapping[str, str]) -> dict[str, _Task]:
    """Load tasks, and all those of groups, and see that each can be asked."""
    from datasets.exceptions import DatasetsError

    loaded: dict[str, _Task] = {}
    for name, index in indexes.items():
        try:
            tasks = index.load([name])["tasks"].values()
            for task in tasks:
                own = task.get_config("num_fewshot")
                task.set_config("num_fewshot", (own or 0) if shots is None or own == 0 else shots)
                task.set_fewshot_seed(_SEED)
                task.build_all_requests(limit=1, rank=0, world_size=1)
        except (OSError, DatasetsError) as error:
            raise StudyError(
                f'the data of task "{name}" cannot be reached ({_first_line(error)}); check the network and '
                "HF_HUB_OFFLINE, load the dataset where there is a network first, or leave the task out"
            ) from error
        except (ImportError, LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            raise StudyError(
                f'task "{name}" cannot be asked{f" with {shots} shots" if shots else ""} ({_first_line(error)}); '
                "mend its YAML file, lower the shots, or leave the task out"
            ) from error
        for task in tasks:
            loaded.setdefault(task.task_name, _described(task, name, languages))
    return loaded


def _described(task: Any, asked: str, languages: Mapping[str, str]) -> _Task:
    """Tell language and category of a task that was asked for by its name, or by that of a group that it is in."""
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
    return _Task(task, language_tag(told) if told else language, category, metric)


def _multiple_choice(task: Any) -> bool:
    return bool(task.OUTPUT_TYPE == "multiple_choice")


def _not_right_or_wrong(task: Any) -> StudyError:
    return StudyError(
        f'task "{task.task_name}" does not say of every item whether it is right (its metrics: '
        f"{', '.join(task.aggregation())}), so the frame items cannot hold it; leave it out"
    )


@contextmanager
def _counted(model: Any, progress: Progress) -> Iterator[None]:
    """Tell of the tokens of every call of the model."""

    def tell(module: Any, positional: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        progress((positional[0] if positional else inputs["input_ids"]).numel())

    handle = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _seeded(model: Any) -> Iterator[None]:
    """Let tasks draw the same at random whatever was drawn before, and leave the random states as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's bars and remarks off the terminal."""
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
