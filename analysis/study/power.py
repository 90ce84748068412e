"""What another study would see: power from the variances of a finished one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from probes import DENSE
from pruning.errors import StudyError, unknown

from ..frames import ALL, alike, labels, read_frame
from ..metrics.accuracy import by_twin
from ..metrics.contrasts import FEWEST_SETS, text_scores
from ..metrics.task_drops import Drops, reference
from ..stats.power import Comparison, Components, power
from .frames import FOLDER
from .results import open_readings

TextMetric = Literal["log_perplexity", "snr_db"]
ItemMetric = Literal["accuracy_drop", "margin_drop"]
#: Draws of each set that are tried, and how many times as many segments or templates.
DRAWS, TIMES = (2, 3, 4, 6, 8, 12), (1, 2, 4)

#: By language and set, the arrays ``[draws, units]`` of one category, or of two.
_Scores = dict[str, dict[str, list[np.ndarray]]]


def study_power(
    folder: Path,
    *,
    effect: float,
    metric: TextMetric | ItemMetric = "log_perplexity",
    comparison: Comparison = "sets",
    category: str | None = None,
    runs: int = 1000,
) -> pd.DataFrame:
    """Return the power of studies that vary as a finished one does.

    Parameters
    ----------
    folder
        Of the finished study.
    effect
        In the metric's unit; shares from 0 to 1.
    metric, comparison
        What is to differ, and between what (:func:`analysis.stats.power.power`).
    category
        Of items; ``category`` compares it with fluency, or with the first one. ``reasoning`` by default, else the last.
    runs
        Simulated studies for each number.

    Returns
    -------
    DataFrame
        A row for each recipe, number of ``draws`` and number of ``units`` (held-out segments, or templates, per
        language): ``power``, and ``power_upper`` where draws vary as much as the 80 % upper limit of their variance.

    Raises
    ------
    StudyError
        If the study has not what it takes to know; most of all, a second draw of any calibration set.
    """
    if metric in ("log_perplexity", "snr_db"):
        if comparison == "category" or category:
            raise StudyError(f"{metric} has no categories; use --metric accuracy_drop or margin_drop")
        studies = _of_text(folder, metric)
    else:
        if metric == "accuracy_drop" and effect > 1:
            raise StudyError(f"accuracy is a share, so --effect {effect:g} is too large; give one from 0 to 1")
        studies = _of_items(folder, metric, comparison, category)
    rows = []
    for recipe, scores in studies:
        found = _components(folder, scores, comparison)
        upper = found.at_upper_limit()
        for draws in DRAWS:
            for units in (times * found.units for times in TIMES):
                size = {"draws": draws, "units": units, "runs": runs}
                rows.append(
                    {
                        "recipe": recipe,
                        "draws": draws,
                        "units": units,
                        "power": power(found, comparison, effect, **size),
                        "power_upper": power(upper, comparison, effect, **size),
                    }
                )
    if not rows:
        raise StudyError(f"{folder} compares no calibration sets; give calibration.sets two or more")
    return pd.DataFrame(rows)


def needed(rows: pd.DataFrame, target: float, column: str = "power") -> tuple[int, int] | None:
    """Return the fewest draws that reach a power, and the fewest units with them; ``None`` if none does.

    >>> rows = pd.DataFrame({"draws": [2, 3, 3], "units": [64, 64, 128], "power": [0.5, 0.7, 0.9]})
    >>> needed(rows, 0.8), needed(rows, 0.95)
    ((3, 128), None)
    """
    enough = rows[rows[column] >= target].sort_values(["draws", "units"])
    return (int(enough["draws"].iloc[0]), int(enough["units"].iloc[0])) if len(enough) else None


def power_table(rows: pd.DataFrame, target: float) -> Iterator[tuple[Table, str]]:
    """Yield a table for every recipe, draws down and units across, and what it takes to reach a power in words."""
    for recipe, own in rows.groupby("recipe", sort=False):
        units = sorted(own["units"].unique())
        table = Table(title=str(recipe), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("draws", justify="right")
        for number in units:
            table.add_column(f"{number} per language", justify="right")
        for draws, of in own.groupby("draws"):
            of = of.set_index("units")
            shown = [f"{of.loc[n, 'power']:.2f} ({of.loc[n, 'power_upper']:.2f})" for n in units]
            table.add_row(str(draws), *shown)
        found = [needed(own, target, column) for column in ("power", "power_upper")]
        takes = [
            f"{at[0]} draws of each set with {at[1]} segments or templates per language"
            if at
            else f"more than {max(DRAWS)} draws of each set, or more text or items than is shown"
            for at in found
        ]
        words = (
            f"Power {target:g} takes {takes[0]}; at the 80 % upper limit of the variance between draws (in brackets) "
            f"it takes {takes[1]}. One test at 5 %, before any correction."
        )
        yield table, words


def _components(folder: Path, scores: _Scores, comparison: Comparison) -> Components:
    """Estimate the components: of all languages together for own sets, else of each, averaged."""
    sets = list(next(iter(scores.values())))
    chosen = [language for language in scores if language in sets]
    if comparison == "own" and len(chosen) < FEWEST_SETS:
        raise StudyError(
            f"{folder} has {len(chosen)} languages with a calibration set of their own (and items that the dense model "
            f"can do); own sets are tested by permuting at least {FEWEST_SETS}"
        )
    if comparison != "own" and len(sets) < 2:
        raise StudyError(f"{folder} compares no calibration sets; give calibration.sets two or more")
    try:
        if comparison == "own":
            return Components.of([[scores[language][name][0] for language in chosen] for name in chosen])
        each = [Components.of(list(of.values())) for of in scores.values()]
    except ValueError as error:
        raise StudyError(
            f"{folder} has a single draw of every calibration set, so nothing tells what another draw would change; "
            "give calibration.seeds two values and run it again"
        ) from error
    names = ("draws", "draw_means", "unit", "unit_by_set", "residual")
    mean = {name: np.mean([getattr(one, name) for one in each], axis=0) for name in names}
    return replace(each[0], **mean, units=min(one.units for one in each))


def _of_text(folder: Path, metric: str) -> Iterator[tuple[str, _Scores]]:
    readings, columns = open_readings(folder)
    languages = list(dict.fromkeys(language for _, language in readings))
    there = {name for name, _ in readings}
    for variants in alike({name: columns[name] for name in columns if name != DENSE and name in there}):
        sets: dict[str, list[str]] = {}
        for variant in variants:
            sets.setdefault(str(columns[variant]["calibration"]), []).append(variant)
        yield (
            labels.recipe_label(columns[variants[0]]),
            {
                language: {
                    name: [np.stack([text_scores(readings[variant, language])[metric] for variant in own])]
                    for name, own in sets.items()
                }
                for language in languages
            },
        )


def _of_items(folder: Path, metric: str, comparison: Comparison, category: str | None) -> Iterator[tuple[str, _Scores]]:
    twins = by_twin(read_frame(folder / FOLDER / "items.parquet"))
    if not len(twins):
        raise StudyError(f"{folder} has no items; use --metric log_perplexity, or add [tasks] to the study")
    drops = Drops(twins[twins["task"] == twins["task"].iloc[0]], metric)
    first, last = reference(drops.categories), drops.categories[-1]
    chosen = category or ("reasoning" if "reasoning" in drops.categories else last)
    if chosen not in drops.categories:
        raise StudyError(unknown("category", chosen, drops.categories))
    if comparison == "category" and chosen == first:
        raise StudyError(f'"{chosen}" is what the other categories are compared with; give --category another one')
    compared = [chosen, first] if comparison == "category" else [chosen]
    for recipe, sets in drops.recipes():
        scores = {}
        for language in drops.languages:
            places = [(name, ALL, language) for name in compared]
            if any(place not in drops.cells or place in drops.guessed for place in places):
                continue
            scores[language] = {
                name: [np.stack([drops.cells[place][variant] for variant in own]) for place in places]
                for name, own in sets.items()
            }
        if not scores:
            raise StudyError(f"{folder}: the dense model is at chance in {' and '.join(compared)}; nothing can be lost")
        yield labels.recipe_label(recipe), scores
