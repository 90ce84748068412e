"""Linear discriminant analysis with a shrunken covariance, from inner products of the samples alone.

Ledoit & Wolf (J. Multivariate Analysis 2004) shrink the covariance within classes, S, to (1 − α)·S + α·m·I with the
mean variance m. Its inverse needs only the inner products of the samples (Woodbury), so that nothing of the size
features × features is ever made: a fit on n samples costs a Cholesky factorization of n × n, however wide they are.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import cho_factor, cho_solve


def predicted_classes(
    fitted: Float[np.ndarray, "fitted fitted"],
    tested: Float[np.ndarray, "tested fitted"],
    classes: Int[np.ndarray, " fitted"],
    width: int,
) -> Int[np.ndarray, " tested"]:
    """Return the class of each tested sample, by the discriminant of the fitted samples; classes count alike.

    Parameters
    ----------
    fitted, tested
        Inner products of the fitted samples with each other, and of the tested ones with the fitted ones.
    classes
        Of the fitted samples, numbered from 0, each at least once.
    width
        Features of a sample.
    """
    n = len(classes)
    members = np.eye(int(classes.max()) + 1)[classes]
    averages = members / members.sum(axis=0)  # [fitted, classes]
    to_means = fitted @ averages
    within = fitted - to_means[:, classes]  # centred by class: columns, then rows
    within = within - (averages.T @ within)[classes]
    ridge = _ridge(within, width)
    factor = cho_factor(within + ridge * np.eye(n), lower=True)
    deviations = to_means - (averages.T @ to_means)[classes]
    solved = cho_solve(factor, deviations)
    centred = tested - (tested @ averages)[:, classes]
    lengths = ((averages * to_means).sum(axis=0) - (deviations * solved).sum(axis=0)) / 2
    return np.argmax(tested @ averages - centred @ solved - lengths, axis=1)


def _ridge(within: Float[np.ndarray, "fitted fitted"], width: int) -> float:
    """Return α·m·n / (1 − α) with Ledoit and Wolf's α."""
    n = len(within)
    trace = float(np.trace(within)) / n
    squared = float((within**2).sum()) / n**2
    apart = (squared - trace**2 / width) / width
    noise = (float((np.diag(within) ** 2).sum()) / n - squared) / (width * n)
    shrinkage = min(noise / apart, 1 - 1e-9) if apart > 0 else 1 - 1e-9
    floor = 1e-9 * trace * n + np.finfo(float).tiny
    return max(shrinkage * trace / width * n / (1 - shrinkage), floor)
