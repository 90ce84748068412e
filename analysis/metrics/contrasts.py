"""Contrasts: does the choice of calibration text matter?

A second draw of the same calibration text changes a model too. So two sets differ only if they differ by more than
draws of one set do, and with one draw of each nothing is called a difference.
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
from pruning.text.calibration import Drawn, shared_text

from ..frames import RECIPE_COLUMNS, alike, labels, tidy
from ..stats.crossed import crossed_contrast
from ..stats.permutation import interactions, pairings
from .lsar import LSAR, norms_by_layer

#: The other set of a comparison with all other single languages at once.
OTHERS = "others"
#: The calibration set of whatever language is evaluated.
OWN = "own"
#: Corrected p-value below which a difference is significant.
SIGNIFICANT = 0.05
#: Sets that must be there for a permutation of them to say anything.
FEWEST_SETS = 4

_TINY = np.finfo(np.float64).tiny

#: Score of every segment, so made that differences of means are differences of the metric: ``{metric: [segments]}``.
Scores = dict[str, Float[np.ndarray, " segments"]]


def analyze(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    subspaces: Sequence[LSAR],
    text: Mapping[str, Sequence[Drawn]] | None = None,
    ids: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Return the frame ``contrasts``: every pair of calibration sets of a recipe, in every language.

    A row compares ``calibration`` with ``other_calibration``: ``value`` is the difference of their means over segments
    and draws, and ``low``, ``high`` and ``p_value`` hold over both: another draw of the same calibration text changes a
    model too (:func:`analysis.stats.crossed.crossed_contrast`; t-test with ``df`` degrees of freedom). ``draws`` is the
    smaller number of seeds. Where no set of a recipe has a second seed there is nothing to tell sets from draws by:
    interval and p-value are empty (nan). ``p_adjusted`` corrects for all comparisons of a recipe and metric (Benjamini
    & Hochberg).

    Rows with ``other_calibration`` = ``"others"`` compare the set of the evaluated language itself with all other
    single-language sets at once. A set that is better in every language is not better in its own, so they are
    interactions: ``value`` is what the own set gains in its language over the other sets, minus what it gains over them
    in the other languages. The p-value permutes whole sets, draws and all, so with K sets none is below 1/K. The row
    ``calibration`` = ``"own"`` without a language takes all languages together; ``value`` is the mean over languages of
    own minus others, in which what sets gain everywhere cancels, and it is permuted which set belongs to which
    language, in K! ways.

    Readings are opened one variant and language at a time, beside the dense model's in that language; what is kept of
    them is five numbers a segment.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read.
    columns
        Variant to the columns that describe it.
    subspaces
        One a layer (:func:`analysis.metrics.lsar.fit_layers`).
    text
        Variant to the calibration text that it was made with, as far as it is known.
    ids
        Language to the ids of the segments that were read. Those with one id are translations of each other and vary
        together; without ids, languages are taken to be independent.
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
        shared = {name: columns[variants[0]][name] for name in (*RECIPE_COLUMNS, "bits")}
        alike_draws = {
            name: _share_of_draws([(text or {}).get(one) for one in of.values()]) for name, of in sets.items()
        }
        for metric in next(iter(scores.values())):
            values = {place: of[metric] for place, of in scores.items()}
            compared = [
                *_corrected(_pairs(values, languages, ordered, sets)),
                *_own_against_others(values, languages, sets, ids),
            ]
            rows += [
                {**shared, **row, "shared_text": _of_sets(row, alike_draws, languages), "metric": metric}
                for row in compared
            ]
    return tidy("contrasts", rows)


def _corrected(family: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with their p-values corrected for all comparisons of the family."""
    family = list(family)
    if not family:
        return []
    p_values = np.array([row["p_value"] for row in family])
    adjusted, tested = np.full(len(family), np.nan), np.isfinite(p_values)
    if tested.any():
        adjusted[tested] = false_discovery_control(p_values[tested])
    return [{**row, "p_adjusted": float(p)} for row, p in zip(family, adjusted, strict=True)]


def text_scores(pruned: Readings) -> Scores:
    """Return the scores of every segment that need no subspaces."""
    residual = SIGNAL_SITES.index("residual")
    nll, predicted = pruned.nll.numpy(), pruned.predicted.numpy()
    power, error = (sums[:, -1, residual].numpy() for sums in (pruned.power, pruned.error))
    return {
        "log_perplexity": nll * (len(nll) / predicted.sum()),
        "snr_db": 10 * np.log10(power / np.maximum(error, _TINY)),
    }


def _scores(dense: Readings, pruned: Readings, subspaces: Sequence[LSAR]) -> Scores:
    norms = np.stack(norms_by_layer(subspaces, dense, pruned))  # [layers, 6, segments]
    parts = 10 * np.log10(
        np.maximum(norms[:, :2], _TINY) / np.maximum(norms[:, 4:6].mean(axis=2, keepdims=True), _TINY)
    )
    specific, agnostic = parts.mean(axis=0)
    return {
        **text_scores(pruned),
        "specific_error_db": specific,
        "agnostic_error_db": agnostic,
        "specific_minus_agnostic_db": specific - agnostic,
    }


def _pairs(
    values: Mapping[tuple[str, str], np.ndarray],
    languages: Sequence[str],
    ordered: Sequence[str],
    sets: Mapping[str, Mapping[int, str]],
) -> Iterator[dict[str, Any]]:
    for language in languages:
        scores = [[_drawn(values, sets[name], language)] for name in ordered]
        for (i, one), (k, other) in combinations(enumerate(ordered), 2):
            weights = np.zeros(len(ordered))
            weights[[i, k]] = 1, -1
            yield {
                "calibration": one,
                "seed": _only(sets[one]) if _only(sets[one]) == _only(sets[other]) else None,
                "language": language,
                "other_calibration": other,
                "draws": min(len(sets[one]), len(sets[other])),
                "n": scores[i][0].shape[1],
                **crossed_contrast(scores, weights, np.ones(1))._asdict(),
            }


def _own_against_others(
    values: Mapping[tuple[str, str], np.ndarray],
    languages: Sequence[str],
    sets: Mapping[str, Mapping[int, str]],
    ids: Mapping[str, Sequence[str]] | None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every language that has a set of its own, and one for all of them."""
    chosen = [language for language in languages if language in sets]
    if len(chosen) < FEWEST_SETS:
        return
    scores = [[_drawn(values, sets[name], language) for language in chosen] for name in chosen]
    means = np.array([[score.mean() for score in own] for own in scores])
    draws = min(len(sets[name]) for name in chosen)
    repeated = any(len(sets[name]) > 1 for name in chosen)  # otherwise nothing tells what another draw would change
    alone = np.eye(len(chosen))
    against = alone - (1 - alone) / (len(chosen) - 1)  # in row i: 1 for i, and -1 shared out among the others
    p_values = interactions(means)
    translated = [ids[language] for language in chosen] if ids else None
    yield from _corrected(
        {
            "calibration": language,
            "language": language,
            "other_calibration": OTHERS,
            "draws": draws,
            "n": scores[i][i].shape[1],
            **crossed_contrast(scores, against[i], against[i], translated)._asdict(),
            "p_value": p_values[i] if repeated else np.nan,
        }
        for i, language in enumerate(chosen)
    )
    p_value = pairings(means) if repeated else np.nan
    yield {
        "calibration": OWN,
        "other_calibration": OTHERS,
        "draws": draws,
        "n": min(scores[i][i].shape[1] for i in range(len(chosen))),
        **crossed_contrast(scores, np.full(len(chosen), 1 / len(chosen)), against, translated)._asdict(),
        "p_value": p_value,
        "p_adjusted": p_value,
    }


def _share_of_draws(drawn: Sequence[Sequence[Drawn] | None]) -> float:
    """Return the largest share of their text that two draws of a set have in common: 0 of a single draw.

    Unknown text of a draw makes it unknown (nan).
    """
    shares = [shared_text(one, other) if one and other else np.nan for one, other in combinations(drawn, 2)]
    return float(np.max(shares, initial=0))


def _of_sets(row: Mapping[str, Any], shares: Mapping[str, float], languages: Sequence[str]) -> float:
    """Return the largest share of the sets that a row compares, nan if it is unknown of one."""
    pair = row["calibration"], row["other_calibration"]
    compared = pair if OTHERS not in pair else [name for name in languages if name in shares]
    return float(np.max([shares[name] for name in compared]))


def _drawn(
    values: Mapping[tuple[str, str], np.ndarray], members: Mapping[int, str], language: str
) -> Float[np.ndarray, "draws segments"]:
    return np.stack([values[variant, language] for variant in members.values()])


def _only(members: Mapping[int, str]) -> int | None:
    """Return the seed of a set that was drawn once."""
    return next(iter(members)) if len(members) == 1 else None
