"""The lens on items: after which block the right choice of a minimal pair overtakes the wrong one.

Of each item the first token at which its choices differ is compared, after every block. The two margins of a minimal
pair are averaged, so that a preference for one of its choices cancels; an item without a twin stands for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from probes import DENSE, Item
from probes.lens import LENSES
from probes.lens_margins import LensMargins

from ..frames import tidy
from ..stats.intervals import share_difference_interval, share_interval, unit_interval

_OfItems = Float[np.ndarray, "items layers"]
_Margins = Float[np.ndarray, "pairs layers"]


def analyze(
    margins: Mapping[tuple[str, str], LensMargins],
    items: Mapping[str, Sequence[Item]],
    columns: Mapping[str, Mapping[str, Any]],
    task: str,
) -> pd.DataFrame:
    """Return the frame ``lens_margins``; it is empty without margins.

    Parameters
    ----------
    margins
        ``(model, language)`` to the margins after each block; the dense model is ``"dense"``.
    items
        Language to the items, in the order in which they were asked.
    columns
        Model to the columns that describe it.
    task
        Name of the items.
    """
    rows: list[dict[str, Any]] = []
    for (model, language), read in margins.items():
        dense = None if model == DENSE else margins[DENSE, language]
        asked = items[language]
        for category in dict.fromkeys(item.category for item in asked):
            place = {**columns[model], "language": language, "task": task, "category": category}
            of_category = [i for i, item in enumerate(asked) if item.category == category]
            for number, lens in enumerate(LENSES[: len(read.values)]):
                own, before = (
                    None if one is None else one.values[number].numpy().T[of_category] for one in (read, dense)
                )
                assert own is not None
                found = _of_pairs(own, before, [asked[i] for i in of_category], read.layers.numpy())
                rows += ({**place, "lens": lens, **estimate} for estimate in found)
    return tidy("lens_margins", rows)


def _of_pairs(
    own: _OfItems, before: _OfItems | None, items: Sequence[Item], layers: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one cell and lens, given the dense model's margins for a variant."""
    twin, names = pd.factorize(np.array([item.twin for item in items]))
    first = np.unique(twin, return_index=True)[1]
    unit = pd.factorize(np.array([items[i].template for i in first]))[0]
    margin = _mean_of(own, twin, len(names))
    known = ~np.isnan(margin).any(axis=1)
    if not known.any():
        return
    unit, margin = pd.factorize(unit[known])[0], margin[known]
    ahead = ahead_for_good(margin)
    by_layer = {"margin": margin}
    place = {"layer": layers, "n": len(margin)}
    yield _with({**place, "metric": ["ahead"] * len(layers)}, [share_interval(*_counted(own, unit)) for own in ahead.T])
    right, overtaken = ahead[:, -1], layers[ahead.argmax(axis=1)].astype(np.float64)
    once = {"overtaking": (overtaken, right)}
    if before is not None:
        dense = _mean_of(before, twin, len(names))[known]
        ahead_before = ahead_for_good(dense)
        by_layer["margin_change"] = margin - dense
        gained, lost = (ahead & ~ahead_before).T, (ahead_before & ~ahead).T
        changes = [
            share_difference_interval(_counted(more, unit)[0], *_counted(less, unit))
            for more, less in zip(gained, lost, strict=True)
        ]
        yield _with({**place, "metric": ["ahead_change"] * len(layers)}, changes)
        change = overtaken - layers[ahead_before.argmax(axis=1)]
        once["overtaking_change"] = (change, right & ahead_before[:, -1])
    for metric, values in by_layer.items():
        yield _row(metric, values, unit, layers)
    for metric, (value, there) in once.items():
        if there.any():
            yield _row(metric, value[there][:, None], pd.factorize(unit[there])[0], None)


def ahead_for_good(margin: _Margins) -> Bool[np.ndarray, "pairs layers"]:
    """Return after which blocks the right choice is ahead, and stays so after all later ones.

    >>> ahead_for_good(np.array([[1.0, -1.0, 2.0, 3.0], [1.0, 1.0, 1.0, -1.0]])).tolist()
    [[False, False, True, True], [False, False, False, False]]
    """
    found: np.ndarray = np.logical_and.accumulate(margin[:, ::-1] > 0, axis=1)[:, ::-1]
    return found


def _mean_of(values: _OfItems, twin: np.ndarray, pairs: int) -> _Margins:
    """Return the mean over the items of each pair; NaN if one of them has no value."""
    sums = np.zeros((pairs, values.shape[1]))
    np.add.at(sums, twin, values)
    return sums / np.bincount(twin, minlength=pairs)[:, None]


def _counted(which: Bool[np.ndarray, " pairs"], unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many pairs of each template are so, and how many there are."""
    return np.bincount(unit, which.astype(np.float64)), np.bincount(unit).astype(np.float64)


def _with(place: Mapping[str, Any], estimates: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Return a row for each estimate."""
    return {**place, **dict(zip(("value", "low", "high"), np.transpose(estimates), strict=True))}


def _row(metric: str, values: np.ndarray, unit: np.ndarray, layers: np.ndarray | None) -> dict[str, Any]:
    """Return the mean over pairs after each block, or of one number, with its interval over templates."""
    units = int(unit.max()) + 1
    sums, count = np.zeros((units, values.shape[1])), np.bincount(unit, minlength=units).astype(np.float64)
    np.add.at(sums, unit, values)

    def mean(weights: np.ndarray) -> np.ndarray:
        found: np.ndarray = (weights @ sums) / (weights @ count)[..., None]
        return found

    value, low, high = unit_interval(mean, units)
    place = {} if layers is None else {"layer": layers}
    return {**place, "metric": [metric] * len(value), "value": value, "low": low, "high": high, "n": len(values)}
