"""Permutation tests, each exact for what it exchanges: signs of segments, sets, or the pairing of sets and languages.

All of them draw with one fixed seed, so equal data give equal p-values.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations

import numpy as np
from jaxtyping import Float
from scipy.stats import permutation_test

#: Permutations that are drawn where there are too many to try all.
PERMUTATIONS = 4999


def interactions(scores: Float[np.ndarray, "sets languages"]) -> Float[np.ndarray, " languages"]:
    """Test in each language whether its own set suits it, by letting every other set take its place.

    What a set gains in all languages, and what a language costs with all sets, is taken out first.

    Parameters
    ----------
    scores
        Of every set in every language, the sets in the order of the languages they belong to.

    Returns
    -------
    array
        Two-sided p-values, at least one over the number of sets.
    """
    centred = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    as_large = np.abs(centred) >= np.abs(np.diag(centred)) * (1 - 1e-12)
    return np.asarray(as_large.mean(axis=0))


def pairings(scores: Float[np.ndarray, "sets languages"]) -> float:
    """Test whether set i suits language i, by permuting which set belongs to which language.

    Parameters
    ----------
    scores
        Of every set in every language, the sets in the order of the languages they belong to.

    Returns
    -------
    float
        Two-sided p-value of the mean of the diagonal.
    """
    number = len(scores)

    def own(order: np.ndarray) -> np.float64:
        return np.float64(scores[order.astype(np.int64), range(number)].mean())

    test = permutation_test(
        (np.arange(number, dtype=np.float64),),
        own,
        permutation_type="pairings",
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def pairings_of_many(scores: Float[np.ndarray, "studies sets languages"]) -> Float[np.ndarray, " studies"]:
    """Return the p-values of :func:`pairings` for many studies at once, all permuted alike."""
    number = scores.shape[-1]
    dealt, added = _dealt(number)
    null = scores.reshape(len(scores), -1) @ dealt.reshape(len(dealt), -1).T
    own = np.trace(scores, axis1=1, axis2=2)[:, None]
    near = 1e-9 * np.abs(own)
    tails = np.stack([(null >= own - near).sum(axis=1), (null <= own + near).sum(axis=1)]).min(axis=0)
    return np.minimum(2 * (tails + added) / (len(dealt) + added), 1)


@cache
def _dealt(number: int) -> tuple[Float[np.ndarray, "orders sets languages"], int]:
    """Return the ways to deal sets to languages, 1 where a set goes, and how many to add if they are a sample."""
    if math.factorial(number) <= PERMUTATIONS + 1:
        orders, added = np.array(list(permutations(range(number)))), 0
    else:
        rng = np.random.default_rng(0)
        orders, added = np.stack([rng.permutation(number) for _ in range(PERMUTATIONS)]), 1
    dealt = np.zeros((len(orders), number, number))
    dealt[np.arange(len(orders))[:, None], orders, np.arange(number)] = 1
    return dealt, added
