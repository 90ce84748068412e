"""Contrasts of recipes: does one way of compressing keep more than another, on the same calibration text?

Two recipes are compared on the calibration sets and draws that both were calibrated on, draw by draw: what another draw
changes in both cancels. Sets are taken as they are; draws, and segments or templates, are what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import false_discovery_control

from probes import DENSE, Readings
from pruning.recipes import UNCALIBRATED

from ..frames import ALL, RECIPE_COLUMNS, TEXT, labels, tidy
from ..stats.crossed import crossed_contrast
from .accuracy import by_twin
from .contrasts import text_scores
from .task_drops import VARIANT, Drops, TaskVariant

_METRICS = {"accuracy": "accuracy_drop", "margin": "margin_drop"}
#: A calibration set and its seed.
Draw = tuple[str, int]


@dataclass(frozen=True)
class Cell:
    """Scores of all variants in one language, and in one category of a task.

    Attributes
    ----------
    language
        In which they were asked.
    ids
        Of what was sampled, segments or templates; those with one id are translations of each other.
    scores
        By variant.
    at_chance
        Whether the dense model is not shown to be above chance.
    """

    language: str
    ids: Sequence[str]
    scores: Mapping[TaskVariant, Float[np.ndarray, " samples"]]
    at_chance: bool = False


@dataclass(frozen=True)
class Recipes:
    """Recipes in the order of the study, each with its variants by draw; without calibration there is one.

    Attributes
    ----------
    members
        By the columns of a recipe.
    """

    members: Mapping[tuple[Any, ...], Mapping[Draw, TaskVariant]]

    @classmethod
    def of(cls, columns: Mapping[str, Mapping[str, Any]]) -> Recipes:
        """Return those of some variants, given the columns that describe them."""
        members: dict[tuple[Any, ...], dict[Draw, TaskVariant]] = {}
        for described in columns.values():
            if described["method"] != DENSE:
                variant = tuple(described[name] for name in VARIANT)
                draw = str(described["calibration"]), int(described["seed"])
                members.setdefault(variant[: len(RECIPE_COLUMNS)], {})[draw] = variant
        return cls(members)

    @property
    def reference(self) -> tuple[Any, ...] | None:
        """The recipe that the others are compared with first: the first that is calibrated, or else the first."""
        calibrated = (name for name, draws in self.members.items() if not _uncalibrated(draws))
        return next(calibrated, next(iter(self.members), None))

    def pairs(self) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Yield every pair once: each recipe with the reference, then the others, the later with the earlier."""
        first = self.reference
        others = [name for name in self.members if name != first]
        if first is not None:
            yield from ((name, first) for name in others)
        yield from ((name, other) for other, name in combinations(others, 2))

    def shared(self, one: tuple[Any, ...], other: tuple[Any, ...]) -> dict[str, list[tuple[TaskVariant, TaskVariant]]]:
        """Return the variants of two recipes that were calibrated on the same text, by calibration set.

        A recipe without calibration is paired with every draw of the other.
        """
        mine, theirs = self.members[one], self.members[other]
        if _uncalibrated(mine) or _uncalibrated(theirs):
            draws = list(theirs if _uncalibrated(mine) else mine)
            found = [(draw, mine.get(draw, _only(mine)), theirs.get(draw, _only(theirs))) for draw in draws]
        else:
            found = [(draw, variant, theirs[draw]) for draw, variant in mine.items() if draw in theirs]
        sets: dict[str, list[tuple[TaskVariant, TaskVariant]]] = {}
        for (name, _), *pair in found:
            sets.setdefault(name, []).append((pair[0], pair[1]))
        return {name: sets[name] for name in sorted(sets, key=labels.calibration_rank)}


def analyze(
    items: pd.DataFrame,
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Return the frame ``recipe_contrasts``: every recipe minus every other, on the same calibration text.

    ``value`` is the mean over calibration sets that both recipes have, and over draws and samples, of the recipe's
    score minus that of ``other_recipe``: log perplexity and SNR of the last block (category ``text``), or the share of
    right minimal pairs (items, where there are no pairs) and the mean margin of a category. Rows without a language are
    means over all languages, those with a ``calibration`` are of one set alone, which comparisons with the reference
    have: the study's first recipe that is calibrated, or its first.

    Intervals and t-tests are over draws and segments, or templates, together
    (:func:`analysis.stats.crossed.crossed_contrast`), and empty where no set was drawn twice; of two recipes that are
    not calibrated they are over segments or templates. ``p_adjusted`` corrects for all rows of a metric and task that
    are of the same kind (Benjamini & Hochberg): comparisons with the reference apart from the others, and means over
    all sets and languages apart from the rest. Where the dense model is at chance (``at_chance``) there is neither
    interval nor test, and means over languages leave the language out.

    Parameters
    ----------
    items
        The frame ``items``, the dense model among them.
    readings
        ``(variant, language)`` to what was read; the dense model is the variant ``"dense"``.
    columns
        Variant to the columns that describe it, in the order of the study.
    ids
        Language to the ids of the segments that were read; without, languages are taken to be independent.
    """
    recipes = Recipes.of(columns)
    rows: list[dict[str, Any]] = []
    if len(recipes.members) > 1:
        for place, cells in (*_of_text(readings, columns, ids), *_of_items(items)):
            rows += [{**place, **row} for row in _corrected(list(_compared(recipes, cells, place)))]
    names = dict.fromkeys(name for row in rows for name in row)
    return tidy("recipe_contrasts", [{name: [row.get(name) for row in rows] for name in names}] if rows else [])


def with_reference(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows that compare with the reference, which is the recipe that is compared with none, and its name."""
    subjects = {labels.recipe_label(row) for row in frame[list(RECIPE_COLUMNS)].drop_duplicates().to_dict("records")}
    names = [str(name) for name in frame["other_recipe"].unique()]
    reference = next((name for name in names if name not in subjects), "")
    return frame[frame["other_recipe"] == reference], reference


def _of_text(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, Sequence[str]] | None,
) -> Iterator[tuple[dict[str, Any], list[tuple[str, list[Cell]]]]]:
    """Yield each metric of text, with its cells."""
    scores: dict[str, dict[str, dict[TaskVariant, np.ndarray]]] = {}
    for name, language in readings:
        if name != DENSE:
            variant = tuple(columns[name][column] for column in VARIANT)
            for metric, values in text_scores(readings[name, language]).items():
                scores.setdefault(metric, {}).setdefault(language, {})[variant] = values
    for metric, by_language in scores.items():
        cells = []
        for language, of in by_language.items():
            size = len(next(iter(of.values())))
            known = ids[language] if ids else [f"{language} {i}" for i in range(size)]
            cells.append(Cell(language, known, of))
        yield {"task": TEXT, "metric": metric}, [(TEXT, cells)]


def _of_items(items: pd.DataFrame) -> Iterator[tuple[dict[str, Any], list[tuple[str, list[Cell]]]]]:
    """Yield each metric of each task, with its categories' cells."""
    if not len(items):
        return
    for task, twins in by_twin(items).groupby("task", sort=False):
        for metric, drop in _METRICS.items():
            if twins[metric].isna().any():
                continue
            table = Drops(twins, drop)
            categories = []
            for category in table.categories:
                cells = []
                for language in table.languages:
                    blocks, guessed, _ = table.blocks(category, ALL, language, None)
                    for block in blocks:
                        scores = {variant: -drops for variant, drops in block.drops.items()}
                        cells.append(Cell(language, block.templates, scores, guessed))
                categories.append((category, cells))
            yield {"task": task, "metric": metric}, categories


def _compared(
    recipes: Recipes, categories: Sequence[tuple[str, Sequence[Cell]]], place: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for one, other in recipes.pairs():
        sets = recipes.shared(one, other)
        named = dict(zip(RECIPE_COLUMNS, one, strict=True))
        named |= {"bits": next(iter(recipes.members[one].values()))[-1]}
        named["other_recipe"] = labels.recipe_label(dict(zip(RECIPE_COLUMNS, other, strict=True)))
        named["reference"] = other == recipes.reference
        for category, cells in categories:
            there = [cell for cell in cells if _all_in(cell, sets)]
            if not sets or not there:
                continue
            able = [cell for cell in there if not cell.at_chance]
            parts: list[tuple[str | None, list[str]]] = [(None, list(sets))]
            parts += [(name, [name]) for name in sets if named["reference"] and len(sets) > 1]
            for calibration, chosen in parts:
                own = {**named, "category": category, "calibration": calibration}
                pairs = [sets[name] for name in chosen]
                if able and len(there) > 1:
                    yield {**own, "language": None, "at_chance": False, **_estimate(pairs, able)}
                for cell in there:
                    found = _estimate(pairs, [cell])
                    if cell.at_chance:
                        found |= dict.fromkeys(("low", "high", "p_value", "df"), float("nan"))
                    yield {**own, "language": cell.language, "at_chance": cell.at_chance, **found}


def _estimate(sets: Sequence[Sequence[tuple[TaskVariant, TaskVariant]]], cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the mean difference over sets and languages, by draw and sample."""
    scores = []
    for pairs in sets:
        # two models without calibration have no draws: another would be the same
        drawn = [*pairs, *pairs] if all(_without_draws(pair) for pair in pairs) else pairs
        scores.append([np.stack([cell.scores[one] - cell.scores[other] for one, other in drawn]) for cell in cells])
    found = crossed_contrast(
        scores,
        np.full(len(sets), 1 / len(sets)),
        np.full(len(cells), 1 / len(cells)),
        [cell.ids for cell in cells],
    )
    size = min(len(cell.ids) for cell in cells)
    return {"draws": min(len(pairs) for pairs in sets), "n": size, **found._asdict()}


def _without_draws(pair: tuple[TaskVariant, TaskVariant]) -> bool:
    calibration = VARIANT.index("calibration")
    return all(variant[calibration] == UNCALIBRATED for variant in pair)


def _all_in(cell: Cell, sets: Mapping[str, Sequence[tuple[TaskVariant, TaskVariant]]]) -> bool:
    return all(variant in cell.scores for pairs in sets.values() for pair in pairs for variant in pair)


def _uncalibrated(draws: Mapping[Draw, TaskVariant]) -> bool:
    return all(calibration == UNCALIBRATED for calibration, _ in draws)


def _only(draws: Mapping[Draw, TaskVariant]) -> TaskVariant:
    return next(iter(draws.values()))


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their p-values corrected within each family, and without the mark of the reference."""
    families: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    for row in rows:
        row["p_adjusted"] = float("nan")
        if np.isfinite(row["p_value"]):
            whole = row["language"] is None and row["calibration"] is None
            families.setdefault((row["reference"], whole), []).append(row)
    for family in families.values():
        adjusted = false_discovery_control([row["p_value"] for row in family])
        for row, p_value in zip(family, adjusted, strict=True):
            row["p_adjusted"] = float(p_value)
    return [{name: value for name, value in row.items() if name != "reference"} for row in rows]
