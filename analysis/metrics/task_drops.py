"""What pruned models lost of every category, part and language, template by template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import linregress

from probes import DENSE
from pruning.recipes import UNCALIBRATED

from ..frames import ALL, RECIPE_COLUMNS, labels
from .accuracy import at_chance, parts_of

#: What the parts of a category are compared with.
REST = "rest"
#: The columns of a pruned model.
VARIANT = [*RECIPE_COLUMNS, "calibration", "seed", "bits"]

#: A pruned model: its recipe, calibration set, seed and size.
TaskVariant = tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """Drops of one cell in all variants, or what they exceed those of another cell by on the templates of both.

    Attributes
    ----------
    language
        In which it was asked.
    sign
        Of the block in a contrast of two cells.
    templates
        Names of its templates; those of translations are the same.
    drops
        Of every template.
    slope, slope_variance
        Of the mean drop over log perplexity, among all variants; only where that is taken out.
    """

    language: str
    sign: float
    templates: tuple[str, ...]
    drops: Mapping[TaskVariant, Float[np.ndarray, " templates"]]
    slope: float = 0.0
    slope_variance: float = 0.0

    def matched(self, log_perplexity: Mapping[tuple[TaskVariant, str], float]) -> Block:
        """Return the block with what log perplexity predicts of every variant's drop taken out of it."""
        x = np.array([log_perplexity[variant, self.language] for variant in self.drops])
        y = np.array([drops.mean() for drops in self.drops.values()])
        if np.ptp(x) == 0:
            return self
        if np.ptp(y) == 0:  # no error either; linregress has none for it
            return self
        fit = linregress(x, y)
        adjusted = {
            variant: drops - fit.slope * (at - x.mean())
            for (variant, drops), at in zip(self.drops.items(), x, strict=True)
        }
        return Block(self.language, self.sign, self.templates, adjusted, float(fit.slope), float(fit.stderr) ** 2)


class Drops:
    """Drops of every cell, by template and variant.

    Parameters
    ----------
    twins
        As from :func:`analysis.metrics.accuracy.by_twin`, of one task.
    metric
        ``accuracy_drop`` or ``margin_drop``.

    Attributes
    ----------
    variants, languages, categories, parts
        What there is; parts with their category.
    cells
        Drops of every variant by template, by category, part and language.
    guessed
        The cells in which the dense model is at chance.
    """

    def __init__(self, twins: pd.DataFrame, metric: str) -> None:
        pruned = twins[twins["method"] != DENSE]
        own = pruned["margin"] / pruned["items"]
        before = pruned["dense_margin"] / pruned["items"]
        if metric == "accuracy_drop":
            pair = pruned["pairs"] > 0
            own = pruned["twin_accuracy"].where(pair, pruned["accuracy"])
            before = pruned["dense_twin_accuracy"].where(pair, pruned["dense_accuracy"])
        variants = list(zip(*(pruned[name] for name in VARIANT), strict=True))
        self.variants: list[TaskVariant] = list(dict.fromkeys(variants))
        number = {variant: k for k, variant in enumerate(self.variants)}
        self._twins = pruned.assign(drop=(before - own).astype(float), variant=[number[v] for v in variants])
        self.languages = list(dict.fromkeys(pruned["language"]))
        self.cells: dict[tuple[str, str, str], dict[TaskVariant, pd.Series]] = {}
        self.guessed: set[tuple[str, str, str]] = set()
        self.categories = labels.categories_of(pruned)
        self.parts: list[tuple[str, str]] = []
        for part, rows in parts_of(self._twins):
            for category, of in rows.groupby("category", sort=False):
                self._add(str(category), part, of)
                if part != ALL:
                    self.parts.append((str(category), part))
                    whole = self._twins[self._twins["category"] == category]
                    self._add(str(category), f"{REST} {part}", whole.drop(of.index))

    def _add(self, category: str, part: str, rows: pd.DataFrame) -> None:
        for language, own in rows.groupby("language", sort=False):
            place = category, part, str(language)
            if at_chance(own[own["variant"] == own["variant"].iloc[0]]):
                self.guessed.add(place)
            by_template = own.groupby(["template", "variant"], sort=False)["drop"].mean().unstack("variant")
            self.cells[place] = {variant: by_template[k] for k, variant in enumerate(self.variants)}

    def recipes(self) -> Iterator[tuple[dict[str, Any], dict[str, list[TaskVariant]]]]:
        """Yield every recipe that is calibrated, with the variants of each of its sets."""
        key = len(RECIPE_COLUMNS)
        calibrated = [variant for variant in self.variants if variant[key] != UNCALIBRATED]
        for recipe, members in groupby(sorted(calibrated, key=lambda of: tuple(map(str, of))), lambda of: of[:key]):
            sets: dict[str, list[TaskVariant]] = {}
            for variant in members:
                sets.setdefault(str(variant[key]), []).append(variant)
            ordered = {name: sets[name] for name in sorted(sets, key=labels.calibration_rank)}
            size = next(iter(sets.values()))[0][-1]
            yield dict(zip(RECIPE_COLUMNS, recipe, strict=True)) | {"bits": size}, ordered

    def blocks(
        self, category: str, part: str, language: str, other: tuple[str, str] | None
    ) -> tuple[list[Block], bool, int]:
        """Return a cell, or it minus another, whether the dense model only guesses there, and the fewest templates."""
        place = category, part, language
        cell = self.cells.get(place, {})
        if other is None:
            blocks, places = [_block(language, 1.0, cell)] if cell else [], [place]
        else:
            places = [place, (*other, language)]
            second = self.cells.get(places[1], {})
            blocks = _minus(language, cell, second) if cell and second else []
        sizes = [len(next(iter(block.drops.values()))) for block in blocks]
        if not sizes or min(sizes) < 2:
            return [], False, 0
        return blocks, any(at in self.guessed for at in places), min(sizes)


def reference(categories: Sequence[str]) -> str:
    """Return the category that the others are compared with."""
    return "fluency" if "fluency" in categories else categories[0]


def _block(language: str, sign: float, cell: Mapping[TaskVariant, pd.Series]) -> Block:
    templates = tuple(map(str, next(iter(cell.values())).index))
    return Block(language, sign, templates, {variant: drops.to_numpy() for variant, drops in cell.items()})


def _minus(language: str, cell: Mapping[TaskVariant, pd.Series], other: Mapping[TaskVariant, pd.Series]) -> list[Block]:
    shared = next(iter(cell.values())).index.intersection(next(iter(other.values())).index)
    if len(shared):
        differences = {variant: (drops[shared] - other[variant][shared]).to_numpy() for variant, drops in cell.items()}
        return [Block(language, 1.0, tuple(map(str, shared)), differences)]
    return [_block(language, 1.0, cell), _block(language, -1.0, other)]
