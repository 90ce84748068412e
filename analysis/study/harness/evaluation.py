"""Models in EleutherAI's lm-evaluation-harness, as the frame ``items``.

The harness provides the tasks, their prompts and their scoring. It reads the model that is already loaded, turned into
one variant after another, and every model answers the same items with the same few-shot examples.

A choice is scored as the harness scores it: the log-likelihood of its tokens after the prompt, where prompt and choice
are tokenized together, with the special tokens that the tokenizer prepends (BOS). Trailing spaces of a prompt count as
part of the choice; an empty prompt is replaced by a BOS token, or by an EOS token if there is none. In an
encoder-decoder the prompt is what the encoder reads, and the choice, tokenized on its own, what the decoder is scored
on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from probes.reading import Progress
from pruning.errors import StudyError
from pruning.variants.owner import DenseModel
from pruning.variants.variant import Variant

from ...frames import dense_columns, joined, tidy
from .tasks import SEED, Task, imported_harness, load_tasks, quiet, seeded


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
    progress: Progress = lambda tokens: None,
) -> pd.DataFrame:
    """Evaluate a dense model and variants of it on tasks of the harness, and return the frame ``items``.

    For a multiple-choice task, the frame has the log-likelihood of every choice, the margin, and ``correct`` as in the
    harness's ``acc``: whether the likeliest choice is right, with ties broken in favour of the first. For any other
    task, it has only ``correct``: the task's metric ``exact_match``, ``acc`` or ``em``; if the task extracts an answer
    with several filters, that of the last one (MGSM: ``flexible-extract``). Tasks without such a metric, whose items
    are not simply right or wrong, are refused. ``category`` is the benchmark or group, ``item`` the number of the
    document; for tasks of :func:`bundled_task_folder`, they are those of the items.

    Parameters
    ----------
    model, tokenizer
        As returned by :func:`pruning.load_model`; the model is unchanged afterwards, bit for bit.
    tasks
        Names of tasks, groups or tags.
    variants
        Variants of this model.
    shots
        Few-shot examples per item; by default as the task specifies. Tasks that specify 0 stay zero-shot.
    limit
        Use only the first `limit` items of every task (also of every task in a group); all by default.
    folders
        Folders with YAML files of further tasks, which take precedence over the harness's own; a group defined there
        contains only tasks of these folders.
    languages
        Task or group to the BCP-47 tag of its language, where the name does not show it.
    model_name
        Name of the model in frames; its ``name_or_path`` by default.
    batch_size
        Sequences per batch.
    progress
        Called with the number of tokens, including padding, that a model has just read or generated.

    Raises
    ------
    StudyError
        If the harness is not installed, or a task is unknown, cannot be loaded or has no items that are right or wrong.
    VariantError
        If a variant was not made from this model.
    """
    if not tasks or (limit is not None and limit < 1) or (shots is not None and shots < 0):
        raise StudyError("nothing to evaluate; give at least one task, a limit of at least 1 and at least 0 shots")
    loaded = load_tasks(tasks, shots=shots, folders=folders, languages=languages)
    name = model_name or str(model.name_or_path)
    owner = DenseModel(model)
    frames = []
    for variant in (None, *variants):
        columns = variant.columns() | {"model": name} if variant else dense_columns(name)
        with owner.pruned_to(variant) if variant else nullcontext():
            frames.append(ask(model, tokenizer, loaded, columns, limit=limit, batch_size=batch_size, progress=progress))
    return joined("items", frames)


def ask(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    columns: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress = lambda tokens: None,
) -> pd.DataFrame:
    """Evaluate a model in its current state on tasks from :func:`load_tasks`, and return its rows of ``items``.

    Parameters
    ----------
    columns
        Columns that describe the model.
    model, tokenizer, tasks, limit, batch_size, progress
        As for :func:`evaluate`.
    """
    lm_eval = imported_harness()
    with _counted(model, progress), quiet(), seeded(model.device):
        reader = lm_eval.models.huggingface.HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # the harness may set its padding token
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        for task in tasks.values():
            task.harness.set_fewshot_seed(SEED)
        found = lm_eval.evaluator.evaluate(
            lm=reader,
            task_dict={"tasks": {name: task.harness for name, task in tasks.items()}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return tidy("items", [{**columns, **task.row(found["samples"][name])} for name, task in tasks.items()])


@contextmanager
def _counted(model: Any, progress: Progress) -> Iterator[None]:
    """Report the tokens of every call of the model to `progress`."""

    def tell(module: Any, positional: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        read = [*positional[:1], *(inputs.get(name) for name in ("input_ids", "decoder_input_ids", "labels"))]
        progress(sum(ids.numel() for ids in read if ids is not None))

    handle = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
