"""Permutation tests, each exact for what it exchanges: signs of segments, models, or the pairing of sets and languages.

All of them draw with one fixed seed, so equal data give equal p-values.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import permutation_test

#: Permutations that are drawn where there are too many to try all.
PERMUTATIONS = 4999
#: Permutations held in memory at a time.
_BATCH = 500


def sign_flips(
    differences: Float[np.ndarray, "segments pairs"], margins: Float[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """Test whether mean paired differences exceed a margin, by flipping signs of segments.

    Parameters
    ----------
    differences
        Of every segment, a column for each comparison.
    margins
        What each mean difference has to exceed, in the same unit; 0 for a plain test.

    Returns
    -------
    array
        Two-sided p-values.
    """
    turned = differences * np.sign(differences.mean(axis=0)) - margins
    test = permutation_test(
        (turned,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=_BATCH,
        alternative="greater",
        axis=0,
        rng=np.random.default_rng(0),
    )
    return np.asarray(np.minimum(2 * test.pvalue, 1.0))


def exchanged_models(own: Float[np.ndarray, " own"], others: Float[np.ndarray, " others"]) -> float:
    """Test whether the mean score of some models differs from that of the others, by exchanging whole models.

    Returns
    -------
    float
        Two-sided p-value; with one model in the first group it is at least one over the number of all models.
    """
    pool = np.concatenate([own, others])

    def distance(chosen: np.ndarray, rest: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(chosen.mean(axis=axis) - rest.mean(axis=axis))

    if len(own) == 1:  # scipy wants two of each; with one model every other can take its place
        leave = [distance(pool[[i]], np.delete(pool, i)) for i in range(len(pool))]
        return float(np.mean(np.abs(leave) >= abs(leave[0]) * (1 - 1e-12)))
    test = permutation_test((own, others), distance, n_resamples=PERMUTATIONS, rng=np.random.default_rng(0))
    return float(test.pvalue)


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
