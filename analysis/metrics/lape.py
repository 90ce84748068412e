"""LAPE: language-specific neurons by the entropy of their firing (Tang et al., ACL 2024, 2402.16438).

:func:`plot` draws the frame ``language_neurons``, :func:`plot_kept` ``neuron_selection``, :func:`plot_entropy` and
:func:`plot_shift` ``neurons``; each takes the recipe whose variants it shows, and a width in inches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from scipy.stats import permutation_test

from probes import DENSE, Readings
from probes.readers.firing import FOLDS, fold_of

from ..frames import tidy

Probabilities = Float[np.ndarray, "layers neurons languages"]

#: A neuron counts for a language if it fires more often than this share of all neurons do in all languages.
THRESHOLD_QUANTILE = 0.95
#: Share of all neurons that are selected.
SELECTED_SHARE = 0.01
#: Permutations that the selection is checked by.
PERMUTATIONS = 99


@dataclass(frozen=True)
class FiringCounts:
    """How often the neurons of one model fired, in each language and each fold of its text.

    Attributes
    ----------
    languages
        In the order in which they were read.
    fired
        Tokens on which each neuron fired, one ``[folds, layers, neurons]`` a language: those that were read, no copies.
    tokens
        Tokens that were counted, ``[languages, folds]``.
    """

    languages: tuple[str, ...]
    fired: tuple[np.ndarray, ...]
    tokens: Int64[np.ndarray, "languages folds"]

    @classmethod
    def of(cls, readings: Mapping[tuple[str, str], Readings], variant: str) -> FiringCounts:
        """Take the counts of one model from what was read of all."""
        languages = tuple(dict.fromkeys(language for _, language in readings))
        fired, tokens = [], np.zeros((len(languages), FOLDS), dtype=np.int64)
        for own, language in zip(tokens, languages, strict=True):
            read = readings[variant, language]
            fired.append(read.fired.numpy())
            np.add.at(own, fold_of(torch.arange(len(read.tokens))).numpy(), read.tokens.numpy())
        return cls(languages, tuple(fired), tokens)

    def probabilities(self, folds: Sequence[int] = range(FOLDS)) -> Probabilities:
        """Return the share of tokens on which each neuron fires, by language, on some folds of the text."""
        chosen = list(folds)
        shares = [
            fired[chosen].sum(axis=0) / tokens[chosen].sum()
            for fired, tokens in zip(self.fired, self.tokens, strict=True)
        ]
        return np.stack(shares, axis=-1)


@dataclass(frozen=True)
class Selection:
    """Language-specific neurons of one model.

    Attributes
    ----------
    members
        Whether a neuron is specific to a language, ``[layers, neurons, languages]``.
    threshold
        Firing probability above which a neuron counts for a language.
    """

    members: Bool[np.ndarray, "layers neurons languages"]
    threshold: float


def entropy(probabilities: Float[np.ndarray, "*neurons languages"]) -> Float[np.ndarray, "*neurons"]:
    """Return LAPE: the entropy in nats of each neuron's firing probabilities, normalised over languages.

    A neuron that never fires has no distribution; its entropy is +inf, so that it is never taken for specific.

    Examples
    --------
    >>> entropy(np.array([[[0.3, 0.0], [0.2, 0.2], [0.0, 0.0]]])).round(3).tolist()
    [[0.0, 0.693, inf]]
    """
    ordered = np.sort(probabilities, axis=-1)  # the order of the languages cannot change a bit of the sums
    total = ordered.sum(axis=-1)
    share = ordered / np.where(total > 0, total, 1)[..., None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total > 0, np.maximum(-(share * logs).sum(axis=-1), 0.0), np.inf)


def select(
    probabilities: Probabilities,
    *,
    threshold_quantile: float = THRESHOLD_QUANTILE,
    selected_share: float = SELECTED_SHARE,
) -> Selection:
    """Select a model's language-specific neurons by the published rule.

    The threshold is the k-th smallest of all probabilities, k = round(quantile · their number). Of all neurons,
    round(share · their number) with the lowest entropy are selected, those left out that exceed the threshold in
    no language; ties go by position. Each belongs to every language in which it exceeds the threshold.
    """
    threshold = _threshold(probabilities, threshold_quantile)
    above = probabilities > threshold
    scores = np.where(above.any(axis=-1), entropy(probabilities), np.inf).ravel()
    wanted = np.argsort(scores, kind="stable")[: selection_size(scores.size, selected_share)]
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[wanted[np.isfinite(scores[wanted])]] = True
    return Selection(above & chosen.reshape(above.shape[:2])[..., None], threshold)


def _threshold(probabilities: np.ndarray, quantile: float = THRESHOLD_QUANTILE) -> float:
    k = max(round(quantile * probabilities.size), 1) - 1
    return float(np.partition(probabilities.ravel(), k)[k])


def selection_size(neurons: int, selected_share: float = SELECTED_SHARE) -> int:
    """Return how many neurons are selected of a model with `neurons` in all.

    >>> selection_size(32 * 11008), selection_size(80 * 28672)  # LLaMA-2 7B and 70B
    (3523, 22938)
    """
    return round(selected_share * neurons)


def neurons(
    readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]
) -> Iterator[pd.DataFrame]:
    """Yield the frame ``neurons``, one model at a time: of a large model there are millions of rows.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read.
    columns
        Variant to the columns that describe it.
    """
    if not _were_read(readings):
        yield tidy("neurons", [])
        return
    for variant in dict.fromkeys(variant for variant, _ in readings):
        counts = FiringCounts.of(readings, variant)
        probabilities = counts.probabilities()
        layers, count, _ = probabilities.shape
        place = {
            **columns[variant],
            "layer": np.repeat(np.arange(layers), count),
            "neuron": np.tile(np.arange(count), layers),
        }
        rows: list[dict[str, Any]] = [
            {
                **place,
                "language": language,
                "metric": "firing_probability",
                "value": probabilities[..., i].ravel(),
            }
            for i, language in enumerate(counts.languages)
        ]
        yield tidy("neurons", [*rows, {**place, "metric": "lape", "value": entropy(probabilities).ravel()}])


def analyze(
    readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frames ``language_neurons`` and ``neuron_selection``; for every single neuron see :func:`neurons`.

    Quantiles are each model's own, so both questions are answered: does the dense set still fire in the pruned model
    (``still_firing``, at the dense model's threshold), and which neurons would be selected now (``kept, lost,
    gained``)? Both frames are empty for a mixture of experts, whose neurons are not read.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; ``"dense"`` is among the variants.
    columns
        Variant to the columns that describe it.
    """
    if not _were_read(readings):
        return tidy("language_neurons", []), tidy("neuron_selection", [])
    before = select(FiringCounts.of(readings, DENSE).probabilities())
    sets, checks = [], []
    for variant in dict.fromkeys(variant for variant, _ in readings):
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
    total = chosen.size
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
    owner, fold = np.nonzero(counts.tokens)
    fired = np.stack([counts.fired[i][f].ravel() for i, f in zip(owner, fold, strict=True)]).astype(np.float32)
    read = counts.tokens[owner, fold].astype(np.float32)
    samples = [np.flatnonzero(owner == i).astype(np.float64) for i in range(len(counts.languages))]

    def reached(*dealt: np.ndarray) -> float:
        weights = np.zeros((len(dealt), len(read)), dtype=np.float32)
        for language, chosen in enumerate(dealt):
            weights[language, chosen.astype(np.int64)] = 1
        probabilities = (weights @ fired) / (weights @ read)[:, None]
        able = probabilities[:, (probabilities > _threshold(probabilities)).any(axis=0)]
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
