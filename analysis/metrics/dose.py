"""Dose and response: at which sparsity a capability breaks.

Variants that differ in nothing but sparsity are a series. Accuracy has broken where it has fallen half way from the
dense model's to chance, perplexity where it has doubled: both say the same for every series, however far it goes.
Between the sparsities of a series the curve is interpolated, after noise is smoothed by the best curve that never rises
(isotonic regression).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from probes import DENSE, Readings

from ..frames import TEXT, VARIANT_COLUMNS, tidy
from ..stats.bootstrap import segment_interval
from .accuracy import at_chance, by_twin

#: The columns in which the variants of a series are alike.
SERIES_COLUMNS = tuple(column for column in VARIANT_COLUMNS if column not in ("sparsity", "bits"))
#: Sparsities that a series needs, beside the dense model.
FEWEST = 3
#: Where perplexity has broken: as a factor of the dense model's.
DOUBLED = 2.0
#: Stands for a series that does not break; above every sparsity.
_NEVER = 1e6


def crossing(
    doses: Float[np.ndarray, " doses"],
    curves: Float[np.ndarray, "*curves doses"],
    levels: Float[np.ndarray, " *curves"],
) -> Float[np.ndarray, " *curves"]:
    """Return the dose at which each curve, made to never rise, reaches its level; inf where it does not.

    Parameters
    ----------
    doses
        In ascending order.
    curves
        Values at the doses.
    levels
        What each curve falls to.
    """
    smooth = falling(curves)
    below = smooth <= levels[..., None]
    first = below.argmax(axis=-1)
    before = np.maximum(first - 1, 0)

    def at(values: np.ndarray, place: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, place[..., None], axis=-1)[..., 0]

    high, low = at(smooth, before), at(smooth, first)
    step = np.divide(high - levels, high - low, out=np.zeros_like(high), where=high > low)
    found = doses[before] + step * (doses[first] - doses[before])
    return np.where(below.any(axis=-1), np.where(first == 0, doses[0], found), np.inf)


def falling(curves: Float[np.ndarray, "*curves doses"]) -> Float[np.ndarray, "*curves doses"]:
    """Return the nearest curves, in squares, that never rise (isotonic regression, by the min-max formula)."""
    number = curves.shape[-1]
    sums = np.concatenate([np.zeros_like(curves[..., :1]), np.cumsum(curves, axis=-1)], axis=-1)
    smooth = np.empty_like(curves, dtype=np.float64)
    for i in range(number):
        least = np.full(curves.shape[:-1], np.inf)
        for first in range(i + 1):
            means = [(sums[..., last + 1] - sums[..., first]) / (last + 1 - first) for last in range(i, number)]
            least = np.minimum(least, np.max(means, axis=0))
        smooth[..., i] = least
    return smooth


def analyze(
    items: pd.DataFrame,
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
) -> pd.DataFrame:
    """Return the frame ``dose``; empty if no series has three sparsities.

    Parameters
    ----------
    items
        The frame ``items``, the dense model among them.
    readings
        ``(variant, language)`` to what was read; the dense model is the variant ``"dense"``.
    columns
        Variant to the columns that describe it.
    """
    found = series(columns)
    rows = [*_of_text(found, readings, columns), *_of_items(found, items, columns)] if found else []
    return tidy("dose", rows)


def series(columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the variants of every series, in the order of their sparsity."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, described in columns.items():
        if described["method"] != DENSE:
            groups.setdefault(tuple(described[column] for column in SERIES_COLUMNS), []).append(name)

    def sparsity(name: str) -> float:
        return float(columns[name]["sparsity"])

    return [
        sorted(group, key=sparsity) for group in groups.values() if len({sparsity(name) for name in group}) >= FEWEST
    ]


def _of_text(
    found: Sequence[Sequence[str]],
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    wanted = {DENSE, *(name for group in found for name in group)}
    data = {
        place: np.stack([read.nll, read.predicted], axis=1).astype(np.float64)
        for place, read in readings.items()
        if place[0] in wanted
    }
    for group in found:
        doses = _doses(group, columns)
        for language in dict.fromkeys(language for _, language in data):
            nll = np.stack([data[name, language][:, 0] for name in (DENSE, *group)], axis=1)
            tokens = data[DENSE, language][:, 1]

            def broken(weights: np.ndarray, nll: np.ndarray = nll, tokens: np.ndarray = tokens) -> np.ndarray:
                loss = (weights @ nll) / (weights @ tokens)[..., None]
                return crossing(doses, -loss, -loss[..., 0] - np.log(DOUBLED))  # noqa: B023  (called at once)

            place = {"language": language, "category": TEXT, "n": len(tokens)}
            yield {**_series_columns(columns[group[0]]), **place, **_estimate(broken, len(tokens))}


def _of_items(
    found: Sequence[Sequence[str]], items: pd.DataFrame, columns: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    if not len(items):
        return
    twins = by_twin(items)
    several = twins.groupby(["task", "category"])["language"].transform("nunique") > 1
    keys = list(VARIANT_COLUMNS)
    for over, shown in ((["language", "task", "category"], twins), (["task", "category"], twins[several])):
        for place, cell in shown.groupby(over, sort=False):
            dense = cell[cell["method"] == DENSE]
            if at_chance(dense):
                continue
            where = dict(zip(over, place, strict=True))
            by_model = dict(iter(cell.groupby(keys, sort=False)))
            for group in found:
                wanted = [tuple(columns[name][key] for key in keys) for name in group]
                if all(values in by_model for values in wanted):
                    models = [dense, *(by_model[values] for values in wanted)]
                    estimate, n = _broken_accuracy(_doses(group, columns), models)
                    yield {**_series_columns(columns[group[0]]), **where, "n": n, **estimate}


def _broken_accuracy(doses: np.ndarray, models: Sequence[pd.DataFrame]) -> tuple[dict[str, Any], int]:
    """Return where accuracy (on minimal pairs, if there are any) has fallen half way to chance, over templates."""
    dense = models[0]
    right, asked = ("twin_accuracy", "pairs") if dense["pairs"].sum() else ("accuracy", "items")
    names = sorted(set(dense["template"]))
    place = {name: i for i, name in enumerate(names)}

    def sums(model: pd.DataFrame, column: str) -> np.ndarray:
        unit = model["template"].map(place).to_numpy()
        return np.bincount(unit, model[column].to_numpy(np.float64), len(names))

    counted = sums(dense, asked)
    guessed = 0.5 * counted if asked == "pairs" else sums(dense, "guessed")
    correct = np.stack([sums(model, right) for model in models], axis=1)

    def broken(weights: np.ndarray) -> np.ndarray:
        number = weights @ counted
        shares = (weights @ correct) / number[..., None]
        chance = (weights @ guessed) / number
        return crossing(doses, shares, (shares[..., 0] + chance) / 2)

    return _estimate(broken, len(names)), int(dense["items"].sum())


def _estimate(broken: Any, units: int) -> dict[str, Any]:
    """Return the sparsity with its interval over segments or templates; inf where a series does not break."""

    def bounded(weights: np.ndarray) -> np.ndarray:
        return np.minimum(broken(weights), _NEVER)[..., None]

    value, low, high = (float(part[0]) for part in segment_interval(bounded, units))
    ends = {"value": value, "low": low, "high": high}
    return {"metric": "breaking_sparsity", **{name: np.inf if end > 1 else end for name, end in ends.items()}}


def _doses(group: Sequence[str], columns: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    return np.array([0.0, *(float(columns[name]["sparsity"]) for name in group)])


def _series_columns(described: Mapping[str, Any]) -> dict[str, Any]:
    return {column: described[column] for column in SERIES_COLUMNS}
