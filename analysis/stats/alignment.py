"""How alike two sets of states of the same segments are: linear CKA, and angles between subspaces of means."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

#: Directions with less than this share of the largest variance are noise of floating-point sums.
_NEGLIGIBLE = 1e-12


def debiased_cka(
    first: Float[np.ndarray, "n n"], second: Float[np.ndarray, "n n"]
) -> tuple[float, Float[np.ndarray, " n"]]:
    """Return linear CKA (Kornblith et al., ICML 2019) with the unbiased HSIC, and the same without each segment.

    HSIC₁ (Song et al., JMLR 2012) leaves out each segment's product with itself. With it unrelated states have a CKA of
    0 however few the segments; with the biased estimator it is 0.8 for 256 segments of 1024 features.

    Parameters
    ----------
    first, second
        Inner products of the states of n ≥ 5 segments; they need not be centred.
    """
    both = _unbiased_hsic(first, second)
    own = _unbiased_hsic(first, first) * _unbiased_hsic(second, second)
    found = np.divide(both, np.sqrt(own), out=np.zeros_like(both), where=own > 0)
    return float(found[0]), found[1:]


def _unbiased_hsic(first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, " estimates"]:
    """Return HSIC₁ of all segments, then without each in turn, up to a factor that cancels in CKA."""
    k, q = (matrix - np.diag(np.diag(matrix)) for matrix in (first, second))
    products, rows_k, rows_q = (k * q).sum(axis=1), k.sum(axis=1), q.sum(axis=1)
    paths = rows_k @ rows_q - rows_k * rows_q - k @ rows_q - q @ rows_k + products
    trace = products.sum() - np.append(0, 2 * products)
    total = (rows_k.sum() - np.append(0, 2 * rows_k)) * (rows_q.sum() - np.append(0, 2 * rows_q))
    path = np.append(rows_k @ rows_q, paths)
    n = len(k) - np.append(0, np.ones(len(k)))
    return (trace + total / ((n - 1) * (n - 2)) - 2 * path / (n - 2)) / (n * (n - 3))


def mean_directions(
    products: Float[np.ndarray, "*draws means means"], rank: int
) -> Float[np.ndarray, "*draws means rank"]:
    """Return the combinations of centred means that are an orthonormal basis of the space with most of their variance.

    Parameters
    ----------
    products
        Inner products of the means, centred over them.
    rank
        Of the space.
    """
    variances, vectors = np.linalg.eigh(products)
    variances, vectors = variances[..., ::-1][..., :rank], vectors[..., ::-1][..., :rank]
    real = variances > np.maximum(_NEGLIGIBLE * variances[..., :1], np.finfo(float).tiny)
    scale = np.where(real, 1 / np.sqrt(np.where(real, variances, 1)), 0)
    return vectors * scale[..., None, :]


def overlap_and_angle(cosines: Float[np.ndarray, "*draws rank rank"]) -> Float[np.ndarray, "2 ..."]:
    """Return the mean squared cosine of the principal angles and the largest angle in degrees.

    Parameters
    ----------
    cosines
        Inner products of two orthonormal bases.
    """
    angles = np.clip(np.linalg.svd(cosines, compute_uv=False), 0, 1)
    return np.stack([(angles**2).mean(axis=-1), np.degrees(np.arccos(angles[..., -1]))])
