"""Patterns: which weights of a scored matrix go.

Each is a pure function of ``(scores, sparsity)`` that returns a mask, ``True`` = kept. Exactly
``floor(n · sparsity)`` weights are removed of every group of ``n`` that is compared; ties go by position, the
first one first (stable, as a stable sort would).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import RecipeError, did_you_mean

Pattern = Callable[[Float[Tensor, "outputs inputs"], float], Bool[Tensor, "outputs inputs"]]


def removed(n: int, sparsity: float) -> int:
    """Return ``floor(n · sparsity)``, not fooled by the binary fraction behind a decimal sparsity.

    >>> removed(100, 0.29), int(100 * 0.29)
    (29, 28)
    """
    return math.floor(n * sparsity + 1e-9)


def row(scores: Float[Tensor, "outputs inputs"], sparsity: float) -> Bool[Tensor, "outputs inputs"]:
    """Remove the lowest scores of every output row (Wanda's native pattern)."""
    return _keep_highest(scores, removed(scores.shape[1], sparsity))


def matrix(scores: Float[Tensor, "outputs inputs"], sparsity: float) -> Bool[Tensor, "outputs inputs"]:
    """Remove the lowest scores of the whole matrix (magnitude's native pattern)."""
    return _keep_highest(scores.reshape(1, -1), removed(scores.numel(), sparsity)).reshape(scores.shape)


def _keep_highest(groups: Float[Tensor, "groups n"], k: int) -> Bool[Tensor, "groups n"]:
    """Return ``True`` for all but the `k` lowest of each group, ties broken by position."""
    if k == 0:
        return torch.ones_like(groups, dtype=torch.bool)
    threshold = _kth_lowest(groups, k)[:, None]
    keep = groups > threshold
    # Where several scores equal the threshold, too many went: the last of them stay.
    spared = groups.shape[1] - keep.sum(dim=1) - k
    tied = spared.nonzero().flatten()
    if len(tied):
        equal = groups[tied] == threshold[tied]
        from_the_end = equal.flip(1).cumsum(dim=1).flip(1)
        keep[tied] |= equal & (from_the_end <= spared[tied, None])
    return keep


def _kth_lowest(groups: Float[Tensor, "groups n"], k: int) -> Float[Tensor, " groups"]:
    if groups.device.type == "cpu":  # a partition is 4-8 x faster than torch.kthvalue here
        return torch.from_numpy(np.partition(groups.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return torch.kthvalue(groups, k, dim=1).values


_PATTERNS: dict[str, Pattern] = {"row": row, "matrix": matrix}


def pattern_named(name: str) -> Pattern:
    """Return the pattern called `name`.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name not in _PATTERNS:
        raise RecipeError(f'unknown pattern "{name}"; {did_you_mean(name, _PATTERNS)}')
    return _PATTERNS[name]


def known_patterns() -> tuple[str, ...]:
    """Return the names of all patterns."""
    return tuple(sorted(_PATTERNS))
