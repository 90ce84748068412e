"""SparseGPT: prune column by column, and update the later columns to compensate for the error.

The published algorithm propagates the error of a column to all later ones through U, the upper Cholesky factor of the
inverse Gram matrix. With G = R Rᵀ and R upper triangular, U is the inverse of R, and the same updates follow from R
alone: a column's updated weight is ``w_j + (Σ_{k<j} d_k R_kj) / R_jj``, where d_k is the total change of the earlier
column k. So one factorization suffices, nothing is inverted, and when a block of columns is reached, its updates from
all earlier columns take one matrix product.

LAPACK has no factorization with the upper factor on the left. The one below works on panels of columns, from the last
to the first; it consists almost entirely of matrix products, and is faster than LAPACK's Cholesky. Weights are stored
transposed, ``[inputs, outputs]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..patterns import Columns, Pattern
from ..statistics import GRAM, InputStatistics, Statistics
from .registry import Method, Solved, register

#: Number of columns updated one by one before the rest of their block is updated.
_NARROW = 32
#: Number of blocks whose updates from earlier columns are computed together: wider matrix products are faster.
_STRETCH = 4
#: Number of columns of the Gram matrix factorized at a time.
_PANEL = 256
#: Factors by which damping is raised until the factorization succeeds.
_RAISED = (1, 10, 100, 1000)


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
    factor = _factor(statistics.known_inputs, damping)
    saliency = (weight.float() * factor.upper.diagonal()).square()
    return saliency.masked_fill(factor.dead, 0)


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
    factor = _factor(statistics.known_inputs, damping)
    upper, inputs = factor.upper, len(factor.upper)
    bounds = list(pairwise([0, *torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()]))
    together = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    stored = torch.empty(together.shape[::-1], dtype=torch.float32, device=together.device).copy_(together.T)
    stored.masked_fill_(factor.dead[:, None], 0)
    lost = torch.empty_like(stored)
    kept = torch.empty_like(stored, dtype=torch.bool)
    width = int(columns) if not pattern.group else -(-int(columns) // pattern.group) * pattern.group
    narrow = pattern.group or _NARROW
    identity = torch.eye(width, device=stored.device)
    stretch = _STRETCH * width
    owed = torch.zeros_like(stored[:stretch])  # updates of a stretch of blocks from the columns before it

    for begin in range(0, inputs, width):
        end = min(begin + width, inputs)
        size = end - begin
        block = stored[begin:end].clone()
        square = upper[begin:end, begin:end]
        diagonal = square.diagonal()
        inverse = torch.linalg.solve_triangular(square.triu().T, identity[:size, :size], upper=False)
        start = begin - begin % stretch
        if begin == start and begin:
            ahead = min(begin + stretch, inputs)
            torch.mm(upper[:begin, begin:ahead].T, lost[:begin], out=owed[: ahead - begin])
        due = owed[begin - start : end - start]
        if begin > start:
            due.addmm_(upper[start:begin, begin:end].T, lost[start:begin])
        if begin:
            block.addmm_(inverse, due)
        if pattern.group:
            gone = torch.empty_like(block)
        else:
            gone = _gone(block, diagonal, bounds, pattern, budgets, Columns(begin, inputs))
        errors = torch.empty_like(block)
        for first in range(0, size, narrow):
            last = min(first + narrow, size)
            if first:
                block[first:last].addmm_(inverse[first:last, :first], errors[:first], alpha=-1)
            if pattern.group:
                at = Columns(begin + first, inputs)
                gone[first:last] = _gone(block[first:last], diagonal[first:last], bounds, pattern, budgets, at)
            weighted = gone[first:last] * diagonal[first:last, None]
            for j in range(first, last):
                column = block[j]
                if j > first:
                    column.addmv_(errors[first:j].T, inverse[j, first:j], alpha=-1)
                torch.mul(column, weighted[j - first], out=errors[j])
        remains = gone == 0
        kept[begin:end] = remains
        block.mul_(remains)
        torch.sub(stored[begin:end], block, out=lost[begin:end])
        stored[begin:end] = block

    return Solved(
        masks=[kept[:, a:b].T.contiguous() for a, b in bounds],
        weights=[
            stored[:, a:b].T.to(weight.dtype).contiguous() for (a, b), weight in zip(bounds, weights, strict=True)
        ],
        remarks=factor.remarks,
    )


def _gone(
    block: Tensor,
    diagonal: Tensor,
    bounds: Sequence[tuple[int, int]],
    pattern: Pattern,
    budgets: Sequence[int],
    columns: Columns,
) -> Tensor:
    """Return 1 where a weight is pruned and 0 where it is kept, ``[columns, outputs]``."""
    saliency = (block * diagonal[:, None]).square_()
    if pattern.group:  # groups lie within a row, so the matrices can be treated as one
        return (~pattern.keep(saliency.T, 0, columns)).T.to(block.dtype)
    gone = torch.empty_like(block)
    for (a, b), budget in zip(bounds, budgets, strict=True):
        gone[:, a:b] = (~pattern.keep(saliency[:, a:b].T.contiguous(), budget, columns)).T
    return gone


class _Factor:
    """The upper Cholesky factor R of the damped Gram matrix, ``G = R Rᵀ``; entries below the diagonal are garbage."""

    def __init__(self, inputs: InputStatistics, damping: float) -> None:
        self.remarks: tuple[str, ...] = ()
        for times in _RAISED:
            self.upper = inputs.gram_above_diagonal()
            diagonal = self.upper.diagonal()
            self.dead = diagonal == 0
            diagonal.masked_fill_(self.dead, 1)
            diagonal += damping * times * diagonal.mean()
            if _factorize(self.upper):
                if times > 1:
                    self.remarks = (f"damping raised from {damping:g} to {damping * times:g}",)
                return
        raise ArithmeticError(f"the Gram matrix of the inputs has no Cholesky factor even with {times} x the damping")


def _factor(inputs: InputStatistics, damping: float) -> _Factor:
    key = ("factor", damping)
    if key not in inputs.memo:
        inputs.memo[key] = _Factor(inputs, damping)
    factor: _Factor = inputs.memo[key]
    return factor


def _factorize(matrix: Tensor) -> bool:
    """Replace the upper triangle of a matrix by that of its factor R; return whether this succeeded."""
    for end in range(len(matrix), 0, -_PANEL):
        begin = max(end - _PANEL, 0)
        panel = matrix[:end, begin:end]
        if end < len(matrix):
            panel.addmm_(matrix[:end, end:], matrix[begin:end, end:].T, alpha=-1)
        turned, failed = torch.linalg.cholesky_ex(panel[begin:].flip(0, 1))  # in reversed order R is a lower factor
        if int(failed) or bool(turned[-1, -1].isnan()):
            return False
        corner = turned.flip(0, 1)
        panel[begin:] = corner
        identity = torch.eye(end - begin, device=matrix.device)
        panel[:begin] = panel[:begin] @ torch.linalg.solve_triangular(corner, identity, upper=True).T
    return True


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
