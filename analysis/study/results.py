"""Opening the results of a study in Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes import DENSE, StoredReadings
from pruning import Variant
from pruning.errors import StudyError

from ..frames import dense_columns
from .study_file import load_study


def open_readings(folder: Path | str) -> tuple[StoredReadings, dict[str, Mapping[str, Any]]]:
    """Open the readings of a study's models, which analyzers take as input.

    Parameters
    ----------
    folder
        Folder of the study.

    Returns
    -------
    readings, columns
        ``(variant, language)`` to readings, opened on access; variant to the columns that describe it.
        The dense model comes first.

    Raises
    ------
    StudyError
        If there is no study in the folder, or it has no readings yet.
    """
    folder = Path(folder)
    study = load_study(folder / "study.toml")
    columns: dict[str, Mapping[str, Any]] = {DENSE: dense_columns(study.model_name)}
    for path in sorted((folder / "variants").glob("*/recipe.json")):
        columns[path.parent.name] = Variant.open(path.parent).columns()
    places = {
        (model, language): folder / "readings" / model / f"{language}.safetensors"
        for model in columns
        for language in study.languages
    }
    files = {key: path for key, path in places.items() if path.is_file()}
    if not files:
        raise StudyError(f"{folder} has no readings yet; run the study first: prunescope run STUDY.toml --out {folder}")
    return StoredReadings(files), columns
