"""Sparsity patterns: which weights of a scored matrix are pruned.

Each is a pure function of scores and a *budget*, the number of weights to prune, and returns a mask, ``True`` = kept.
Exactly the budget is pruned; ties are broken by position, first come first pruned, as by a stable sort.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import RecipeError, unknown

Shape = tuple[int, int]
#: Number of scores compared at a time on a CPU.
_AT_A_TIME = 1 << 18


def removed(n: int, sparsity: float) -> int:
    """Return ``floor(n · sparsity)``, robust to the rounding of decimal sparsities in binary, however large n is.

    >>> removed(100, 0.29), int(100 * 0.29)
    (29, 28)
    >>> removed(10_905_600_000, 0.7), int(10_905_600_000 * 0.7)
    (7633920000, 7633919999)
    """
    return math.floor(n * sparsity * (1 + 1e-15) + 1e-9)


@dataclass(frozen=True)
class Columns:
    """A run of columns of a matrix: begins at `start`, out of `inputs` in all."""

    start: int
    inputs: int


Keep = Callable[[Float[Tensor, "outputs columns"], int, Columns], Bool[Tensor, "outputs columns"]]


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: which weights compete with each other.

    Attributes
    ----------
    name
        As written in a recipe.
    choose
        ``choose(scores, budget, columns)`` returns the mask of some columns of a matrix, which take a proportional
        share of the budget.
    uniform
        ``uniform(shape, sparsity)`` returns the budget of a matrix under uniform allocation.
    group
        m for an n:m pattern, the number of consecutive inputs that compete; 0 for other patterns.
    structure
        Kinds of structure that are removed as a whole, such as ``("neurons", "heads")``; none if single weights are.
        What competes is then the structures, not the weights: see :mod:`pruning.engine.units`.
    """

    name: str
    choose: Keep
    uniform: Callable[[Shape, float], int]
    group: int = 0
    structure: tuple[str, ...] = ()

    def keep(
        self, scores: Float[Tensor, "outputs columns"], budget: int, columns: Columns | None = None
    ) -> Bool[Tensor, "outputs columns"]:
        """Return the mask of the weights to keep.

        Parameters
        ----------
        scores
            The lowest are pruned.
        budget
            Number of weights to prune in the whole matrix.
        columns
            Which of its columns these are; all by default. Over column blocks that cover the matrix, exactly the
            budget is pruned.
        """
        return self.choose(scores, budget, columns or Columns(0, scores.shape[1]))


def _row(scores: Float[Tensor, "outputs columns"], budget: int, columns: Columns) -> Bool[Tensor, "outputs columns"]:
    outputs = scores.shape[0]
    each, rest = divmod(budget, outputs)
    counts = torch.full((outputs,), each)
    counts[:rest] += 1
    return _keep_highest(scores, _share(counts, scores.shape[1], columns))


def _matrix(scores: Float[Tensor, "outputs columns"], budget: int, columns: Columns) -> Bool[Tensor, "outputs columns"]:
    counts = _share(torch.tensor([budget]), scores.shape[1], columns)
    return _keep_highest(scores.reshape(1, -1), counts).reshape(scores.shape)


def _share(budget: Int[Tensor, " groups"], width: int, columns: Columns) -> Int[Tensor, " groups"]:
    """Return the share of the budget that falls on `width` columns, in proportion to their number."""
    before = budget * columns.start // columns.inputs
    return budget * (columns.start + width) // columns.inputs - before


def _n_of_m(n: int, m: int) -> Keep:
    def choose(
        scores: Float[Tensor, "outputs columns"], budget: int, columns: Columns
    ) -> Bool[Tensor, "outputs columns"]:
        """Prune the `n` lowest of every `m`, by counting for each weight the lower ones in its group."""
        planes = [plane.contiguous() for plane in scores.reshape(scores.shape[0], -1, m).unbind(dim=2)]
        ranks = [torch.zeros_like(planes[0], dtype=torch.int8) for _ in planes]
        for later in range(1, m):
            for earlier in range(later):
                lower = planes[later] < planes[earlier]
                ranks[earlier] += lower
                ranks[later] += ~lower
        return torch.stack([rank >= n for rank in ranks], dim=2).reshape(scores.shape)

    return choose


def _keep_highest(groups: Float[Tensor, "groups n"], counts: Int[Tensor, " groups"]) -> Bool[Tensor, "groups n"]:
    """Return ``True`` for all but the `counts` lowest of each group, ties broken by position."""
    keep = torch.ones_like(groups, dtype=torch.bool)
    for count in counts.unique().tolist():
        if count > 0:
            rows = (counts == count).nonzero().flatten()
            whole = len(rows) == len(groups)
            kept = _all_but_lowest(groups if whole else groups[rows], count)
            if whole:
                return kept
            keep[rows] = kept
    return keep


def _all_but_lowest(groups: Float[Tensor, "groups n"], k: int) -> Bool[Tensor, "groups n"]:
    # In chunks that fit into the CPU cache: halves the time for large matrices, and avoids large copies.
    rows = max(_AT_A_TIME // groups.shape[1], 1) if groups.device.type == "cpu" else len(groups)
    return torch.cat([_all_but_lowest_of_few(few, k) for few in groups.split(rows)])


def _all_but_lowest_of_few(groups: Float[Tensor, "groups n"], k: int) -> Bool[Tensor, "groups n"]:
    threshold = _kth_lowest(groups, k)[:, None]
    keep = groups > threshold
    # Where several scores equal the threshold, too many are pruned: the last of them are kept.
    spared = groups.shape[1] - keep.sum(dim=1, dtype=torch.int32) - k  # eight times as fast as int64
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


def _rows_share(shape: Shape, sparsity: float) -> int:
    return shape[0] * removed(shape[1], sparsity)


def _matrix_share(shape: Shape, sparsity: float) -> int:
    return removed(shape[0] * shape[1], sparsity)


#: One threshold over all weights of the model; ``allocation.threshold`` turns it into a budget per matrix.
MODEL = "model"
#: Kinds of structure.
NEURONS, HEADS, BLOCKS = "neurons", "heads", "blocks"
_PATTERNS: dict[str, Pattern] = {
    "row": Pattern("row", _row, _rows_share),
    "matrix": Pattern("matrix", _matrix, _matrix_share),
    MODEL: Pattern(MODEL, _matrix, _matrix_share),
} | {
    name: Pattern(name, _matrix, _matrix_share, structure=tuple(name.split("+")))
    for name in (NEURONS, HEADS, f"{NEURONS}+{HEADS}", BLOCKS)
}
_N_OF_M = re.compile(r"(\d+):(\d+)")


def n_of_m(name: str) -> tuple[int, int] | None:
    """Return n and m of a pattern that removes n weights out of every m, or ``None``.

    >>> n_of_m("2:4"), n_of_m("row")
    ((2, 4), None)

    Raises
    ------
    RecipeError
        If it has the form n:m, but not 0 < n < m <= 64.
    """
    found = _N_OF_M.fullmatch(name)
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m <= 64:
        raise RecipeError(f'pattern "{name}": n:m removes n out of every m inputs, 0 < n < m <= 64, such as "2:4"')
    return n, m


def pattern_named(name: str) -> Pattern:
    """Return the pattern called `name`: ``row``, ``matrix``, ``model``, n:m such as ``2:4``, or a structure.

    Raises
    ------
    RecipeError
        If there is none.
    """
    numbers = n_of_m(name)
    if numbers:
        n, m = numbers
        return Pattern(name, _n_of_m(n, m), lambda shape, sparsity: shape[0] * shape[1] // m * n, group=m)
    if name not in _PATTERNS:
        raise RecipeError(unknown("pattern", name, known_patterns()))
    return _PATTERNS[name]


def is_structure(name: str) -> bool:
    """Whether a pattern removes whole structures.

    >>> is_structure("heads"), is_structure("row")
    (True, False)
    """
    return name in _PATTERNS and bool(_PATTERNS[name].structure)


def known_patterns() -> tuple[str, ...]:
    """Return the names of the patterns; any other valid n:m is accepted too."""
    return (*sorted(_PATTERNS), "2:4", "4:8")
