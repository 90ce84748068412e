"""Contrasts: does the choice of calibration text matter?

Two calibration sets are compared by segment and over the seeds that both have. A second draw of the same text changes
the model too: that is measured on all sets with several seeds, and a difference has to exceed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import false_discovery_control

from probes import DENSE, Readings
from probes.readers.signal import SIGNAL_SITES

from ..frames import RECIPE_COLUMNS, alike, labels, tidy
from ..stats.bootstrap import mean_interval
from ..stats.permutation import exchanged_models, pairings, sign_flips
from ..stats.seeds import seed_margin, spread_between_draws
from .lsar import LSAR, norms_by_layer

#: The other set of a comparison with all other single languages at once.
OTHERS = "others"
#: The calibration set of whatever language is evaluated.
OWN = "own"
#: Corrected p-value below which a difference is significant.
SIGNIFICANT = 0.05
#: Models that must be there for an exact test to say anything.
_FEWEST = 4

#: Score of every segment, so made that differences of means are differences of the metric: ``{metric: [segments]}``.
Scores = dict[str, Float[np.ndarray, " segments"]]


def analyze(
    readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]], subspaces: Sequence[LSAR]
) -> pd.DataFrame:
    """Return the frame ``contrasts``: every pair of calibration sets of a recipe, in every language.

    A row compares ``calibration`` with ``other_calibration``: ``value`` is the mean paired difference over segments
    (and over the seeds that both sets have), ``low`` and ``high`` its bootstrap interval over segments.

    ``seed_margin`` is what 95 % of the differences between two draws of one and the same set stay below: 1.96 times
    their root mean square over all sets with several seeds and all languages, over the root of the number of seeds
    that were averaged. ``p_value`` is that of a two-sided permutation test (sign flips of segments) of the part of the
    difference that goes beyond this margin. Without a second seed there is no margin (nan), and the test is one of
    these two models, not of two languages. ``p_adjusted`` corrects for all comparisons of a recipe and metric
    (Benjamini & Hochberg).

    Rows with ``other_calibration`` = ``"others"`` compare the set of the evaluated language itself with all other
    single-language sets at once. Here whole models are permuted, seeds and all, so no margin is needed; the test is
    exact, but few models leave it little to choose from: with one seed of each of K sets no p is below 1/K. The row
    ``calibration`` = ``"own"`` without a language takes all languages together: there it is permuted which set belongs
    to which language, in K! ways, and ``value`` is the mean over languages.

    Readings are opened one variant and language at a time, beside the dense model's in that language; what is kept of
    them is four numbers a segment.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read.
    columns
        Variant to the columns that describe it.
    subspaces
        One a layer (:func:`analysis.metrics.lsar.fit_layers`).
    """
    languages = list(dict.fromkeys(language for _, language in readings))
    rows: list[dict[str, Any]] = []
    for variants in alike({name: columns[name] for name, _ in readings if name != DENSE}):
        sets: dict[str, dict[int, str]] = {}
        for variant in variants:
            sets.setdefault(str(columns[variant]["calibration"]), {})[int(columns[variant]["seed"])] = variant
        if len(sets) < 2:
            continue
        ordered = sorted(sets, key=labels.calibration_rank)
        scores = {}
        for language in languages:
            dense = readings[DENSE, language]
            for variant in variants:
                scores[variant, language] = _scores(dense, readings[variant, language], subspaces)
        shared = {name: columns[variants[0]][name] for name in RECIPE_COLUMNS}
        for metric in next(iter(scores.values())):
            values = {place: of[metric] for place, of in scores.items()}
            compared = [
                *_corrected(_pairs(values, languages, ordered, sets)),
                *_all_languages(values, languages, sets),
                *_corrected(_own_against_others(values, languages, sets)),
            ]
            rows += [{**shared, **row, "metric": metric} for row in compared]
    return tidy("contrasts", rows)


def _corrected(family: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their p-values corrected for all comparisons of the family."""
    family = list(family)
    if not family:
        return []
    adjusted = false_discovery_control([row["p_value"] for row in family])
    return [{**row, "p_adjusted": float(p)} for row, p in zip(family, adjusted, strict=True)]


def _scores(dense: Readings, pruned: Readings, subspaces: Sequence[LSAR]) -> Scores:
    tiny = np.finfo(np.float64).tiny
    residual = SIGNAL_SITES.index("residual")
    nll, predicted = pruned.nll.numpy(), pruned.predicted.numpy()
    power, error = (sums[:, -1, residual].numpy() for sums in (pruned.power, pruned.error))
    norms = np.stack(norms_by_layer(subspaces, dense, pruned))  # [layers, 6, segments]
    parts = 10 * np.log10(np.maximum(norms[:, :2], tiny) / np.maximum(norms[:, 4:6].mean(axis=2, keepdims=True), tiny))
    specific, agnostic = parts.mean(axis=0)
    return {
        "log_perplexity": nll * (len(nll) / predicted.sum()),
        "snr_db": 10 * np.log10(power / np.maximum(error, tiny)),
        "specific_error_db": specific,
        "agnostic_error_db": agnostic,
    }


def _pairs(
    values: Mapping[tuple[str, str], np.ndarray],
    languages: Sequence[str],
    ordered: Sequence[str],
    sets: Mapping[str, Mapping[int, str]],
) -> Iterator[dict[str, Any]]:
    spread = spread_between_draws(
        [values[variant, language] for variant in members.values()]
        for members in sets.values()
        for language in languages
    )
    chosen = [(a, b, sorted(set(sets[a]) & set(sets[b]))) for a, b in combinations(ordered, 2)]
    chosen = [(a, b, seeds) for a, b, seeds in chosen if seeds]
    for language in languages:
        if not chosen:
            return
        differences = np.stack(
            [
                np.mean([values[sets[a][s], language] - values[sets[b][s], language] for s in seeds], axis=0)
                for a, b, seeds in chosen
            ],
            axis=1,
        )
        margins = np.array([seed_margin(spread, len(seeds)) for _, _, seeds in chosen])
        value, low, high = mean_interval(differences)
        p_values = sign_flips(differences, np.nan_to_num(margins))
        for i, (a, b, seeds) in enumerate(chosen):
            yield {
                "calibration": a,
                "seed": seeds[0] if len(seeds) == 1 else None,
                "language": language,
                "other_calibration": b,
                "value": value[i],
                "low": low[i],
                "high": high[i],
                "n": len(differences),
                "seed_margin": margins[i],
                "p_value": p_values[i],
            }


def _own_against_others(
    values: Mapping[tuple[str, str], np.ndarray], languages: Sequence[str], sets: Mapping[str, Mapping[int, str]]
) -> Iterator[dict[str, Any]]:
    for language in languages:
        others = [
            v for name, members in sets.items() if name in languages and name != language for v in members.values()
        ]
        own = list(sets.get(language, {}).values())
        if not own or len(own) + len(others) < _FEWEST:
            continue
        mine, theirs = (np.stack([values[v, language] for v in group], axis=1) for group in (own, others))
        difference = mine.mean(axis=1) - theirs.mean(axis=1)
        value, low, high = mean_interval(difference[:, None])
        yield {
            "calibration": language,
            "language": language,
            "other_calibration": OTHERS,
            "value": value[0],
            "low": low[0],
            "high": high[0],
            "n": len(difference),
            "p_value": exchanged_models(mine.mean(axis=0), theirs.mean(axis=0)),
        }


def _all_languages(
    values: Mapping[tuple[str, str], np.ndarray], languages: Sequence[str], sets: Mapping[str, Mapping[int, str]]
) -> Iterator[dict[str, Any]]:
    """Yield the row on all languages that have a set of their own: own against others."""
    chosen = [language for language in languages if language in sets]
    if len(chosen) < _FEWEST:
        return
    scores = {
        (name, language): np.mean([values[variant, language] for variant in sets[name].values()], axis=0)
        for name in chosen
        for language in chosen
    }
    means = np.array([[scores[name, language].mean() for language in chosen] for name in chosen])
    shortest = min(len(scores[language, language]) for language in chosen)
    differences = np.mean(
        [
            (scores[lang, lang] - np.mean([scores[name, lang] for name in chosen if name != lang], axis=0))[:shortest]
            for lang in chosen
        ],
        axis=0,
    )
    value, low, high = mean_interval(differences[:, None])
    p_value = pairings(means)
    estimate = {"value": value[0], "low": low[0], "high": high[0], "n": shortest}
    yield {"calibration": OWN, "other_calibration": OTHERS, **estimate, "p_value": p_value, "p_adjusted": p_value}
