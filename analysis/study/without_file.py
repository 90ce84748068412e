"""Studies that no file describes: of variants to make of a model, and of variants and checkpoints to look at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning.errors import StudyError, shortened, unknown
from pruning.files import is_file, is_folder
from pruning.methods import known_methods, method_named
from pruning.runner import VARIANTS
from pruning.text.sources import BUNDLED_LANGUAGES, text_source
from pruning.variants.store import RECIPE_FILE

from .configuration import LONGEST_NAME, StudyConfig, taken_names
from .records import RECORDS
from .run import STUDY_FILE
from .sections import EvaluationConfig, TextConfig
from .study_file import load_study, parse_study

_BUNDLED = "bundled"
_BITS = 4


def pruning_study(
    model: str,
    *,
    methods: Sequence[str],
    sparsity: float | None = None,
    pattern: str = "",
    bits: int | None = None,
    group: int | None = None,
    calibration: Sequence[str] = ("en",),
    seed: int = 0,
    samples: int = 32,
    length: int = 128,
    text: str = _BUNDLED,
    languages: Sequence[str] | None = None,
) -> StudyConfig:
    """Return the study that makes variants of a model.

    Parameters
    ----------
    model
        Hub id or folder with a checkpoint; ``"demo"`` for the embedded model.
    methods
        Names of methods.
    sparsity, pattern
        For methods that prune; their defaults by default.
    bits, group
        For methods that quantize; their defaults by default.
    calibration, seed, samples, length
        Calibration sets, which draw of the text, and its amount.
    text
        Source of all text.
    languages
        What the set ``"all"`` holds, and later evaluation languages; those of the bundled text, or of the calibration
        sets, by default.

    Raises
    ------
    StudyError, TextError
        If one of the arguments is invalid.
    """
    for method in methods:
        if method not in known_methods():
            raise StudyError(unknown("method", method, known_methods()))
    text_source(text)
    if languages is None and text == _BUNDLED:
        languages = BUNDLED_LANGUAGES
    elif languages is None:
        languages = list(dict.fromkeys(tag for name in calibration for tag in name.split("+") if name != "all"))
        if len(languages) < 2:
            raise StudyError("which languages does the text have? Give two or more with --languages en,sw")
    return parse_study(
        {
            "model": model,
            "languages": list(languages),
            "text": dict.fromkeys(TextConfig.model_fields, text),
            "calibration": {"sets": list(calibration), "seeds": [seed], "samples": samples, "length": length},
            "recipes": [_recipe(method, sparsity, pattern, bits, group) for method in methods],
        },
        "prune",
    )


def looking_study(
    model: str,
    variants: Sequence[str],
    *,
    languages: Sequence[str] = BUNDLED_LANGUAGES,
    text: str = _BUNDLED,
    segments: int = EvaluationConfig.model_fields["segments"].default,
    items: str | None = None,
) -> StudyConfig:
    """Return the study that compares variants and checkpoints with their dense model.

    Parameters
    ----------
    model
        The dense model: hub id or folder with a checkpoint; ``"demo"`` for the embedded model.
    variants
        Folders of variants, folders of studies (for all their variants), folders with checkpoints, and hub ids.
    languages
        BCP-47 tags.
    text
        Source of all text.
    segments
        Number of held-out segments per language, and of parallel segments to fit the subspaces.
    items
        Source of the items, ``"none"``, or the default of a study.

    Raises
    ------
    StudyError
        If one of the arguments is invalid.
    """
    places = [place for variant in variants for place in _expanded(variant)]
    imported: dict[str, str] = {}
    for place in places:
        name = _name_of(place)
        if name in imported:
            raise StudyError(f'two variants are called "{shortened(name)}": {imported[name]} and {place}; rename one')
        imported[name] = place
    return parse_study(
        {
            "model": model,
            "languages": list(languages),
            "text": dict.fromkeys(TextConfig.model_fields, text),
            "calibration": {"sets": []},
            "recipes": [],
            "imported": imported,
            "evaluation": {"segments": segments, "fit_segments": segments},
            "tasks": {} if items is None else {"items": items},
        },
        "look",
    )


def check_same_study(folder: Path, study: StudyConfig) -> None:
    """Check that a folder is new, or has this very study, which is then resumed.

    Raises
    ------
    StudyError
        If it has anything else.
    """
    found = _study_in(folder)
    if found is None:
        _check_empty(folder)
    elif found.to_toml() != study.to_toml():
        raise StudyError(f"{folder} has another study, which this would replace; choose another folder (--out)")


def check_no_recipes(folder: Path) -> None:
    """Check that a folder is new, or has a study without recipes of its own, which may be changed.

    Raises
    ------
    StudyError
        If it has anything else.
    """
    found = _study_in(folder)
    if found is None:
        _check_empty(folder)
    elif found.recipes:
        raise StudyError(f"{folder} has a study that makes variants; choose another folder for the look (--out)")


def _study_in(folder: Path) -> StudyConfig | None:
    return load_study(folder / STUDY_FILE) if is_file(folder / STUDY_FILE) else None


def _check_empty(folder: Path) -> None:
    """Check that a folder has no files but those that a study begins with."""
    if is_folder(folder) and {path.name for path in folder.iterdir()} - {".lock", RECORDS}:
        raise StudyError(f"{folder} exists and has no study in it; choose a new folder (--out)")


def _recipe(
    method: str, sparsity: float | None, pattern: str, bits: int | None, group: int | None
) -> Mapping[str, Any]:
    recipe: dict[str, Any] = {"method": method}
    if method_named(method).quantize is not None:
        return recipe | {"bits": _BITS if bits is None else bits} | ({} if group is None else {"group": group})
    if sparsity is not None:
        recipe["sparsity"] = sparsity
    return recipe | ({"pattern": pattern} if pattern else {})


def _expanded(variant: str) -> list[str]:
    """Return a variant, or all variants in the folder of a study."""
    folder = Path(variant)
    if not is_file(folder / STUDY_FILE):
        return [variant]
    found = sorted(str(path.parent) for path in (folder / VARIANTS).glob(f"*/{RECIPE_FILE}"))
    if not found:
        raise StudyError(
            f"{folder} has no variants yet; make them: prunescope prune {folder / STUDY_FILE} --out {folder}"
        )
    return found


def _name_of(place: str) -> str:
    """Return what a variant is called in frames."""
    name = re.sub(r"[^\w.+=-]+", "_", Path(place).name).strip("_").lstrip(".+=-")[:LONGEST_NAME] or "pruned"
    return f"{name}-checkpoint" if name in taken_names() else name  # the user did not choose it
