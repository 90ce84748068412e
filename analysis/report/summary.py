"""The few findings that the report begins with: the surest, each with the figure and the frame that show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from pruning.text.languages import language_name

from ..frames import ALL, Frames, labels, of_recipe, recipes_of
from ..metrics import mask_overlap
from ..metrics.contrasts import OTHERS, OWN, SIGNIFICANT
from ..metrics.halves import BOTH
from ..metrics.recipe_contrasts import with_reference
from ..metrics.recovery_frame import named_causes

#: How many findings there are at most, and how many of one kind.
MOST, MOST_OF_A_KIND = 10, 2


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes
    ----------
    kind
        What it is about; at most :data:`MOST_OF_A_KIND` of one kind are shown.
    sentence
        In words, with its interval.
    strength
        The effect, in half widths of its 95 % interval: above 1 the interval excludes that there is none.
    figure, frame
        Names of those that show it.
    """

    kind: str
    sentence: str
    strength: float
    figure: str
    frame: str


def summary(frames: Frames, diagnoses: Mapping[str, tuple[str, pd.DataFrame]], drawn: Sequence[str]) -> list[Finding]:
    """Return the surest findings, surest first.

    Only what an interval over draws, segments or templates stands behind is a finding. Effects in different units
    cannot be ranked by size, so they are by how many half widths of their interval they are away from none.

    Parameters
    ----------
    frames
        Those of the study.
    diagnoses
        Heading of each diagnosis to its name and its frame ``recovery``.
    drawn
        Names of the figures that there are: a finding without its figure is linked to none.
    """
    found = chain(_of_recipes(frames), _between_recipes(frames["recipe_contrasts"]), _of_diagnoses(diagnoses))
    sure = sorted((f for f in found if f.strength > 1), key=lambda f: -f.strength)
    kinds: Counter[str] = Counter()
    shown = []
    for finding in sure:
        kinds[finding.kind] += 1
        if kinds[finding.kind] <= MOST_OF_A_KIND:
            shown.append(finding if finding.figure in drawn else _without_figure(finding))
    return shown[:MOST]


def _without_figure(finding: Finding) -> Finding:
    return Finding(finding.kind, finding.sentence, finding.strength, "", finding.frame)


def _of_recipes(frames: Frames) -> Iterator[Finding]:
    for recipe in recipes_of(frames["perplexity"]):
        for part in (_own_language, _pairs_of_sets, _answers, _categories, _masks):
            yield from part(frames, recipe, labels.recipe_label(recipe), labels.recipe_slug(recipe))


def _own_language(frames: Frames, recipe: Mapping[str, Any], name: str, slug: str) -> Iterator[Finding]:
    rows = of_recipe(frames["contrasts"], {**recipe, "calibration": OWN, "other_calibration": OTHERS})
    for row in rows.to_dict("records"):
        size = _strength(row)
        if row["metric"] == "log_perplexity":
            value, low, high = (np.exp(row[key]) for key in ("value", "low", "high"))
            yield Finding(
                "own language, perplexity",
                f"{name}: calibrating on the evaluated language multiplies its perplexity by {value:.2f} "
                f"[{low:.2f}, {high:.2f}] relative to other languages.",
                size,
                f"contrasts-{slug}",
                "contrasts",
            )
        elif row["metric"] == "specific_minus_agnostic_db":
            less = "more" if row["value"] < 0 else "less"
            yield Finding(
                "own language, parts of the stream",
                f"{name}: calibrating on the evaluated language protects the language-specific part of its hidden "
                f"states {less} than the language-agnostic part, by {abs(row['value']):.2f} dB "
                f"[{min(abs(row['low']), abs(row['high'])):.2f}, {max(abs(row['low']), abs(row['high'])):.2f}].",
                size,
                f"subspaces-matrix-{slug}",
                "contrasts",
            )


def _pairs_of_sets(frames: Frames, recipe: Mapping[str, Any], name: str, slug: str) -> Iterator[Finding]:
    """Yield the surest difference between two calibration sets in one language."""
    rows = of_recipe(frames["contrasts"], {**recipe, "metric": "log_perplexity"})
    rows = rows[rows["language"].notna() & (rows["other_calibration"] != OTHERS) & (rows["p_adjusted"] < SIGNIFICANT)]
    if not len(rows):
        return
    row = max(rows.to_dict("records"), key=_strength)
    worse, better = row["calibration"], row["other_calibration"]
    value, low, high = (np.exp(row[key]) for key in ("value", "low", "high"))
    if value < 1:
        worse, better, value, low, high = better, worse, 1 / value, 1 / high, 1 / low
    many = f"the surest of {len(rows)} significant differences" if len(rows) > 1 else "the only significant difference"
    yield Finding(
        "two calibration sets",
        f"{name}: in {language_name(row['language'])}, calibrating on {worse} gives {value:.2f} times "
        f"[{low:.2f}, {high:.2f}] the perplexity of calibrating on {better}, {many} between two sets.",
        _strength(row),
        f"contrasts-{slug}",
        "contrasts",
    )


def _answers(frames: Frames, recipe: Mapping[str, Any], name: str, slug: str) -> Iterator[Finding]:
    """Yield by how much each category is answered worse, all languages together, by the models of a recipe."""
    rows = of_recipe(frames["accuracy"], {**recipe, "part": ALL})
    rows = rows[rows["language"].isna() & ~rows["at_chance"].astype(bool)]
    metric = "twin_accuracy_change" if (rows["metric"] == "twin_accuracy_change").any() else "accuracy_change"
    rows = rows[rows["metric"] == metric]
    for (task, category), own in rows.groupby(["task", "category"], observed=True):
        middle = own.sort_values("value", kind="stable").iloc[(len(own) - 1) // 2].to_dict()
        value, low, high = (100 * middle[key] for key in ("value", "low", "high"))
        which = f" of the median of {len(own)} models" if len(own) > 1 else ""
        yield Finding(
            "answers",
            f"{name}: accuracy{which} in {category} ({task}) changes by {value:+.1f} points [{low:+.1f}, {high:+.1f}].",
            _strength(middle),
            f"questions-{labels.slug(str(task))}-{slug}",
            "accuracy",
        )


def _categories(frames: Frames, recipe: Mapping[str, Any], name: str, slug: str) -> Iterator[Finding]:
    rows = of_recipe(frames["task_contrasts"], {**recipe, "metric": "accuracy_drop", "part": ALL})
    rows = rows[(rows["contrast"] == "category") & rows["language"].isna() & rows["df"].notna()]
    for row in rows[rows["calibration"].isna()].to_dict("records"):
        value, low, high = (100 * row[key] for key in ("value", "low", "high"))
        yield Finding(
            "categories",
            f"{name}: {row['category']} loses {value:+.1f} points [{low:+.1f}, {high:+.1f}] more than "
            f"{row['other_category']} ({row['task']}, all languages and calibration sets).",
            _strength(row),
            f"task-contrasts-{labels.slug(str(row['task']))}-{slug}",
            "task_contrasts",
        )


def _masks(frames: Frames, recipe: Mapping[str, Any], name: str, slug: str) -> Iterator[Finding]:
    rows = of_recipe(frames["mask_overlap"], recipe)
    if not len(rows):
        return
    coded = labels.quantized(recipe)
    metric, what, figure = (
        ("code_agreement", "codes agree", "code-agreement") if coded else ("iou", "masks overlap", "mask-overlap")
    )
    within, between, apart = mask_overlap.mean_overlaps(rows[rows["metric"] == metric], metric)
    if not np.isfinite(apart[1]):
        return
    yield Finding(
        "masks",
        f"{name}: {what} by {within[0]:.3f} between draws of one calibration set and by {between[0]:.3f} between sets, "
        f"a difference of {apart[0]:.3f} [{apart[1]:.3f}, {apart[2]:.3f}].",
        _strength({"value": apart[0], "low": apart[1], "high": apart[2]}),
        f"{figure}-{slug}",
        "mask_overlap",
    )


def _between_recipes(frame: pd.DataFrame) -> Iterator[Finding]:
    """Yield what each recipe keeps more or less than the reference, over all calibration sets and languages."""
    rows, reference = with_reference(frame)
    rows = rows[rows["calibration"].isna() & rows["language"].isna() & (rows["p_adjusted"] < SIGNIFICANT)]
    for row in rows.to_dict("records"):
        recipe = labels.recipe_label(row)
        if row["metric"] == "log_perplexity":
            value, low, high = (np.exp(row[key]) for key in ("value", "low", "high"))
            yield Finding(
                "recipes, perplexity",
                f"{recipe}: perplexity is {value:.2f} times [{low:.2f}, {high:.2f}] that of {reference}, over all "
                "languages and calibration sets.",
                _strength(row),
                "recipes-perplexity",
                "recipe_contrasts",
            )
        elif row["metric"] == "accuracy":
            value, low, high = (100 * row[key] for key in ("value", "low", "high"))
            yield Finding(
                "recipes, answers",
                f"{recipe}: accuracy in {row['category']} ({row['task']}) is {value:+.1f} points "
                f"[{low:+.1f}, {high:+.1f}] from that of {reference}, over all languages and calibration sets.",
                _strength(row),
                f"recipes-{labels.slug(str(row['task']))}",
                "recipe_contrasts",
            )


def _of_diagnoses(diagnoses: Mapping[str, tuple[str, pd.DataFrame]]) -> Iterator[Finding]:
    for heading, (name, frame) in diagnoses.items():
        causes = named_causes(frame)
        for row in causes[causes["significant"] & (causes["estimated_on"] == BOTH)].to_dict("records"):
            place = " ".join(
                [str(row["component"])]
                + ([str(row["role"])] if pd.notna(row["role"]) and str(row["role"]) else [])
                + ([f"of block {int(row['layer'])}"] if pd.notna(row["layer"]) else [])
            )
            yield Finding(
                "causes",
                f"{heading}: restoring {place} brings back {row['value']:.2f} nats "
                f"[{row['low']:.2f}, {row['high']:.2f}], on questions that did not choose it.",
                _strength(row),
                f"diagnosis-causes-{name}",
                "recovery",
            )


def _strength(row: Mapping[Any, Any]) -> float:
    """Return how many half widths of its interval an estimate is away from zero; 0 without an interval."""
    value, low, high = float(row["value"]), float(row["low"]), float(row["high"])
    if not (np.isfinite(low) and np.isfinite(high)) or low <= 0 <= high or high == low:
        return 0.0
    half = (value - low) if value > 0 else (high - value)
    return abs(value) / half if half > 0 else float("inf")
