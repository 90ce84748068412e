"""Reading and checking study files, with paths resolved and one-line errors."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pruning.errors import StudyError, shortened
from pruning.files import is_folder
from pruning.models.naming import DEMO

from .configuration import StudyConfig
from .presets import preset_text
from .published import Published
from .sections import TextConfig
from .written import check_keys, content_of, study_named, unknown_key


def load_study(path: Path) -> StudyConfig:
    """Read and check a study file.

    Relative paths in ``file:`` sources, of the model folder, diagnoses and subspaces are relative to the study file.

    Raises
    ------
    StudyError
        If the file is missing, is not TOML, or has an unknown key or an invalid value; or if a diagnosis or subspaces
        that it names cannot be read.
    """
    return _from_file(content_of(path), path)


def _from_file(content: dict[str, Any], path: Path) -> StudyConfig:
    return _anchored(parse_study(_files_anchored(content, path.parent), str(path)), path.parent)


def resolved_study(name: str) -> StudyConfig:
    """Return the study in a file, or, if there is no such file, the one that comes with prunescope under this name.

    Raises
    ------
    StudyError
        As for :func:`load_study`.
    """
    content, path = study_named(name)
    return preset_study(name) if path is None else _from_file(content, path)


def preset_study(name: str) -> StudyConfig:
    """Return a study that comes with prunescope, such as ``demo``: a real model and real text that come with it, too.

    Raises
    ------
    StudyError
        If there is none of this name.
    """
    return parse_study(tomllib.loads(preset_text(name)), f"{name}.toml")


def demo_study() -> StudyConfig:
    """Return the embedded study: a real model and real text that come with prunescope."""
    return preset_study(DEMO)


def parse_study(content: dict[str, Any], where: str) -> StudyConfig:
    """Check the content of a study file.

    Raises
    ------
    StudyError
        If the content is invalid; the message names the first problem.
    """
    check_keys(content, where)
    try:
        return StudyConfig.model_validate(content)
    except ValidationError as error:
        # An invalid dataset table also fails as a string; the dataset error is the more informative one.
        first = min(error.errors(), key=lambda e: e["type"] == "string_type")
        raise StudyError(f"{where}: {_explained(first)}") from error


#: Messages in terms of TOML for pydantic's errors about Python types.
_IN_TOML = {
    "tuple_type": 'should be a list in brackets, such as ["a", "b"] or [0, 1]',
    "dict_type": "should be a table, such as { name = 0.5 }",
    "string_type": 'should be text in quotes, such as "a"',
}


def _explained(error: Any) -> str:
    kinds = ("str", "int", "float", "HubDataset", "line", "table")
    place = ".".join(
        shortened(part) for part in error["loc"] if part not in kinds and not str(part).startswith(("tuple[", "dict["))
    )
    if error["type"] == "extra_forbidden":
        section, _, key = place.rpartition(".")
        return unknown_key(section, key)
    if error["type"] == "missing":
        return f'the key "{place}" is missing'
    if place == "recipes" and error["type"] == "tuple_type":
        return "recipes: start each recipe with the line [[recipes]]"
    if error["type"] == "too_short":
        return f"{place}: needs at least {error['ctx']['min_length']} values, not {error['ctx']['actual_length']}"
    message = _IN_TOML.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{place}: {message}" if place else message


def _anchored(study: StudyConfig, folder: Path) -> StudyConfig:
    """Resolve relative paths against the study file's folder."""

    def anchor(spec: Any) -> Any:
        if isinstance(spec, str) and spec.startswith("file:"):
            return "file:" + os.path.normpath(folder / spec.removeprefix("file:"))
        return spec

    text = TextConfig(**{part: anchor(getattr(study.text, part)) for part in TextConfig.model_fields})

    def checkpoint(name: str) -> str:
        return os.path.normpath(folder / name) if name != DEMO and is_folder(folder / name) else name

    imported = {
        name: source.anchored(folder) if isinstance(source, Published) else checkpoint(source)
        for name, source in study.imported.items()
    }
    folders = tuple(os.path.normpath(folder / name) for name in study.tasks.folders)
    tasks = study.tasks.model_copy(update={"items": anchor(study.tasks.items), "folders": folders})
    update = {"text": text, "model": checkpoint(study.model), "imported": imported, "tasks": tasks}
    return study.model_copy(update=update)


def _files_anchored(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the paths of files that recipes depend on, before the study is validated, since that reads them."""
    grids = content.get("recipes")
    if not isinstance(grids, list):
        return content

    def anchored(grid: dict[str, Any]) -> dict[str, Any]:
        named = {key: grid[key] for key in ("diagnosis", "subspaces") if isinstance(grid.get(key), str)}
        return grid | {key: str(folder / path) for key, path in named.items()}

    return content | {"recipes": [anchored(grid) if isinstance(grid, dict) else grid for grid in grids]}
