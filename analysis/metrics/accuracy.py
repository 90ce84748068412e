"""Accuracy on items and minimal pairs, each model paired with the dense one item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd

from probes import DENSE
from probes.items import Item
from probes.scoring import ChoiceScores

from ..frames import VARIANT_COLUMNS, tidy
from ..stats.bootstrap import segment_interval


def item_frame(
    scores: Mapping[tuple[str, str], ChoiceScores],
    items: Mapping[str, Sequence[Item]],
    columns: Mapping[str, Mapping[str, Any]],
    task: str,
) -> pd.DataFrame:
    """Return the frame ``items``: the scores of every item in every model.

    Parameters
    ----------
    scores
        ``(variant, language)`` to the scores of that language's items, in their order.
    items
        Language to items.
    columns
        Variant to the columns that describe it.
    task
        What to call them together.
    """
    rows = []
    for (variant, language), found in scores.items():
        asked = items[language]
        place = {**columns[variant], "language": language, "task": task}
        names = {"item": [item.id for item in asked], "twin": [item.twin for item in asked]}
        names["category"] = [item.category for item in asked]
        for metric, values in (("margin", found.margin), ("correct", found.correct)):
            rows.append({**place, **names, "metric": [metric] * len(asked), "value": values})
        for choice in range(found.values.shape[1]):
            there = np.isfinite(found.values[:, choice])
            own = {name: list(compress(values, there)) for name, values in names.items()}
            rows.append(
                {
                    **place,
                    **own,
                    "choice": choice,
                    "metric": ["log_likelihood"] * int(there.sum()),
                    "value": found.values[there, choice],
                }
            )
    return tidy("items", rows)


def analyze(items: pd.DataFrame) -> pd.DataFrame:
    """Return the frame ``accuracy``: by task, category and language, and over all languages together (no language).

    Models are compared with the dense one on the same items. Intervals resample minimal pairs together, and over all
    languages an item together with its translations.

    Parameters
    ----------
    items
        As from :func:`item_frame` or :func:`analysis.study.harness.evaluate`, the dense model among them.
    """
    if not len(items):
        return tidy("accuracy", [])
    twins = _by_twin(items)
    kind = [*VARIANT_COLUMNS, "task", "category"]
    several = twins[twins.groupby(["task", "category"])["language"].transform("nunique") > 1]
    # a sum of nothing stays empty: items without margins have none over all languages either
    over_languages = several.groupby([*kind, "twin"], sort=False)[list(_SUMS)].sum(min_count=1).reset_index()
    rows = [
        _estimates(dict(zip([*kind, "language"], place, strict=True)), group)
        for place, group in twins.groupby([*kind, "language"], sort=False)
    ]
    rows += [
        _estimates(dict(zip(kind, place, strict=True)), group)
        for place, group in over_languages.groupby(kind, sort=False)
    ]
    return tidy("accuracy", rows)


#: What is summed over the items of a minimal pair, in a model and in the dense one.
_SUMS = tuple(
    f"{model}{what}" for model in ("", "dense_") for what in ("accuracy", "margin", "twin_accuracy", "items", "pairs")
)
#: Each metric's sum, and the number that it is divided by.
_MEASURED = {"accuracy": "items", "twin_accuracy": "pairs", "margin": "items"}


def _by_twin(items: pd.DataFrame) -> pd.DataFrame:
    """Return the sums of :data:`_SUMS` for every model, language and minimal pair (or single item)."""
    place = ["language", "task", "category", "twin"]
    shown = items[items["metric"].isin(["correct", "margin"])]
    shown = shown.astype(dict.fromkeys([*VARIANT_COLUMNS, *place, "metric"], object))
    values = shown.pivot_table(index=[*VARIANT_COLUMNS, *place, "item"], columns="metric", values="value", sort=False)
    if "margin" not in values:
        values["margin"] = np.nan
    by_twin = values.groupby(level=[*VARIANT_COLUMNS, *place], sort=False)
    sums = by_twin.sum().rename(columns={"correct": "accuracy"})
    sums["items"] = by_twin.size()
    sums["pairs"] = ((sums["items"] > 1) & by_twin["margin"].count().gt(1)).astype(int)
    sums["twin_accuracy"] = ((sums["margin"] > 0) & (sums["pairs"] > 0)).astype(int)
    sums.loc[by_twin["margin"].count() == 0, "margin"] = np.nan
    sums = sums.reset_index()
    dense = sums[sums["method"] == DENSE].set_index(place).drop(columns=list(VARIANT_COLUMNS)).add_prefix("dense_")
    return sums.join(dense, on=place)


def _estimates(place: dict[str, Any], twins: pd.DataFrame) -> dict[str, Any]:
    # Metrics over the same pairs share their draws; single items are no part of the interval of minimal pairs.
    measured: dict[tuple[bool, ...], list[str]] = {}
    for name, counted in _MEASURED.items():
        if twins[counted].sum() and not twins[name].isna().any():
            measured.setdefault(tuple(twins[counted] > 0), []).append(name)
    metrics: list[str] = []
    estimates = []
    for there, names in measured.items():
        own = twins[list(there)]
        changes = {}
        for name in names:
            changes[name] = own[name], own[_MEASURED[name]]
            if place["method"] != DENSE:
                changes[f"{name}_change"] = own[name] - own[f"dense_{name}"], own[_MEASURED[name]]
        total, number = (
            np.stack([sums.to_numpy(dtype=np.float64) for sums in column], axis=1)
            for column in zip(*changes.values(), strict=True)
        )
        estimates.append(_intervals(total, number))
        metrics += changes
    value, low, high = (np.concatenate(part) for part in zip(*estimates, strict=True))
    return {**place, "metric": metrics, "value": value, "low": low, "high": high, "n": int(twins["items"].sum())}


def _intervals(total: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return segment_interval(lambda weights: (weights @ total) / (weights @ number), len(total))
