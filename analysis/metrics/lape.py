"""LAPE: language-specific neurons by the entropy of their firing (Tang et al., ACL 2024, 2402.16438).

All functions take what was read of all models, open one model at a time and keep only what their frame needs. Of one
model with 32 blocks of 14336 neurons in seven languages that is 103 MB of counts and as much again while it is worked
on, however many variants there are; of eight such experts a block, eight times as much.

The firing probability of an expert's neurons is a share of the tokens routed to it. Where these are too few in some
language (:data:`analysis.frames.schema.FEWEST_ROUTED`), its neurons have no LAPE and are not selected: that a language
hardly uses an expert is seen in the frame ``routing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from probes import DENSE, Readings
from probes.readers.firing import FOLDS

from ..frames import tidy
from .firing import (
    FiringCounts,
    Probabilities,
    Selection,
    entropy,
    estimated,
    firing_threshold,
    select,
    selection_size,
)

__all__ = [
    "FiringCounts",
    "Selection",
    "analyze",
    "distributions",
    "entropy",
    "neurons",
    "select",
    "selection_size",
]

#: Permutations that the selection is checked by.
PERMUTATIONS = 99
#: Neurons that a mean shift is taken over at the least.
_FEW = 5
#: Shares of a model's firing neurons at which the frame ``neuron_entropy`` gives their LAPE: finer where it is low.
_QUANTILES = np.union1d(np.linspace(0, 0.05, 101), np.linspace(0, 1, 101)).round(6)
#: Firing probabilities between which neurons are averaged, on a logarithmic scale.
_BINS = np.logspace(-3, 0, 13)


def neurons(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    *,
    layers: Iterable[int] | None = None,
    languages: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return a part of the frame ``neurons``: every neuron's firing probabilities and its LAPE.

    The whole of it would be large: at 32 blocks of 14336 neurons and seven languages a block has 115,000 rows a model,
    a model 3.7 million. The values behind it are the firing counts in the study's readings.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read.
    columns
        Variant to the columns that describe it.
    layers, languages, models
        What the rows are wanted of; all by default. LAPE is always taken over all languages that were read.
    """
    if not _were_read(readings):
        return tidy("neurons", [])
    rows: list[dict[str, Any]] = []
    for variant in _variants(readings) if models is None else models:
        counts = FiringCounts.of(readings, variant)
        wanted = np.arange(counts.fired[0].shape[1]) if layers is None else np.array(sorted(set(layers)))
        probabilities = counts.probabilities(layers=wanted.tolist())
        count = probabilities.shape[1]
        place = {
            **columns[variant],
            "layer": np.repeat(wanted, count),
            "neuron": np.tile(np.arange(count), len(wanted)),
        }
        rows += [
            _known(place, {"language": language, "metric": "firing_probability"}, probabilities[..., i])
            for i, language in enumerate(counts.languages)
            if languages is None or language in languages
        ]
        rows.append(_known(place, {"metric": "lape"}, entropy(probabilities)))
    return tidy("neurons", rows)


def analyze(
    readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames ``language_neurons`` and ``neuron_selection``; for every single neuron see
    :func:`neurons`.

    Quantiles are each model's own, so both questions are answered: does the dense set still fire in the pruned model
    (``still_firing``, at the dense model's threshold), and which neurons would be selected now (``kept, lost,
    gained``)? Both frames are empty if no neuron has a firing probability in every language. A neuron whose expert a
    pruned model no longer uses enough is neither kept nor still firing.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; ``"dense"`` is among the variants.
    columns
        Variant to the columns that describe it.
    """
    if not _were_read(readings):
        return tidy("language_neurons", []), tidy("neuron_selection", [])
    dense = FiringCounts.of(readings, DENSE).probabilities()
    if not estimated(dense).any():
        return tidy("language_neurons", []), tidy("neuron_selection", [])
    before = select(dense)
    sets, checks = [], []
    for variant in _variants(readings):
        counts = FiringCounts.of(readings, variant)
        probabilities = counts.probabilities()
        layers = np.arange(len(probabilities))
        after = before if variant == DENSE else select(probabilities)
        compared = {
            "kept": before.members & after.members,
            "lost": before.members & ~after.members,
            "gained": after.members & ~before.members,
            "still_firing": before.members & (probabilities > before.threshold),
        }
        for metric, members in compared.items():
            for i, language in enumerate(counts.languages):
                row = {**columns[variant], "language": language, "layer": layers, "metric": metric}
                sets.append({**row, "value": members[..., i].sum(axis=1).astype(np.float64)})
        checks += [{**columns[variant], **row} for row in _check(counts, probabilities, before, after)]
    return tidy("language_neurons", sets), tidy("neuron_selection", checks)


def distributions(
    readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames ``neuron_entropy`` and ``neuron_shift``: how LAPE and firing are distributed over all neurons.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; ``"dense"`` is among the variants.
    columns
        Variant to the columns that describe it.
    """
    if not _were_read(readings):
        return tidy("neuron_entropy", []), tidy("neuron_shift", [])
    dense = FiringCounts.of(readings, DENSE).probabilities()
    if not estimated(dense).any():
        return tidy("neuron_entropy", []), tidy("neuron_shift", [])
    specific = select(dense).members
    entropies, shifts = [], []
    for variant in _variants(readings):
        counts = FiringCounts.of(readings, variant)
        probabilities = counts.probabilities()
        lape = entropy(probabilities)
        lape = lape[np.isfinite(lape)]
        if len(lape):
            row = {**columns[variant], "quantile": _QUANTILES, "metric": ["lape"] * len(_QUANTILES)}
            entropies.append({**row, "value": np.quantile(lape, _QUANTILES)})
        if variant == DENSE:
            continue
        for i, language in enumerate(counts.languages):
            for metric, group in (("specific_shift", specific[..., i]), ("other_shift", ~specific[..., i])):
                middle, shift = _shift(dense[..., i][group], probabilities[..., i][group])
                row = {**columns[variant], "language": language, "metric": [metric] * len(shift)}
                shifts.append({**row, "dense_firing": middle, "value": shift})
    return tidy("neuron_entropy", entropies), tidy("neuron_shift", shifts)


def _shift(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log2 of the ratio of mean firing probabilities, in bins of the probability before, and their middles."""
    bins = np.digitize(before, _BINS) - 1
    inside = (bins >= 0) & (bins < len(_BINS) - 1) & ~np.isnan(before) & ~np.isnan(after)
    number, old, new = (
        np.bincount(bins[inside], weights, minlength=len(_BINS) - 1)
        for weights in (None, before[inside], after[inside])
    )
    there = (number >= _FEW) & (new > 0)
    return np.sqrt(_BINS[1:] * _BINS[:-1])[there], np.log2(new[there] / old[there])


def _known(place: Mapping[str, Any], row: Mapping[str, Any], values: np.ndarray) -> dict[str, Any]:
    """Return rows for the values that are known; those of columns are picked likewise."""
    known = ~np.isnan(values).ravel()
    picked = {name: own[known] if isinstance(own, np.ndarray) else own for name, own in place.items()}
    return {**picked, **row, "value": values.ravel()[known]}


def _variants(readings: Mapping[tuple[str, str], Readings]) -> list[str]:
    return list(dict.fromkeys(variant for variant, _ in readings))


def _were_read(readings: Mapping[tuple[str, str], Readings]) -> bool:
    return bool(next(iter(readings.values())).fired.numel())


def _check(
    counts: FiringCounts, probabilities: Probabilities, before: Selection, after: Selection
) -> Iterator[dict[str, Any]]:
    """Yield rows on how far one model's selection can be trusted."""
    chosen = after.members.any(axis=-1)
    highest = float(entropy(probabilities)[chosen].max()) if chosen.any() else 0.0
    whole = {"selected": float(chosen.sum()), "threshold": after.threshold, "highest_lape": highest}
    whole |= _selected_by_chance(counts, highest)
    for metric, value in whole.items():
        yield {"metric": metric, "value": value}
    halves = [select(counts.probabilities(range(which, FOLDS, 2))).members for which in (0, 1)]
    total = int(estimated(probabilities).sum())
    for i, language in enumerate(counts.languages):
        dense, now = before.members[..., i], after.members[..., i]
        one, other = halves[0][..., i], halves[1][..., i]
        shares: dict[str, tuple[float, float]] = {
            "specific": (float(now.sum()), 1),
            "kept_share": (float((dense & now).sum()), float(dense.sum())),
            "kept_by_chance": (float(now.sum()), total),
            "other_half_share": (2 * float((one & other).sum()), float(one.sum() + other.sum())),
        }
        for metric, (part, of) in shares.items():
            if of:
                yield {"language": language, "metric": metric, "value": part / of}


def _selected_by_chance(counts: FiringCounts, highest: float) -> dict[str, float]:
    """Return how many neurons reach a selection's entropy if text is dealt to languages at random, with a p-value.

    The folds of all languages are permuted among the languages: whatever the text says, and however much of it there
    is, stays the same; only the language no longer goes with it.
    """
    owner, fold = np.nonzero(counts.tokens.any(axis=-1))
    fired = np.stack([counts.fired[i][f].ravel() for i, f in zip(owner, fold, strict=True)], dtype=np.float32)
    routed = counts.tokens[owner, fold].astype(np.float32)  # of each block
    group = np.repeat(np.arange(routed.shape[1]), fired.shape[1] // routed.shape[1])
    if counts.owner is not None:  # tokens that reached each expert of each block, and the one that a neuron belongs to
        known = estimated(counts.probabilities()).ravel()
        routed = np.stack([counts.routed[i][f].ravel() for i, f in zip(owner, fold, strict=True)], dtype=np.float32)
        places = counts.owner + counts.routed[0].shape[2] * np.arange(len(counts.owner))[:, None]
        fired, group = fired[:, known], places.ravel()[known]
    samples = [np.flatnonzero(owner == i).astype(np.float64) for i in range(len(counts.languages))]

    def reached(*dealt: np.ndarray) -> float:
        weights = np.zeros((len(dealt), len(fired)), dtype=np.float32)
        for language, chosen in enumerate(dealt):
            weights[language, chosen.astype(np.int64)] = 1
        probabilities = (weights @ fired) / np.maximum(weights @ routed, 1)[:, group]
        able = probabilities[:, (probabilities > firing_threshold(probabilities)).any(axis=0)]
        return float((entropy(able.T) <= highest).sum())

    if min(map(len, samples)) < 2:  # nothing to permute
        return {}
    test = permutation_test(
        samples,
        reached,
        permutation_type="independent",
        n_resamples=PERMUTATIONS,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return {"selected_by_chance": float(test.null_distribution.mean()), "p_value": float(test.pvalue)}
