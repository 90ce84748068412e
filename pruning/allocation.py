"""Allocation: how many weights each matrix gives. Pure functions from what was surveyed to budgets.

Whatever the allocation, the whole model gives exactly as many weights as under the uniform one, to the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .errors import RecipeError, did_you_mean
from .masks import Key
from .parameters import Parameter
from .patterns import Pattern, Shape, _kth_lowest
from .statistics import InputStatistics

Budgets = dict[Key, int]

_SPREAD = Parameter(0.08, 0, 0.5, "most that a block's sparsity may differ from the target")


@dataclass(frozen=True)
class Allocation:
    """A rule for how much each block gives.

    Attributes
    ----------
    name
        As written in a recipe.
    source
        The publication that defines it.
    parameters
        What a recipe may set.
    """

    name: str
    source: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


UNIFORM, OWL, CROSS_LINGUAL = "uniform", "owl", "cross-lingual"
_ALLOCATIONS = {
    UNIFORM: Allocation(UNIFORM, "every matrix gives the same share"),
    OWL: Allocation(
        OWL,
        "Yin et al., ICML 2024, 2310.05175",
        {"outlier": Parameter(5, 1, 1e6, "times the block's mean score that make an outlier"), "spread": _SPREAD},
    ),
    CROSS_LINGUAL: Allocation(
        CROSS_LINGUAL,
        "reconstruction after Choenni & Titov, EMNLP 2025, 2505.21171",
        {
            "spread": _SPREAD,
            "sign": Parameter(1, -1, 1, "1: blocks whose inputs correlate between languages give more; -1: less"),
        },
    ),
}


def allocation_named(name: str) -> Allocation:
    """Return the allocation called `name`.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name not in _ALLOCATIONS:
        raise RecipeError(f'unknown allocation "{name}"; {did_you_mean(name, _ALLOCATIONS)}')
    return _ALLOCATIONS[name]


def uniform(shapes: Mapping[Key, Shape], pattern: Pattern, sparsity: float) -> Budgets:
    """Return the budgets under which every matrix gives the same share."""
    return {key: pattern.uniform(shape, sparsity) for key, shape in shapes.items()}


def threshold(scores: Mapping[Key, Tensor], total: int) -> Budgets:
    """Return how many of the `total` lowest scores of all matrices together each of them holds; ties go in order."""
    if total == 0:
        return dict.fromkeys(scores, 0)
    everything = torch.cat([score.flatten() for score in scores.values()])
    limit = _kth_lowest(everything[None], total)[0]
    budgets = {key: int((score < limit).sum()) for key, score in scores.items()}
    left = total - sum(budgets.values())
    for key, score in scores.items():
        tied = min(left, int((score == limit).sum()))
        budgets[key] += tied
        left -= tied
    return budgets


def outlier_share(scores: Iterable[Tensor], outlier: float = 5.0) -> float:
    """Return the share of a block's scores that exceed `outlier` times their mean (OWL's layerwise outlier ratio)."""
    parts = list(scores)
    count = sum(part.numel() for part in parts)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in parts) / count
    return sum(int((part > outlier * mean).sum()) for part in parts) / count


def language_correlation(groups: Iterable[InputStatistics]) -> float:
    """Return the mean correlation of a block's input norms between pairs of languages; NaN with one language."""
    values = []
    for statistics in groups:
        norms = [norm.cpu().double().numpy() for norm in statistics.norms_by_language().values()]
        values += [float(np.corrcoef(a, b)[0, 1]) for a, b in combinations(norms, 2)]
    return float(np.mean(values)) if values else float("nan")


def shifted(importance: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Return the sparsity of every block: lower where it is more important, within ±`spread`, the target on average.

    The importances are mapped linearly to a range of 2 · spread and recentred so that the average over weights is
    the target (Yin et al., ICML 2024, 2310.05175, sec. 3.3).

    Raises
    ------
    RecipeError
        If a block would give more than it has, or less than nothing.

    Examples
    --------
    >>> [round(s, 2) for s in shifted([1.0, 2.0, 3.0], [10, 10, 10], 0.5, 0.08)]
    [0.58, 0.5, 0.42]
    """
    values = np.asarray(importance, dtype=np.float64)
    width = values.max() - values.min()
    ratio = (values - values.min()) / width * 2 * spread if width > 0 else np.zeros_like(values)
    sparsities = sparsity - (ratio - np.average(ratio, weights=sizes))
    if sparsities.min() < 0 or sparsities.max() >= 1:
        raise RecipeError(
            f"sparsity {sparsity:g} with a spread of {spread:g} gives a block {sparsities.min():.2f} or "
            f"{sparsities.max():.2f}; lower the spread"
        )
    return [float(value) for value in sparsities]


def by_block(shapes: Mapping[Key, Shape], sparsities: Mapping[int, float], total: int) -> Budgets:
    """Return budgets that follow the blocks' sparsities and add up to `total` (largest remainders)."""
    wanted = {key: shape[0] * shape[1] * sparsities[key[0]] for key, shape in shapes.items()}
    scale = total / sum(wanted.values()) if total else 0.0
    wanted = {key: value * scale for key, value in wanted.items()}
    budgets = {key: int(value) for key, value in wanted.items()}
    short = total - sum(budgets.values())
    for key in sorted(wanted, key=lambda key: budgets[key] - wanted[key])[:short]:
        budgets[key] += 1
    return budgets
