"""LSAR: language-specific against language-agnostic subspaces (Xie et al., EMNLP 2022, 2401.05792)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from probes import DENSE, Readings

from ..frames import tidy
from ..stats.bootstrap import mean_interval, segment_interval


class LSAR(TransformerMixin, BaseEstimator):
    """The subspace in which a layer's language means differ, and the projection that removes it.

    The means are centred over languages; the first `rank` left singular vectors of the thin SVD span the
    language-specific subspace. This spans the same space as the paper's two-step form.

    Parameters
    ----------
    rank
        Dimensions of the subspace; one less than there are languages by default (the centred means have no more).

    Attributes
    ----------
    basis_
        Orthonormal columns, ``[hidden, rank]``.
    mean_
        μ: the part of the mean over languages outside the subspace, common to all, ``[hidden]``.
    centre_
        The whole mean over languages, ``[hidden]``.
    explained_shares_
        Share of the between-language variance inside the subspace if it had 1, 2, ... dimensions, ``[languages − 1]``.

    Examples
    --------
    >>> means = np.eye(3, 5)  # three languages, each with a direction of its own
    >>> lsar = LSAR().fit(means)
    >>> lsar.basis_.shape, bool(np.allclose(lsar.transform(means), means.mean(axis=0)))
    ((5, 2), True)
    """

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank

    def fit(self, X: Float[np.ndarray, "languages hidden"], y: None = None) -> LSAR:
        """Find the subspace from one mean embedding a language.

        Raises
        ------
        ValueError
            If `rank` is not between 1 and the number of languages less one.
        """
        languages = X.shape[0]
        rank = languages - 1 if self.rank is None else self.rank
        if not 1 <= rank <= languages - 1:
            raise ValueError(f"rank {rank} is not between 1 and {languages - 1}, the number of languages less one")
        means = X.astype(np.float64)
        mean = means.mean(axis=0)
        left, singular, _ = np.linalg.svd((means - mean).T, full_matrices=False)
        self.basis_ = left[:, :rank]
        self.centre_ = mean
        self.mean_ = mean - self.basis_ @ (self.basis_.T @ mean)
        variance = singular**2
        total = float(variance.sum())
        self.explained_shares_ = (variance.cumsum() / total if total else np.ones(languages))[: languages - 1]
        return self

    def specific(self, X: Float[np.ndarray, "segments hidden"]) -> Float[np.ndarray, "segments rank"]:
        """Return the language-specific part, in coordinates of the basis (lengths are those of the full vectors)."""
        return X @ self.basis_

    def transform(self, X: Float[np.ndarray, "segments hidden"]) -> Float[np.ndarray, "segments hidden"]:
        """Return the language-agnostic part: `X` without its projection on the subspace."""
        return X - (X @ self.basis_) @ self.basis_.T


def fit_layers(pooled: Mapping[str, Tensor], rank: int | None = None) -> list[LSAR]:
    """Fit one subspace a layer on the dense model.

    Parameters
    ----------
    pooled
        Language to the mean hidden states of segments of the fitting text, ``[segments, layers, hidden]``.
    rank
        Of the subspaces.
    """
    means = np.stack([states.double().mean(dim=0).numpy() for states in pooled.values()])
    return [LSAR(rank).fit(means[:, layer]) for layer in range(means.shape[1])]


_METRICS = (
    "specific_error",
    "agnostic_error",
    "specific_error_centred",
    "agnostic_error_centred",
    "specific_error_per_dimension",
    "agnostic_error_per_dimension",
    "specific_snr_db",
    "agnostic_snr_db",
)
#: How well translations are found without the specific part, and with it; see :func:`_retrieved`.
RETRIEVAL_METRICS = ("agnostic_retrieval", "whole_retrieval")
#: Segments that all languages need to share for sentence retrieval to say anything.
_ENOUGH = 4


def analyze(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    subspaces: list[LSAR],
    ids: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Return the frame ``subspaces``: error of the specific and of the agnostic part, and what the latter encodes.

    One layer of one model is looked at at a time: at a hidden size of 4096, 128 segments and seven languages that is
    15 MB of states, and about eight times as much while they are worked on, however many variants and blocks there are.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read of the evaluation text.
    columns
        Variant to the columns that describe it.
    subspaces
        One a layer, fitted on the dense model and on other text (:func:`fit_layers`): fitted on each model anew they
        would mix rotation with loss.
    ids
        Language to the ids of the segments that were read; segments with one id are translations of each other.
        Without them there is no sentence retrieval.
    """
    layers = np.arange(len(subspaces))
    rank = subspaces[0].basis_.shape[1]
    rows: list[dict[str, Any]] = [
        {
            **columns[DENSE],
            "layer": layers,
            "rank": each,
            "metric": ["explained_share"] * len(layers),
            "value": [float(subspace.explained_shares_[each - 1]) for subspace in subspaces],
        }
        for each in range(1, len(subspaces[0].explained_shares_) + 1)
    ]
    languages = list(dict.fromkeys(language for _, language in readings))
    for variant in dict.fromkeys(variant for variant, _ in readings):
        states = {language: readings[variant, language] for language in languages}
        estimates: list[tuple[str, Sequence[str], tuple[np.ndarray, ...], int]] = []
        if variant != DENSE:
            for language in languages:
                interval = _errors(subspaces, readings[DENSE, language], states[language])
                estimates.append((language, _METRICS, interval, len(states[language].nll)))
        if ids is not None:
            for language, correct in _retrieved(subspaces, states, ids).items():
                estimates.append((language, RETRIEVAL_METRICS, _share_right(correct), correct.shape[1]))
        for language, metrics, (value, low, high), n in estimates:
            place = {"language": language, "layer": np.tile(layers, len(metrics)), "rank": rank}
            metric = np.repeat(metrics, len(layers)).tolist()
            rows.append(
                {**columns[variant], **place, "metric": metric, "value": value, "low": low, "high": high, "n": n}
            )
    return tidy("subspaces", rows)


def _errors(subspaces: list[LSAR], dense: Readings, pruned: Readings) -> tuple[np.ndarray, ...]:
    """Return the errors of :data:`_METRICS` by layer, with intervals."""
    sums = np.stack(norms_by_layer(subspaces, dense, pruned), axis=2)  # [6, segments, layers]
    hidden, rank = subspaces[0].basis_.shape[0], np.array([s.basis_.shape[1] for s in subspaces])
    dimensions = np.stack([rank, hidden - rank])

    def of(weights: np.ndarray) -> np.ndarray:
        total = np.moveaxis(weights @ sums, 0, -2)  # [draws, quantity, layers]
        error, power, spread = total[..., 0:2, :], total[..., 2:4, :], total[..., 4:6, :]
        each = error / dimensions / weights.sum(axis=-1)[..., None, None]
        with np.errstate(divide="ignore"):  # no error at all: an infinite ratio
            ratio = 10 * np.log10(power / error)
        return np.concatenate([error / power, error / spread, each, ratio], axis=-2).reshape(*weights.shape[:-1], -1)

    return segment_interval(of, sums.shape[1])


def norms_by_layer(
    subspaces: Sequence[LSAR], dense: Readings, pruned: Readings
) -> list[Float[np.ndarray, "6 segments"]]:
    """Return the :func:`part_norms` of every layer; the states of one layer are looked at at a time."""
    return [
        part_norms(subspace, dense.pooled_at(layer).numpy(), pruned.pooled_at(layer).numpy())
        for layer, subspace in enumerate(subspaces)
    ]


def part_norms(
    subspace: LSAR, dense: Float[np.ndarray, "segments hidden"], pruned: Float[np.ndarray, "segments hidden"]
) -> Float[np.ndarray, "6 segments"]:
    """Return, for each segment, squared norms (specific, agnostic) of the error, of the signal and of its spread."""
    result = []
    before, after = dense.astype(np.float64), pruned.astype(np.float64)
    for states in (before - after, before, before - subspace.centre_):
        inside = (subspace.specific(states) ** 2).sum(axis=1)
        result += [inside, (subspace.transform(states) ** 2).sum(axis=1)]
    return np.stack(result)


# -- what the agnostic part encodes ----------------------------------------------------------------------------------


def _retrieved(
    subspaces: list[LSAR], states: Mapping[str, Readings], ids: Mapping[str, Sequence[str]]
) -> dict[str, Float[np.ndarray, "metrics segments layers"]]:
    """Return, by language, in what share of the others each segment's translation is found, at every layer.

    Translations that are nearest neighbours show that the agnostic part holds what is said. Empty if too few segments
    have translations in all languages.
    """
    languages = list(states)
    shared = set.intersection(*(set(ids[language]) for language in languages))
    if len(shared) < _ENOUGH:
        return {}
    together = {
        language: [i for i, id in sorted(enumerate(ids[language]), key=lambda pair: pair[1]) if id in shared]
        for language in languages
    }
    found = {language: np.empty((2, len(shared), len(subspaces))) for language in languages}
    for layer, subspace in enumerate(subspaces):
        here = {lang: states[lang].pooled_at(layer).double().numpy()[together[lang]] for lang in languages}
        agnostic = {language: subspace.transform(values) for language, values in here.items()}
        for which, part in enumerate((agnostic, here)):
            for language, right in _translations_found(part).items():
                found[language][which, :, layer] = right
    return found


def _translations_found(part: Mapping[str, Float[np.ndarray, "segments width"]]) -> dict[str, np.ndarray]:
    """Return in what share of the other languages each segment's nearest neighbour is its translation."""
    centre = np.mean([values.mean(axis=0) for values in part.values()], axis=0)
    directions = {
        language: (values - centre) / np.maximum(np.linalg.norm(values - centre, axis=1, keepdims=True), 1e-30)
        for language, values in part.items()
    }
    right = {}
    for language, queries in directions.items():
        hits = [
            (queries @ others.T).argmax(axis=1) == np.arange(len(queries))
            for other, others in directions.items()
            if other != language
        ]
        right[language] = np.mean(hits, axis=0)
    return right


def _share_right(correct: Float[np.ndarray, "metrics segments layers"]) -> tuple[np.ndarray, ...]:
    sums = np.concatenate(list(correct), axis=1)  # [segments, metrics · layers]
    return mean_interval(sums)
