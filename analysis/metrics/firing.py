"""How often neurons fire in each language, LAPE, and the published rule that selects language-specific neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from probes import Readings
from probes.readers.firing import FOLDS, fold_of

from ..frames.schema import FEWEST_ROUTED

Probabilities = Float[np.ndarray, "layers neurons languages"]

#: A neuron counts for a language if it fires more often than this share of all neurons do in all languages.
THRESHOLD_QUANTILE = 0.95
#: Share of all neurons that are selected.
SELECTED_SHARE = 0.01


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
        Tokens that were counted in each block, ``[languages, folds, layers]``.
    routed
        Of a mixture of experts: those that reached each expert, all of them as the last but one, and none as the last,
        one ``[folds, layers, experts + 2]`` a language.
    owner
        Which of these each neuron is to be counted by, ``[layers, neurons]``; the last: there is no such neuron.
    """

    languages: tuple[str, ...]
    fired: tuple[np.ndarray, ...]
    tokens: Int64[np.ndarray, "languages folds layers"]
    routed: tuple[np.ndarray, ...] = ()
    owner: np.ndarray | None = None

    @classmethod
    def of(cls, readings: Mapping[tuple[str, str], Readings], variant: str) -> FiringCounts:
        """Take the counts of one model from what was read of all."""
        languages = tuple(dict.fromkeys(language for _, language in readings))
        fired, tokens = [], []
        routed: list[np.ndarray] = []
        owner = None
        for language in languages:
            read = readings[variant, language]
            fired.append(read.fired.numpy())
            folds = fold_of(torch.arange(read.tokens.shape[1])).numpy()
            own = np.zeros((FOLDS, len(read.tokens)), dtype=np.int64)
            np.add.at(own, folds, read.tokens.T.numpy())
            tokens.append(own)
            if read.experts:
                routed.append(_routed(read, folds, own))
                owner = _owners(read.neurons.numpy(), read.fired.shape[2])
        return cls(languages, tuple(fired), np.stack(tokens), tuple(routed), owner)

    def probabilities(
        self, folds: Sequence[int] = range(FOLDS), layers: slice | Sequence[int] = slice(None)
    ) -> Probabilities:
        """Return the share of tokens on which each neuron fires, by language, on some folds of the text.

        For neurons of experts, it is the share of the tokens that were routed there, and nan if they were fewer than
        :data:`analysis.frames.schema.FEWEST_ROUTED` in a language.

        Parameters
        ----------
        folds
            All by default.
        layers
            Blocks that are wanted; all by default.
        """
        shares = [
            sum(fired[fold][layers] for fold in folds) / self._reached(i, list(folds), layers)
            for i, fired in enumerate(self.fired)
        ]
        return np.stack(shares, axis=-1)

    def _reached(self, language: int, folds: list[int], layers: slice | Sequence[int]) -> np.ndarray:
        """Return the tokens that reached each neuron, or every neuron of a block; nan where they are too few."""
        if self.owner is None:
            found: np.ndarray = self.tokens[language][folds].sum(axis=0)[layers, None]
            return found
        reached = self.routed[language][folds].sum(axis=0)[layers].astype(np.float64)
        experts = reached[:, :-2]
        experts[experts < FEWEST_ROUTED] = np.nan
        reached[:, -1] = np.nan
        return np.take_along_axis(reached, self.owner[layers], axis=1)


def _routed(read: Readings, folds: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the tokens that reached each expert, all, and none, by fold and block."""
    _, layers, experts = read.routed.shape
    found = np.zeros((FOLDS, layers, experts + 2), dtype=np.int64)
    np.add.at(found[..., :experts], folds, read.routed.numpy())
    found[..., experts] = tokens
    return found


def _owners(neurons: Int64[np.ndarray, "layers groups"], most: int) -> np.ndarray:
    """Return the group that each neuron belongs to; blocks that have fewer than `most` are filled up."""
    layers, groups = neurons.shape
    owner = np.full((layers, most), groups)
    for own, sizes in zip(owner, neurons, strict=True):
        own[: sizes.sum()] = np.repeat(np.arange(groups), sizes)
    return owner


def estimated(probabilities: Float[np.ndarray, "*neurons languages"]) -> Bool[np.ndarray, "*neurons"]:
    """Return which neurons have a firing probability in every language; the others have no LAPE."""
    return ~np.isnan(probabilities).any(axis=-1)


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

    A neuron that never fires has no distribution; its entropy is +inf, so that it is never taken for specific. One with
    an unknown probability (nan) in a language has none: entropies over fewer languages are lower, and not comparable.

    Examples
    --------
    >>> entropy(np.array([[[0.3, 0.0], [0.2, 0.2], [0.0, 0.0]]])).round(3).tolist()
    [[0.0, 0.693, inf]]
    """
    ordered = np.sort(probabilities, axis=-1)  # the order of the languages cannot change a bit of the sums
    total = ordered.sum(axis=-1)
    share = ordered / np.where(total > 0, total, 1)[..., None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    found = np.where(total > 0, np.maximum(-(share * logs).sum(axis=-1), 0.0), np.inf)
    return np.where(np.isnan(total), np.nan, found)


def select(
    probabilities: Probabilities,
    *,
    threshold_quantile: float = THRESHOLD_QUANTILE,
    selected_share: float = SELECTED_SHARE,
) -> Selection:
    """Select a model's language-specific neurons by the published rule.

    The threshold is the k-th smallest of all probabilities, k = round(quantile · their number). Of all neurons,
    round(share · their number) with the lowest entropy are selected, those left out that exceed the threshold in
    no language; ties go by position. Each belongs to every language in which it exceeds the threshold. Neurons without
    a probability in some language (nan) are left out of all of this.
    """
    known = estimated(probabilities)
    threshold = firing_threshold(probabilities if known.all() else probabilities[known], threshold_quantile)
    above = (probabilities > threshold) & known[..., None]
    scores = np.where(above.any(axis=-1), entropy(probabilities), np.inf).ravel()
    wanted = np.argsort(scores, kind="stable")[: selection_size(int(known.sum()), selected_share)]
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[wanted[np.isfinite(scores[wanted])]] = True
    return Selection(above & chosen.reshape(above.shape[:2])[..., None], threshold)


def firing_threshold(probabilities: np.ndarray, quantile: float = THRESHOLD_QUANTILE) -> float:
    """Return the firing probability above which a neuron counts for a language: a quantile of all; of none, +inf."""
    if not probabilities.size:
        return np.inf
    k = max(round(quantile * probabilities.size), 1) - 1
    return float(np.partition(probabilities.ravel(), k)[k])


def selection_size(neurons: int, selected_share: float = SELECTED_SHARE) -> int:
    """Return how many neurons are selected of a model with `neurons` in all.

    >>> selection_size(32 * 11008), selection_size(80 * 28672)  # LLaMA-2 7B and 70B
    (3523, 22938)
    """
    return round(selected_share * neurons)
