"""A study file as it is written: found, read, and its keys checked, before what checks the rest is loaded."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pruning.errors import StudyError, did_you_mean, first_line, shortened, unknown
from pruning.files import is_file, is_folder
from pruning.text.sources import HubDataset

from .presets import preset_names, preset_text
from .sections import CalibrationConfig, EvaluationConfig, LensConfig, RecipeGrid, Section, TasksConfig, TextConfig

#: The tables of a study file whose keys are known.
TABLES: dict[str, type[Section]] = {
    "text": TextConfig,
    "calibration": CalibrationConfig,
    "recipes": RecipeGrid,
    "evaluation": EvaluationConfig,
    "lens": LensConfig,
    "tasks": TasksConfig,
}
#: Every key of a study file.
KEYS = ("model", "languages", "dtype", "device", *TABLES, "imported")
#: Keys of earlier versions, and what to write instead.
_RENAMED = {"evaluation.special_tokens": "write skip_first = false to include the first and special tokens"}


def study_named(name: str) -> tuple[dict[str, Any], Path | None]:
    """Return the content of a study file, or of the study that comes with prunescope under this name.

    Returns
    -------
    content, path
        With known keys only; ``None`` for the path of a study that comes with prunescope.

    Raises
    ------
    StudyError
        As for :func:`content_of`, or if there is neither.
    """
    path = Path(name)
    if is_file(path) or path.name != name or path.suffix:
        return content_of(path), path
    if name in preset_names():
        return tomllib.loads(preset_text(name)), None
    if is_folder(path):
        return content_of(path), path
    raise StudyError(f"there is no study file {shortened(name)}, and {unknown('study', name, preset_names())}")


def content_of(path: Path) -> dict[str, Any]:
    """Return the content of a study file.

    Raises
    ------
    StudyError
        If the file is missing, is not TOML, or has an unknown key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f'there is no study file {path}; write one, or try "prunescope run demo"') from error
    except IsADirectoryError as error:
        raise StudyError(f"{path} is a folder; give a study file, such as {path / 'study.toml'}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not TOML: {first_line(error)}") from error
    except OSError as error:
        raise StudyError(f"cannot read the study file {shortened(path, 200)}: {error.strerror}") from error
    check_keys(content, str(path))
    return content


def check_keys(content: dict[str, Any], where: str) -> None:
    """Check that a study file has no unknown keys.

    Raises
    ------
    StudyError
        If it has; the message names the first one.
    """
    for key, value in content.items():
        if key not in KEYS:
            raise StudyError(f"{where}: {unknown_key('', key)}")
        if key not in TABLES:
            continue
        tables = enumerate(value) if isinstance(value, list) else [("", value)]
        for number, table in tables:
            for inside in table if isinstance(table, dict) else ():
                if inside not in TABLES[key].model_fields:
                    raise StudyError(f"{where}: {unknown_key(f'{key}.{number}'.rstrip('.'), inside)}")


def unknown_key(section: str, key: str) -> str:
    """Return the message for an unknown key, with the known ones of its section."""
    place = f"{section}.{key}"
    if place in _RENAMED:
        return f'unknown key "{shortened(key)}" in [{section}]; {_RENAMED[place]}'
    first = section.split(".")[0]
    known = KEYS if not section else TABLES.get(first, HubDataset).model_fields
    return f'unknown key "{shortened(key)}"{f" in [{section}]" if section else ""}; {did_you_mean(key, known)}'
