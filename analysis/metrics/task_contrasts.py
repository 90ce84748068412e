"""Differences in differences: does pruning hurt one category more than another, and does the calibration text decide?

A drop is the dense model's score minus the pruned one's on the same minimal pairs, averaged over the pairs of a
template: templates and draws of the calibration text are what was sampled, so intervals are over both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import false_discovery_control

from ..frames import ALL, tidy
from ..stats.crossed import OWN_VARIANCE, Contrast, crossed_contrast
from ..stats.permutation import interactions, pairings_of_many
from .accuracy import by_twin
from .contrasts import FEWEST_SETS, OTHERS, OWN
from .task_drops import REST, VARIANT, Block, Drops, TaskVariant, reference

#: Variants from which a slope over log perplexity is fitted.
FEWEST_VARIANTS = 4
#: The contrasts: of sets, of categories, of both; of a language's own set with the others, alone and by category.
CONTRASTS = ("calibration", "category", "calibration_by_category", "own", "own_by_category")
_METRICS = ("accuracy_drop", "margin_drop")


def analyze(items: pd.DataFrame, perplexity: pd.DataFrame) -> pd.DataFrame:
    """Return the frame ``task_contrasts``: what depends on category, calibration set and language together.

    With d(c, s, l) the drop of category c, in language l, of the models calibrated on set s (mean over templates and
    draws), the rows are, by ``contrast``:

    - ``calibration``: d(c, s, l) − d(c, s', l);
    - ``category``: d(c, s, l) − d(c', s, l), in each language and set, in each language over all sets (no calibration),
      and over all languages and sets (neither);
    - ``calibration_by_category``: the first minus the same in category c';
    - ``own``: what the set of language l loses less than the other sets in its language, minus what it loses less in
      the other languages (the interaction of :mod:`analysis.metrics.contrasts`); and the mean over languages
      (``calibration`` = ``"own"``);
    - ``own_by_category``: the same minus the same in category c'.

    c' is ``fluency`` where there is such a category, else the first one. A ``part`` of a category, which is a kind, a
    grade or a domain, is compared with the rest of its category (``other_category`` = ``"rest"``), on the templates of
    both where they share any.

    The metrics with ``_matched`` compare at equal perplexity: ``Δd − b·Δx``, where x is log perplexity in the language
    and b the slope of d over x among all variants of the study, in this category and language. It is taken to be one
    straight line for all recipes and sets, and its standard error is counted. With fewer than
    :data:`FEWEST_VARIANTS` variants they are left out.

    Intervals and t-tests are over templates and draws together (:func:`analysis.stats.crossed.crossed_contrast`), a
    template's translations being one; without a second draw of any set they are empty. Rows of ``own`` permute whole
    sets, as in the frame ``contrasts``. ``p_adjusted`` corrects for all rows of a recipe, task, metric and contrast,
    those over all languages apart from the others (Benjamini & Hochberg). Where the dense model is at chance in either
    cell (``at_chance``) there is neither interval nor test, and means over languages leave the language out.

    Parameters
    ----------
    items
        As from :func:`analysis.metrics.accuracy.item_frame`.
    perplexity
        The frame ``perplexity`` of the same models; an empty one leaves out what needs it.
    """
    if not len(items):
        return tidy("task_contrasts", [])
    shown = perplexity[perplexity["metric"] == "perplexity"]
    keys = zip(*(shown[name].astype(object) for name in [*VARIANT, "language"]), strict=True)
    log_perplexity = {
        (key[:-1], key[-1]): float(np.log(value)) for key, value in zip(keys, shown["value"], strict=True)
    }
    rows: list[dict[str, Any]] = []
    for task, twins in by_twin(items).groupby("task", sort=False):
        for metric in _METRICS:
            if twins[metric.removesuffix("_drop")].isna().any():
                continue
            table = Drops(twins, metric)
            for adjusted in (False, True):
                predicts = len(table.variants) >= FEWEST_VARIANTS and all(
                    (variant, language) in log_perplexity for variant in table.variants for language in table.languages
                )
                if adjusted and not predicts:
                    continue
                place = {"task": task, "metric": metric + ("_matched" if adjusted else "")}
                for recipe, sets in table.recipes():
                    study = _Study(table, sets, log_perplexity if adjusted else None)
                    rows += [{**recipe, **place, **row} for row in _corrected(study.rows())]
    # one table of all rows: one of each row would take as long as all the rest
    names = dict.fromkeys(name for row in rows for name in row)
    return tidy("task_contrasts", [{name: [row.get(name) for row in rows] for name in names}] if rows else [])


class _Study:
    """Contrasts of one recipe in one metric."""

    def __init__(
        self,
        table: Drops,
        sets: Mapping[str, Sequence[TaskVariant]],
        log_perplexity: Mapping[tuple[TaskVariant, str], float] | None,
    ) -> None:
        self.table, self.sets, self.log_perplexity = table, sets, log_perplexity
        self.names = list(sets)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every contrast."""
        categories = self.table.categories
        base = reference(categories)
        for category in categories:
            yield from self._of_sets(category)
            yield from self._own(category, ALL, None)
            if category != base:
                yield from self._of_categories(category, ALL, (base, ALL))
                yield from self._of_sets(category, (base, ALL))
                yield from self._own(category, ALL, (base, ALL))
        for category, part in self.table.parts:
            yield from self._of_categories(category, part, (category, f"{REST} {part}"))
            yield from self._own(category, part, None)
            yield from self._own(category, part, (category, f"{REST} {part}"))

    def _of_sets(self, category: str, other: tuple[str, str] | None = None) -> Iterator[dict[str, Any]]:
        for language in self.table.languages:
            cell = self._cell(category, ALL, language, other)
            for (i, one), (k, second) in combinations(enumerate(self.names), 2) if cell else ():
                weights = np.zeros(len(self.names))
                weights[[i, k]] = 1, -1
                yield {
                    "contrast": "calibration_by_category" if other else "calibration",
                    **_named(category, ALL, other),
                    "language": language,
                    "calibration": one,
                    "other_calibration": second,
                    **self._estimate([cell], self.names, weights, np.ones((len(self.names), 1))),
                }

    def _of_categories(self, category: str, part: str, other: tuple[str, str]) -> Iterator[dict[str, Any]]:
        if self.log_perplexity is not None:
            return  # one model has one perplexity: there is nothing to match
        named = {"contrast": "category", **_named(category, part, other)}
        cells = {language: self._cell(category, part, language, other) for language in self.table.languages}
        there = {language: cell for language, cell in cells.items() if cell}
        number = len(self.names)
        for language, cell in there.items():
            for i, name in enumerate(self.names):
                found = self._estimate([cell], self.names, np.eye(number)[i], np.ones((number, 1)))
                yield {**named, "language": language, "calibration": name, **found}
            found = self._estimate([cell], self.names, np.full(number, 1 / number), np.ones((number, 1)))
            yield {**named, "language": language, **found}
        able = [cell for cell in there.values() if not cell[1]]
        if able:
            weights = np.full((number, len(able)), 1 / len(able))
            yield {**named, **self._estimate(able, self.names, np.full(number, 1 / number), weights)}

    def _own(self, category: str, part: str, other: tuple[str, str] | None) -> Iterator[dict[str, Any]]:
        cells = {
            language: self._cell(category, part, language, other)
            for language in self.table.languages
            if language in self.sets
        }
        able = {language: cell for language, cell in cells.items() if cell and not cell[1]}
        if len(able) < FEWEST_SETS:
            return
        named = {"contrast": "own_by_category" if other else "own", **_named(category, part, other)}
        chosen, number = list(able), len(able)
        alone = np.eye(number)
        against = alone - (1 - alone) / (number - 1)
        means = np.array([[self._mean(cell, name) for cell in able.values()] for name in chosen])
        p_values = interactions(means)
        for i, language in enumerate(chosen):
            weights = np.tile(against[i], (number, 1))
            found = self._estimate(list(able.values()), chosen, against[i], weights)
            found["p_value"] = _if_drawn_twice(found, float(p_values[i]))
            yield {**named, "language": language, "calibration": language, "other_calibration": OTHERS, **found}
        found = self._estimate(list(able.values()), chosen, np.full(number, 1 / number), against)
        yield {
            **named,
            "calibration": OWN,
            "other_calibration": OTHERS,
            **found,
            "p_value": _if_drawn_twice(found, float(pairings_of_many(means[None])[0])),
        }

    def _cell(
        self, category: str, part: str, language: str, other: tuple[str, str] | None
    ) -> tuple[list[Block], bool, int] | None:
        blocks, guessed, templates = self.table.blocks(category, part, language, other)
        if self.log_perplexity is not None:
            blocks = [block.matched(self.log_perplexity) for block in blocks]
        return (blocks, guessed, templates) if blocks else None

    def _mean(self, cell: tuple[list[Block], bool, int], name: str) -> float:
        blocks, _, _ = cell
        return sum(
            block.sign * float(np.mean([block.drops[variant].mean() for variant in self.sets[name]]))
            for block in blocks
        )

    def _estimate(
        self,
        cells: Sequence[tuple[list[Block], bool, int] | None],
        names: Sequence[str],
        set_weights: np.ndarray,
        weights: Float[np.ndarray, "sets cells"],
    ) -> dict[str, Any]:
        """Estimate a contrast of sets and cells; without interval and test where the dense model only guesses."""
        used = np.flatnonzero(set_weights).tolist()
        if all(len(self.sets[names[i]]) >= OWN_VARIANCE for i in used):  # then the other sets do not count
            names, set_weights, weights = [names[i] for i in used], set_weights[used], weights[used]
        given = [cell for cell in cells if cell]
        blocks = [block for own, _, _ in given for block in own]
        of_block = np.concatenate(
            [np.outer(weights[:, k], [block.sign for block in own]) for k, (own, _, _) in enumerate(given)], axis=1
        )
        scores = [
            [np.stack([block.drops[variant] for variant in self.sets[name]]) for block in blocks] for name in names
        ]
        found = crossed_contrast(scores, set_weights, of_block, [block.templates for block in blocks])
        if self.log_perplexity is not None:
            weighted = set_weights[:, None] * of_block
            found = found.with_error(self._of_slopes(self.log_perplexity, blocks, names, weighted))
        guessed = any(cell[1] for cell in given)
        if guessed:
            found = Contrast(found.value, *[float("nan")] * 4)
        return {
            "at_chance": guessed,
            "draws": min(len(self.sets[name]) for name, weight in zip(names, set_weights, strict=True) if weight),
            "n": min(templates for _, _, templates in given),
            **found._asdict(),
        }

    def _of_slopes(
        self,
        log_perplexity: Mapping[tuple[TaskVariant, str], float],
        blocks: Sequence[Block],
        names: Sequence[str],
        weights: np.ndarray,
    ) -> float:
        """Return the variance that the slopes' errors add to a contrast."""
        x = np.array(
            [
                [np.mean([log_perplexity[v, block.language] for v in self.sets[name]]) for block in blocks]
                for name in names
            ]
        )
        spread = (weights * x).sum(axis=0)
        return float(sum(at**2 * block.slope_variance for at, block in zip(spread, blocks, strict=True)))


def _if_drawn_twice(found: Mapping[str, Any], p_value: float) -> float:
    """Return a p-value, or nan where nothing tells what another draw would change."""
    return p_value if np.isfinite(found["df"]) else float("nan")


def _named(category: str, part: str, other: tuple[str, str] | None) -> dict[str, Any]:
    against = None if other is None else other[0] if other[1] == ALL else REST
    return {"category": category, "part": part, "other_category": against}


def _corrected(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their p-values corrected within each contrast, those over all languages apart."""
    found = list(rows)
    families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in found:
        row["p_adjusted"] = float("nan")
        if np.isfinite(row["p_value"]) and not row["at_chance"]:
            families.setdefault((row["contrast"], "language" in row), []).append(row)
    for family in families.values():
        for row, p in zip(family, false_discovery_control([row["p_value"] for row in family]), strict=True):
            row["p_adjusted"] = float(p)
    return found
