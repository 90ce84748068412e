"""Sparsity allocation: how many weights to prune in each matrix. Pure functions from survey results to budgets.

Under every allocation exactly as many weights are pruned in the whole model as under the uniform one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import RecipeError, unknown
from .parameters import Parameter
from .patterns import Pattern, Shape, _kth_lowest
from .projections import Key
from .statistics import InputStatistics

Budgets = dict[Key, int]
Group = TypeVar("Group", bound=Hashable)

_SPREAD = Parameter(0.08, 0, 0.5, "most that a block's sparsity may differ from the target")


@dataclass(frozen=True)
class Allocation:
    """A rule for the sparsity of each block or matrix.

    Attributes
    ----------
    name
        As written in a recipe.
    source
        The publication that defines it.
    parameters
        What a recipe may set.
    surveys
        Whether it surveys the dense model on calibration text before anything is pruned.
    weighs
        Whether it looks at all weights of the dense model before anything is pruned, and at no text.
    """

    name: str
    source: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    surveys: bool = True
    weighs: bool = False


UNIFORM, OWL, CROSS_LINGUAL, DIAGNOSIS, ALPHA = "uniform", "owl", "cross-lingual", "diagnosis", "alpha"
STANDARDIZED = "standardized"
_ALLOCATIONS = {
    UNIFORM: Allocation(UNIFORM, "every matrix has the same sparsity", surveys=False),
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
            "sign": Parameter(1, -1, 1, "1: blocks whose inputs correlate between languages are sparser; -1: denser"),
        },
    ),
    STANDARDIZED: Allocation(
        STANDARDIZED,
        "An et al. (FLAP), AAAI 2024, 2312.11983: one threshold over all neurons and heads, z-scored",
        surveys=False,
    ),
    DIAGNOSIS: Allocation(
        DIAGNOSIS,
        "matrices whose pruning a diagnosis found to hurt most are pruned less",
        {
            "spread": Parameter(0.08, 0, 0.5, "half the range of the matrices' sparsities"),
            "shuffle": Parameter(
                0, 0, 999_999, "0: as diagnosed; else the seed of a control that spares other matrices", whole=True
            ),
        },
        surveys=False,
    ),
    ALPHA: Allocation(
        ALPHA,
        "AlphaPruning: Lu et al., NeurIPS 2024, 2410.10912",
        {"spread": _SPREAD},
        surveys=False,
        weighs=True,
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
        raise RecipeError(unknown("allocation", name, _ALLOCATIONS))
    return _ALLOCATIONS[name]


def uniform(shapes: Mapping[Key, Shape], pattern: Pattern, sparsity: float) -> Budgets:
    """Return the budgets that give every matrix the same sparsity."""
    return {key: pattern.uniform(shape, sparsity) for key, shape in shapes.items()}


def threshold(scores: Mapping[Key, Tensor], total: int) -> Budgets:
    """Return how many of the model's `total` lowest scores lie in each matrix; ties are counted in matrix order."""
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
    """Return the sparsity of every block or matrix: lower where it is more important, the target on average.

    The importances are mapped linearly to a range of 2 · spread and recentred so that the average over weights is
    the target (Yin et al., ICML 2024, 2310.05175, sec. 3.3).

    Raises
    ------
    RecipeError
        If a sparsity would fall outside [0, 1).

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
            f"sparsity {sparsity:g} with a spread of {spread:g} needs sparsities from {sparsities.min():.2f} to "
            f"{sparsities.max():.2f}; lower the spread"
        )
    return [float(value) for value in sparsities]


def tail_weighted(exponents: Mapping[Key, float]) -> dict[int, float]:
    """Return the importance of every block: minus the mean tail exponent of its matrices (AlphaPruning's order).

    The heavier the tail of a block's spectra, the smaller its exponents, and the more the block has learned (Lu et al.,
    NeurIPS 2024, 2410.10912, sec. 3). Matrices without an exponent do not count.

    Raises
    ------
    RecipeError
        If no matrix of a block has an exponent.

    Examples
    --------
    >>> tail_weighted({(0, "q"): 2.0, (0, "down"): 4.0, (1, "q"): 2.5})
    {0: -3.0, 1: -2.5}
    """
    by_block: dict[int, list[float]] = {}
    for (layer, _), exponent in exponents.items():
        by_block.setdefault(layer, []).append(exponent)
    importance = {}
    for layer, values in by_block.items():
        known = [value for value in values if value == value]
        if not known:
            raise RecipeError(
                f'allocation "{ALPHA}" finds no spectrum in block {layer}, whose matrices have a rank of 1 at most; '
                f"leave the block out with blocks = ..., or choose another allocation"
            )
        importance[layer] = -float(np.mean(known))
    return importance


def diagnosed(
    importance: Mapping[Key, float],
    shapes: Mapping[Key, Shape],
    sparsity: float,
    *,
    spread: float = 0.08,
    shuffle: float = 0,
) -> dict[Key, float]:
    """Return the sparsity of every matrix: lower where restoring its weights recovers more.

    Sparsities follow the ranks of the importances among the matrices in `shapes`, not their values; ties share their
    mean rank. Attributed effects are heavy-tailed, and some are negative: mapped by value, two or three matrices would
    take up the whole range and all others would get the same sparsity.

    Parameters
    ----------
    importance
        How much restoring each matrix's dense weights recovers, on any scale.
    shapes
        Shapes of the matrices to prune.
    sparsity
        The target: the average over all weights.
    spread
        Half the range of the matrices' sparsities, as for OWL; see :func:`shifted`.
    shuffle
        0: as diagnosed. Else the seed of a control; see :func:`shuffled`.

    Raises
    ------
    RecipeError
        If a sparsity would fall outside [0, 1).

    Examples
    --------
    >>> shapes = dict.fromkeys([(0, "q"), (0, "down"), (1, "q")], (4, 4))
    >>> found = diagnosed({(0, "q"): -0.1, (0, "down"): 7.5, (1, "q"): 0.02}, shapes, 0.5)
    >>> {key: round(share, 2) for key, share in found.items()}
    {(0, 'q'): 0.58, (0, 'down'): 0.42, (1, 'q'): 0.5}
    """
    values = {key: importance[key] for key in shapes}
    if shuffle:
        values = shuffled(values, int(shuffle))
    sizes = [outputs * inputs for outputs, inputs in shapes.values()]
    return dict(zip(shapes, shifted(ranks(list(values.values())), sizes, sparsity, spread), strict=True))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value, from 1 for the lowest; ties share their mean rank.

    >>> ranks([0.3, -2.0, 0.3, 50.0])
    [2.5, 1.0, 2.5, 4.0]
    """
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts - 1) / 2
    return [float(rank) for rank in means[place]]


def shuffled(importance: Mapping[Key, float], seed: int) -> dict[Key, float]:
    """Return the importances permuted across blocks within each role: the same values for other matrices.

    Blocks are ordered by a hash of seed, role and block, so that the permutation is the same on every machine and with
    every library version.
    """
    by_role: dict[str, list[Key]] = {}
    for key in importance:
        by_role.setdefault(key[1], []).append(key)
    taken: dict[Key, Key] = {}
    for keys in by_role.values():
        order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key[1]} {key[0]}".encode()).digest())
        taken |= dict(zip(keys, order, strict=True))
    return {key: importance[taken[key]] for key in importance}


def by_block(shapes: Mapping[Key, Shape], sparsities: Mapping[int, float], total: int) -> Budgets:
    """Return budgets that follow the blocks' sparsities and add up to `total`."""
    return by_matrix(shapes, {key: sparsities[key[0]] for key in shapes}, total)


def by_matrix(shapes: Mapping[Key, Shape], sparsities: Mapping[Key, float], total: int) -> Budgets:
    """Return budgets that follow the matrices' sparsities and add up to `total` (largest remainders)."""
    wanted = {key: shape[0] * shape[1] * sparsities[key] for key, shape in shapes.items()}
    scale = total / sum(wanted.values()) if total else 0.0
    wanted = {key: value * scale for key, value in wanted.items()}
    budgets = {key: int(value) for key, value in wanted.items()}
    short = total - sum(budgets.values())
    for key in sorted(wanted, key=lambda key: budgets[key] - wanted[key])[:short]:
        budgets[key] += 1
    return budgets


def lowest_within(scores: Mapping[Group, Tensor], costs: Mapping[Group, int], budget: int) -> dict[Group, int]:
    """Return how many of each group's units are among the lowest of all whose costs add up to at most `budget`.

    Parameters
    ----------
    scores
        Group to the scores of its units; ties are broken by the order of the groups, then by position.
    costs
        Group to the cost of each of its units.
    budget
        The units go in the order of their scores, and the first one that exceeds the budget stays with all after it.

    Examples
    --------
    >>> scores = {"heads": torch.tensor([-1.0, 0.5]), "neurons": torch.tensor([0.1, -0.2, 0.7])}
    >>> lowest_within(scores, {"heads": 4, "neurons": 1}, 6)
    {'heads': 1, 'neurons': 2}
    """
    group = np.repeat(np.arange(len(scores)), [len(own) for own in scores.values()])
    cost = np.repeat([costs[name] for name in scores], [len(own) for own in scores.values()])
    order = np.argsort(torch.cat([own.double().cpu() for own in scores.values()]).numpy(), kind="stable")
    count = int(np.searchsorted(np.cumsum(cost[order]), budget, side="right"))
    gone = np.bincount(group[order[:count]], minlength=len(scores))
    return {name: int(number) for name, number in zip(scores, gone, strict=True)}
