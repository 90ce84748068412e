"""Routing in mixtures of experts: which experts a language uses, in the dense model and after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from probes import DENSE, Readings

from ..frames import tidy
from ..stats.bootstrap import segment_interval
from ..stats.distance import total_variation
from ..stats.jackknife import jackknife_interval

#: Values resampled at a time: 64 MB for a thousand draws.
_AT_ONCE = 8192

#: Segments from which the estimates without each have two of every half.
_FEWEST = 4

_Counts = Float[np.ndarray, "segments layers experts"]
_Estimate = tuple[np.ndarray, np.ndarray, np.ndarray]


def analyze(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Return the frame ``routing``; it is empty for a model without experts.

    The router's own choices are counted, the top-k experts of every token that counts. Two readings are open at a time:
    of 48 blocks of 128 experts and 128 segments, 6 MB.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; ``"dense"`` is among the variants.
    columns
        Variant to the columns that describe it.
    ids
        Language to the ids of the segments that were read: those with one id are translations, which go into the same
        half and are left out together. Without ids, segments correspond by position.
    """
    if not next(iter(readings.values())).experts:
        return tidy("routing", [])
    rows: list[dict[str, Any]] = []
    languages = list(dict.fromkeys(language for _, language in readings))
    for variant in dict.fromkeys(variant for variant, _ in readings):
        for language in languages:
            read = readings[variant, language]
            place = {**columns[variant], "language": language, "n": len(read.routed)}
            rows.append({**place, **_shares(read)})
            if variant != DENSE:
                rows += ({**place, **own} for own in _changes(readings[DENSE, language], read))
        for language, other in combinations(sorted(languages), 2):
            place = {**columns[variant], "language": language, "other_language": other}
            both = {name: readings[variant, name] for name in (language, other)}
            names = [ids[name] if ids else range(len(own.routed)) for name, own in both.items()]
            rows.append({**place, **_distances(list(both.values()), names)})
    return tidy("routing", rows)


def _shares(read: Readings) -> dict[str, Any]:
    """Return the share of every expert in every block that has experts."""
    layers = _layers(read)
    counts = read.routed[:, layers].numpy().astype(np.float64)

    def of(counts: _Counts) -> Callable[[np.ndarray], np.ndarray]:
        def shares(weights: np.ndarray) -> np.ndarray:
            summed = _summed(weights, counts)
            return (summed / summed.sum(axis=-1, keepdims=True)).reshape(len(weights), -1)

        return shares

    parts = [segment_interval(of(part), len(counts)) for part in _in_parts(counts)]
    value, low, high = (np.concatenate(each) for each in zip(*parts, strict=True))
    experts = counts.shape[2]
    return {
        "layer": np.repeat(layers, experts),
        "expert": np.tile(np.arange(experts), len(layers)),
        "metric": ["share"] * len(value),
        "value": value,
        "low": low,
        "high": high,
    }


def _changes(dense: Readings, read: Readings) -> Iterator[dict[str, Any]]:
    """Yield how far the shares have shifted, and how many slots have another expert."""
    layers = _layers(dense)
    before, after = (one.routed[:, layers].numpy().astype(np.float64) for one in (dense, read))
    agreed = read.agreed[:, layers].numpy().astype(np.float64)

    def moved(weights: np.ndarray) -> np.ndarray:
        return _with_mean(1 - (weights @ agreed) / (weights @ after.sum(axis=2)))

    yield _by_layer("shift", _distance(before, after), layers)
    yield _by_layer("moved", segment_interval(moved, len(after)), layers)


def _distances(both: Sequence[Readings], names: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return how far the shares of two languages are apart, whose segments of one name correspond."""
    layers = _layers(both[0])
    number = {name: i for i, name in enumerate(dict.fromkeys([*names[0], *names[1]]))}
    counts = []
    for read, own in zip(both, names, strict=True):
        placed = np.zeros((len(number), len(layers), read.routed.shape[2]))
        np.add.at(placed, [number[name] for name in own], read.routed[:, layers].numpy())
        counts.append(placed)
    return {**_by_layer("language_distance", _distance(*counts), layers), "n": len(number)}


def _distance(one: _Counts, other: _Counts) -> _Estimate:
    """Estimate how far the shares in two models or languages are apart in each block, and on average.

    The two halves are every other segment. A bootstrap would draw a segment into both, and add noise that the distance
    never takes off again; so the interval is that of the jackknife.
    """
    segments = len(one)
    first = np.arange(segments) % 2 == 0

    def found(weights: Float[np.ndarray, "draws segments"]) -> Float[np.ndarray, "draws layers"]:
        halves = np.stack([weights * first, weights * ~first], axis=1)
        return _with_mean(total_variation(*(_summed(halves, counts) for counts in (one, other))))

    if segments < 2:
        nothing = np.full(one.shape[1] + 1, np.nan)
        return nothing, nothing, nothing
    value = found(np.ones((1, segments)))[0]
    if segments < _FEWEST:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    step = max(_AT_ONCE * 250 // one[0].size, 1)
    parts = np.array_split(1 - np.eye(segments), range(step, segments, step))
    return jackknife_interval(value, np.concatenate([found(part) for part in parts]))


def _with_mean(values: Float[np.ndarray, "draws layers"]) -> Float[np.ndarray, "draws all"]:
    return np.concatenate([values, values.mean(axis=-1, keepdims=True)], axis=-1)


def _by_layer(metric: str, estimate: _Estimate, layers: np.ndarray) -> dict[str, Any]:
    """Return the rows of an estimate in each block, and of their mean, which has no layer."""
    value, low, high = estimate
    known = ~np.isnan(value)
    return {
        "layer": [layer for layer, there in zip([*layers.tolist(), None], known, strict=True) if there],
        "metric": [metric] * int(known.sum()),
        "value": value[known],
        "low": low[known],
        "high": high[known],
    }


def _layers(read: Readings) -> np.ndarray:
    """Return the blocks that have experts."""
    found: np.ndarray = np.flatnonzero(read.neurons[:, :-1].numpy().any(axis=1))
    return found


def _summed(
    weights: Float[np.ndarray, "draws *halves segments"], counts: _Counts
) -> Float[np.ndarray, "draws layers *halves experts"]:
    """Return sums over segments; halves of them, where weights have a dimension of halves, come next to last."""
    found: np.ndarray = (weights @ counts.reshape(len(counts), -1)).reshape(*weights.shape[:-1], *counts.shape[1:])
    return found if weights.ndim == 2 else np.moveaxis(found, 1, -2)


def _in_parts(counts: _Counts) -> list[np.ndarray]:
    """Split counts by blocks, so that what is resampled at a time stays small."""
    step = max(_AT_ONCE // counts.shape[2], 1)
    return [counts[:, start : start + step] for start in range(0, counts.shape[1], step)]
