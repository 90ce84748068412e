"""Small tasks of the evaluation harness, in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """Write a task with as many examples as items."""
    data = jsonl(folder / f"{name}.jsonl", rows)
    examples = jsonl(folder / f"{name}-train.jsonl", rows)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(examples)}},
        "test_split": "test",
        "training_split": "train",
        "metadata": {"version": 1},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config | settings), encoding="utf-8")
    return folder


def sums(folder: Path, name: str = "sums_sw", items: int = 5) -> Path:
    """Write a multiple-choice task."""
    rows = [{"question": f"{i} + {i} =", "options": [str(i), str(2 * i)], "gold": i % 2} for i in range(1, items + 1)]
    return write_task(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="options",
        doc_to_target="gold",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
