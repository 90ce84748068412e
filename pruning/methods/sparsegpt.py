"""SparseGPT: prune column by column, and update the later columns to compensate for the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..patterns import Columns, Pattern
from ..statistics import GRAM, Statistics
from .columns import NARROW, factor, stacked, sweep
from .registry import Method, Solved, register


def score(
    weight: Float[Tensor, "outputs inputs"],
    statistics: Statistics,
    *,
    damping: float = 0.01,
    columns: float = 128,
) -> Float[Tensor, "outputs inputs"]:
    """Return ``w² / U_jj²`` in float32 for the dense weights, without any updates.

    Frantar & Alistarh, ICML 2023, 2301.00774. Used only for comparisons between matrices; within a matrix,
    :func:`solve` compares updated weights.
    """
    found = factor(statistics.known_inputs, damping)
    saliency = (weight.float() * found.upper.diagonal()).square()
    return saliency.masked_fill(found.dead, 0)


def solve(
    weights: Sequence[Tensor],
    statistics: Statistics,
    pattern: Pattern,
    budgets: Sequence[int],
    *,
    damping: float = 0.01,
    columns: float = 128,
) -> Solved:
    """Prune matrices that read the same input in one sweep over the columns, and update the remaining weights.

    Parameters
    ----------
    weights
        Dense weights, each ``[outputs, inputs]``.
    statistics
        Must have the Gram matrix of the inputs, on any scale.
    pattern, budgets
        Thresholds are set per matrix and block of columns, or for n:m per group, on weights already updated.
    damping
        Share of the mean diagonal added to the Gram matrix; raised, with a remark, if the factorization fails.
    columns
        Block width.

    Raises
    ------
    ArithmeticError
        If the Gram matrix cannot be factorized even with 1000 times the damping.
    """
    found = factor(statistics.known_inputs, damping)
    bounds = list(pairwise([0, *torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()]))
    stored = stacked(weights, found.dead)
    removal = _Removal(stored, bounds, pattern, budgets)
    width = int(columns) if not pattern.group else -(-int(columns) // pattern.group) * pattern.group
    sweep(stored, found.upper, removal, width=width, narrow=pattern.group or NARROW)
    return Solved(
        masks=[removal.kept[:, a:b].T.contiguous() for a, b in bounds],
        weights=[
            stored[:, a:b].T.to(weight.dtype).contiguous() for (a, b), weight in zip(bounds, weights, strict=True)
        ],
        remarks=found.remarks,
    )


class _Removal:
    """Which weights of a column go: by a threshold over their block of columns, or in every n:m group of columns."""

    def __init__(
        self, stored: Tensor, bounds: Sequence[tuple[int, int]], pattern: Pattern, budgets: Sequence[int]
    ) -> None:
        self.kept = torch.empty_like(stored, dtype=torch.bool)
        self._bounds, self._pattern, self._budgets = bounds, pattern, budgets

    def enter(self, block: Tensor, diagonal: Tensor, begin: int) -> None:
        self._block, self._diagonal, self._begin = block, diagonal, begin
        self._gone = torch.empty_like(block) if self._pattern.group else self._choose(0, len(block))

    def approach(self, first: int, last: int, ahead: Callable[[int], Tensor]) -> None:
        if self._pattern.group:
            self._gone[first:last] = self._choose(first, last)
        self._first, self._weighted = first, self._gone[first:last] * self._diagonal[first:last, None]

    def decide(self, j: int, column: Tensor, error: Tensor) -> None:
        torch.mul(column, self._weighted[j - self._first], out=error)

    def leave(self, block: Tensor) -> None:
        remains = self._gone == 0
        self.kept[self._begin : self._begin + len(block)] = remains
        block.mul_(remains)

    def _choose(self, first: int, last: int) -> Tensor:
        """Return 1 where a weight is pruned and 0 where it is kept, ``[columns, outputs]``."""
        columns = Columns(self._begin + first, len(self.kept))
        saliency = (self._block[first:last] * self._diagonal[first:last, None]).square_()
        if self._pattern.group:  # groups lie within a row, so the matrices can be treated as one
            return (~self._pattern.keep(saliency.T, 0, columns)).T.to(saliency.dtype)
        gone = torch.empty_like(saliency)
        for (a, b), budget in zip(self._bounds, self._budgets, strict=True):
            gone[:, a:b] = (~self._pattern.keep(saliency[:, a:b].T.contiguous(), budget, columns)).T
        return gone


METHOD = register(
    Method(
        "sparsegpt",
        score,
        source="Frantar & Alistarh, ICML 2023, 2301.00774",
        needs=frozenset({GRAM}),
        solve=solve,
        parameters={
            "damping": Parameter(0.01, 1e-6, 10, "share of the mean diagonal added to the Gram matrix"),
            "columns": Parameter(128, 1, 1e6, "columns that share a threshold", whole=True),
        },
    )
)
