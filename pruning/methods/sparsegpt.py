"""SparseGPT: choose weights column by column and let the later columns make up for what was taken.

The published algorithm passes the error of a column on to all later ones through U, the upper Cholesky factor of the
inverse Gram matrix. With G = R Rᵀ, R upper triangular, U is the inverse of R, and the same numbers follow from R
alone: a column's corrected weight is ``w_j + (Σ_{k<j} d_k R_kj) / R_jj``, where d_k is what earlier column k has lost
in all. So one factorization is enough, nothing is inverted, and a block of columns collects what it owes to all
earlier ones in one matrix product, when its turn comes.

LAPACK has no factorization with an upper factor on the left, so G is turned around: in reversed order of inputs R is
the ordinary lower factor L. All below is stored transposed and in that order, ``[inputs, outputs]``, last input first.
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

#: Columns that are corrected one by one before the rest of their block learns of it.
_NARROW = 32
#: Factors by which the damping is raised until the factorization succeeds.
_RAISED = (1, 10, 100, 1000)


def score(
    weight: Float[Tensor, "outputs inputs"],
    statistics: Statistics,
    *,
    damping: float = 0.01,
    columns: float = 128,
) -> Float[Tensor, "outputs inputs"]:
    """Return ``w² / U_jj²`` in float32 with the dense weights, as if every column came first.

    Frantar & Alistarh, ICML 2023, 2301.00774. Only comparisons between matrices use this; within one, :func:`solve`
    compares corrected weights.
    """
    factor = _factor(statistics.known_inputs, damping)
    saliency = (weight.float() * factor.lower.diagonal().flip(0)).square()
    return saliency.masked_fill(factor.dead.flip(0), 0)


def solve(
    weights: Sequence[Tensor],
    statistics: Statistics,
    pattern: Pattern,
    budgets: Sequence[int],
    *,
    damping: float = 0.01,
    columns: float = 128,
) -> Solved:
    """Prune matrices that read the same input, in one sweep over its columns.

    Parameters
    ----------
    weights
        Dense ``[outputs, inputs]``, any number of matrices.
    statistics
        With the Gram matrix of their inputs. Its scale does not matter.
    pattern, budgets
        Thresholds are taken for each matrix and block of columns, or for every group of n:m from weights that are
        corrected already.
    damping
        Share of the mean diagonal that is added to the Gram matrix; raised, and said so, if the factorization fails.
    columns
        Width of a block.
    """
    factor = _factor(statistics.known_inputs, damping)
    lower, inputs = factor.lower, len(factor.lower)
    bounds = list(pairwise([0, *torch.tensor([len(weight) for weight in weights]).cumsum(0).tolist()]))
    stored = torch.cat([weight.flip(1) for weight in weights]).T.float().contiguous()
    stored[factor.dead] = 0
    lost = torch.empty_like(stored)
    kept = torch.empty_like(stored, dtype=torch.bool)
    width = int(columns) if not pattern.group else -(-int(columns) // pattern.group) * pattern.group
    narrow = pattern.group or _NARROW
    identity = torch.eye(width, device=stored.device)

    for begin in range(0, inputs, width):
        top, bottom = inputs - begin, max(inputs - begin - width, 0)
        size = top - bottom
        block = stored[bottom:top].clone()
        diagonal = lower[bottom:top, bottom:top].diagonal()
        inverse = torch.linalg.solve_triangular(
            lower[bottom:top, bottom:top].tril(), identity[:size, :size], upper=False
        )
        if begin:
            block.addmm_(inverse.T, lower[top:, bottom:top].T @ lost[top:])
        if pattern.group:
            gone = torch.empty_like(block)
        else:
            gone = _gone(block, diagonal, bounds, pattern, budgets, Columns(begin, inputs))
        errors = torch.empty_like(block)
        for last in range(size, 0, -narrow):
            first = max(last - narrow, 0)
            if last < size:
                block[first:last].addmm_(inverse[last:, first:last].T, errors[last:], alpha=-1)
            if pattern.group:
                at = Columns(inputs - bottom - last, inputs)
                gone[first:last] = _gone(block[first:last], diagonal[first:last], bounds, pattern, budgets, at)
            weighted = gone[first:last] * diagonal[first:last, None]
            for j in range(last - 1, first - 1, -1):
                column = block[j]
                if j + 1 < last:
                    column.addmv_(errors[j + 1 : last].T, inverse[j + 1 : last, j], alpha=-1)
                torch.mul(column, weighted[j - first], out=errors[j])
        remains = gone == 0
        kept[bottom:top] = remains
        block.mul_(remains)
        torch.sub(stored[bottom:top], block, out=lost[bottom:top])
        stored[bottom:top] = block

    return Solved(
        masks=[kept[:, a:b].flip(0).T.contiguous() for a, b in bounds],
        weights=[
            stored[:, a:b].to(weight.dtype).flip(0).T.contiguous()
            for (a, b), weight in zip(bounds, weights, strict=True)
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
    """Return 1 where a weight goes and 0 where it stays, ``[columns, outputs]``, in reversed order of columns."""
    saliency = (block * diagonal[:, None]).square_()
    if pattern.group:  # within groups of inputs, so that the matrices need not be told apart
        return (~pattern.keep(saliency.flip(0).T, 0, columns)).T.flip(0).to(block.dtype)
    gone = torch.empty_like(block)
    for (a, b), budget in zip(bounds, budgets, strict=True):
        keep = pattern.keep(saliency[:, a:b].flip(0).T.contiguous(), budget, columns)
        gone[:, a:b] = (~keep).T.flip(0)
    return gone


class _Factor:
    """The lower Cholesky factor of the damped Gram matrix in reversed order of inputs."""

    def __init__(self, inputs: InputStatistics, damping: float) -> None:
        self.remarks: tuple[str, ...] = ()
        for times in _RAISED:
            reversed_gram = inputs.reversed_gram()
            diagonal = reversed_gram.diagonal()
            self.dead = diagonal == 0
            diagonal[self.dead] = 1
            diagonal += damping * times * diagonal.mean()
            lower = _cholesky(reversed_gram)
            if lower is not None:
                self.lower = lower
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


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower factor, with anything above its diagonal, or ``None`` if there is none. `matrix` is lost."""
    if matrix.device.type == "cpu":  # turned, it lies in memory as LAPACK wants it, and nothing is copied
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(matrix.T, upper=True, out=(matrix.T, info))
        return None if int(info) or matrix[0, 0] != matrix[0, 0] else matrix
    result, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) else result


METHOD = register(
    Method(
        "sparsegpt",
        score,
        source="Frantar & Alistarh, ICML 2023, 2301.00774",
        needs=frozenset({GRAM}),
        solve=solve,
        parameters={
            "damping": Parameter(0.01, 1e-6, 10, "share of the mean diagonal added to the Gram matrix"),
            "columns": Parameter(128, 1, 1e6, "columns that share a threshold"),
        },
    )
)
