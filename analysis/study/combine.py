"""Several studies together: what they have in common, in a folder of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from pruning.errors import StudyError
from pruning.files import PARTIAL, disk_errors, whole_file, write_text

from .. import plots
from ..frames import labels, read_frame, recipes_of
from ..metrics.combined import COMBINED, combine
from ..report.combined import answers, write_page
from .study_file import load_study

FRAME_FILE, TABLE_FILE, PAGE_FILE, FIGURES = "combined.parquet", "combined.csv", "report.html", "figures"
#: What a run leaves, finished or killed.
_WRITTEN = (FRAME_FILE, TABLE_FILE, PAGE_FILE, FIGURES)


def combine_studies(folders: Sequence[Path], out: Path, progress: Callable[[str], None] = lambda words: None) -> Path:
    """Combine finished studies, and return the page on them.

    Parameters
    ----------
    folders
        Of the studies, two or more.
    out
        Folder for ``report.html``, ``combined.parquet``, ``combined.csv`` and ``figures``; what another run of this
        function wrote there is replaced.
    progress
        Told what is being done.

    Raises
    ------
    StudyError
        If there are fewer than two studies, or one is given twice or not finished; if they have no effect in common;
        or if something else is in the folder.
    DiskError
        If something cannot be written.
    """
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise StudyError("give the folders of two studies or more, each once")
    configs = {folder: load_study(folder / "study.toml") for folder in folders}
    for folder in folders:
        if not all(_frame(folder, name).is_file() for name in COMBINED):
            raise StudyError(
                f"{folder} lacks frames that this version makes; bring it up to date: prunescope run "
                f"{folder / 'study.toml'} --out {folder}"
            )
    if out.is_dir() and not all(path.name.removesuffix(PARTIAL) in _WRITTEN for path in out.iterdir()):
        raise StudyError(f"{out} has something else in it; choose another folder, or a new one")
    models = Counter(config.model_name for config in configs.values())
    names = {
        folder: config.model_name if models[config.model_name] == 1 else f"{config.model_name} ({folder})"
        for folder, config in configs.items()
    }
    progress("reading the frames")
    frames = {names[folder]: {name: read_frame(_frame(folder, name)) for name in COMBINED} for folder in folders}
    progress("combining what they have in common")
    rows = combine(frames)
    if not len(rows):
        raise StudyError(
            "these studies have no effect with an interval in common: recipes, languages and metrics must be the same "
            "in two of them, and calibration sets drawn twice (calibration.seeds)"
        )
    with disk_errors(out):
        (out / FIGURES).mkdir(parents=True, exist_ok=True)
    with whole_file(out / FRAME_FILE) as partial:
        rows.to_parquet(partial, index=False)
    write_text(out / TABLE_FILE, rows.to_csv(index=False))
    shown = list(answers(rows))
    for answer in shown:
        progress(f"drawing {answer.question.name}")
        plots.save(answer.draw(), out / FIGURES, answer.question.name)
    described = {
        names[folder]: {
            "model": config.model_name,
            "languages": ", ".join(config.languages),
            "sets": ", ".join(config.calibration.sets),
            "draws": str(len(config.calibration.seeds)),
            "recipes": "; ".join(_recipes(frames[names[folder]])),
        }
        for folder, config in configs.items()
    }
    return write_page(out, rows, described, shown)


def _recipes(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    found = (recipe for name in COMBINED for recipe in recipes_of(frames[name]))
    return list(dict.fromkeys(labels.recipe_label(recipe) for recipe in found))


def _frame(folder: Path, name: str) -> Path:
    return folder / "frames" / f"{name}.parquet"
