"""Exporting items in prunescope's format as tasks of the harness."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from probes.items import ItemSource
from pruning.files import disk_errors
from pruning.text.languages import language_tags

#: Prefix of the task names that :func:`bundled_task_folder` writes, followed by the language.
BUNDLED_TASK = "prunescope_"


def bundled_task_folder(folder: Path, languages: Sequence[str], source: ItemSource | None = None) -> list[str]:
    """Write items as tasks of the harness, ``prunescope_LANGUAGE``, into a folder for :func:`evaluate`.

    These tasks are always zero-shot, whatever `shots` says: an example could be the twin of the item.

    Parameters
    ----------
    folder
        Created if necessary. It will hold a YAML and a JSONL file per language, and must not be moved.
    languages
        BCP-47 tags.
    source
        Source of the items; the bundled ones by default.

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
            text = json.dumps(config, indent=2, ensure_ascii=False)  # JSON is valid YAML
            data.with_suffix(".yaml").write_text(text + "\n", encoding="utf-8")
    return [BUNDLED_TASK + tag for tag in tags]
