"""The spectrum of a weight matrix, and the exponent of its tail."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

#: Number of bins of the histogram whose peak bounds the tail.
_BINS = 100
#: The tail begins between these multiples of the peak.
_LOWEST, _HIGHEST = 0.95, 1.5
#: Columns that are multiplied at a time, so that only these are copied to float64.
_PANEL = 2048


def squared_singular_values(weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " rank"]:
    """Return the squared singular values of a matrix, in float64 and ascending order.

    They are the eigenvalues of the smaller of ``W Wᵀ`` and ``Wᵀ W``: a symmetric problem of the smaller dimension takes
    a fraction of the time of a singular value decomposition. Squares lose half of the digits of the small values, so
    all is in float64; values that are zero within rounding are zero.
    """
    if weight.device.type == "mps":  # it has no float64
        weight = weight.cpu()
    rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=weight.device)
    for panel in rows.split(_PANEL, dim=1):
        part = panel.double()
        gram.addmm_(part, part.T)
    values = torch.linalg.eigvalsh(gram)
    return values.where(values > values[-1] * max(weight.shape) * torch.finfo(torch.float64).eps, 0)


def tail_exponent(values: Float[Tensor, " n"]) -> float:
    """Return the exponent α of a power law ``p(λ) ∝ λ^-α`` fitted to the tail of a spectrum (Hill's estimator).

    For a tail that begins at λmin and has n values, ``α = 1 + n / Σ ln(λ / λmin)``. Of the values from 0.95 to 1.5
    times the peak of the spectrum, λmin is the one from which a power law fits best: with the smallest
    Kolmogorov-Smirnov distance (Lu et al., NeurIPS 2024, 2410.10912, sec. 3; Clauset et al., SIAM Review 2009,
    0706.1062). The peak is that of a histogram of ``log10 λ`` with 100 bins. The published code compares λ with the
    logarithm of the lower bound, which hardly excludes any value; here it is compared with the bound.

    Parameters
    ----------
    values
        Eigenvalues, in any order; those that are not positive do not count.

    Returns
    -------
    float
        α; NaN for a spectrum without two different positive values.
    """
    spectrum = values.detach().cpu().double().numpy()
    spectrum = np.sort(spectrum[spectrum > 0])
    if len(spectrum) < 2 or spectrum[0] == spectrum[-1]:
        return float("nan")
    counts, edges = np.histogram(np.log10(spectrum), _BINS)
    peak = 10.0 ** edges[counts.argmax()]
    first = int(np.searchsorted(spectrum, _LOWEST * peak))
    last = max(int(np.searchsorted(spectrum, _HIGHEST * peak, side="right")), first + 1)
    fits = [_fit(spectrum[start:]) for start in range(first, last) if spectrum[start] < spectrum[-1]]
    return min(fits)[1] if fits else _fit(spectrum[first - 1 :])[1]


def _fit(tail: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance of a tail, in ascending order, from its power law, and the exponent."""
    n = len(tail)
    logarithms = np.log(tail / tail[0])
    alpha = 1 + n / logarithms.sum()
    expected = 1 - np.exp((1 - alpha) * logarithms)
    below = np.arange(n) / n
    return float(max(abs(expected - below).max(), abs(expected - below - 1 / n).max())), float(alpha)
