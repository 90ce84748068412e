"""The sweep over columns that SparseGPT and GPTQ share: change one column, and update the later ones to compensate.

The published algorithms propagate the error of a column to all later ones through U, the upper Cholesky factor of the
inverse Gram matrix. With G = R Rᵀ and R upper triangular, U is the inverse of R, and the same updates follow from R
alone: a column's updated weight is ``w_j + (Σ_{k<j} d_k R_kj) / R_jj``, where d_k is the total change of the earlier
column k. So one factorization suffices, nothing is inverted, and when a block of columns is reached, its updates from
all earlier columns take one matrix product.

LAPACK has no factorization with the upper factor on the left. The one below works on panels of columns, from the last
to the first; it consists almost entirely of matrix products, and is faster than LAPACK's Cholesky. Weights are stored
transposed, ``[inputs, outputs]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..statistics import InputStatistics

#: Number of columns updated one by one before the rest of their block is updated.
NARROW = 32
#: Number of blocks whose updates from earlier columns are computed together: wider matrix products are faster.
_STRETCH = 4
#: Number of columns of the Gram matrix factorized at a time.
_PANEL = 256
#: Factors by which damping is raised until the factorization succeeds.
_RAISED = (1, 10, 100, 1000)


@runtime_checkable
class Rule(Protocol):
    """What becomes of each column. The methods are called in the order of the columns."""

    def enter(self, block: Tensor, diagonal: Tensor, begin: int) -> None:
        """Start a block of columns, updated for all columns before it; `diagonal` is R's."""

    def approach(self, first: int, last: int, ahead: Callable[[int], Tensor]) -> None:
        """Start the narrow run of columns from `first` to `last` of the block, updated for all columns before it.

        ``ahead(stop)`` returns the columns of the block from `first` to `stop`, updated likewise.
        """

    def decide(self, j: int, column: Tensor, error: Tensor) -> None:
        """Decide on column j of the block; write (weight - new weight) · R_jj into `error`."""

    def leave(self, block: Tensor) -> None:
        """Finish a block: replace its columns by the new ones."""


def sweep(
    stored: Float[Tensor, "inputs outputs"],
    upper: Float[Tensor, "inputs inputs"],
    rule: Rule,
    *,
    width: int,
    narrow: int,
) -> None:
    """Replace the columns of a weight, one after the other, by what a rule decides.

    Parameters
    ----------
    stored
        The weight, transposed; changed in place.
    upper
        R, valid on and above the diagonal.
    rule
        Decides on the columns.
    width, narrow
        Columns of a block, and of a run that is updated column by column.
    """
    inputs = len(upper)
    lost = torch.empty_like(stored)
    identity = torch.eye(width, device=stored.device)
    stretch = _STRETCH * width
    owed = torch.zeros_like(stored[:stretch])  # updates of a stretch of blocks from the columns before it

    for begin in range(0, inputs, width):
        end = min(begin + width, inputs)
        size = end - begin
        block = stored[begin:end].clone()
        square = upper[begin:end, begin:end]
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
        rule.enter(block, square.diagonal(), begin)
        errors = torch.empty_like(block)
        for first in range(0, size, narrow):
            last = min(first + narrow, size)
            if first:
                block[first:last].addmm_(inverse[first:last, :first], errors[:first], alpha=-1)
            rule.approach(first, last, _Ahead(block, inverse, errors, first, last))
            for j in range(first, last):
                column = block[j]
                if j > first:
                    column.addmv_(errors[first:j].T, inverse[j, first:j], alpha=-1)
                rule.decide(j, column, errors[j])
        rule.leave(block)
        torch.sub(stored[begin:end], block, out=lost[begin:end])
        stored[begin:end] = block


class _Ahead:
    """Columns of a block that are not reached yet, updated for those before the present run."""

    def __init__(self, block: Tensor, inverse: Tensor, errors: Tensor, first: int, last: int) -> None:
        self._block, self._inverse, self._errors = block, inverse, errors
        self._first, self._last = first, last

    def __call__(self, stop: int) -> Tensor:
        if not self._first or stop <= self._last:
            return self._block[self._first : stop]
        later = slice(self._last, stop)
        updates = self._inverse[later, : self._first] @ self._errors[: self._first]
        return torch.cat([self._block[self._first : self._last], self._block[later] - updates])


def stacked(weights: Sequence[Tensor], dead: Tensor) -> Float[Tensor, "inputs outputs"]:
    """Return matrices that read the same input as one, transposed, float32, and zero where inputs are dead."""
    together = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    stored = torch.empty(together.shape[::-1], dtype=torch.float32, device=together.device).copy_(together.T)
    return stored.masked_fill_(dead[:, None], 0)


class Factor:
    """The upper Cholesky factor R of the damped Gram matrix, ``G = R Rᵀ``; entries below the diagonal are garbage.

    Parameters
    ----------
    inputs
        Statistics with the Gram matrix.
    damping
        Share of the mean diagonal that is added to the diagonal; raised if the factorization fails.
    order
        Order of the inputs; their own by default.

    Attributes
    ----------
    upper
        R, float32 ``[inputs, inputs]``.
    order
        Order of the inputs, ``[inputs]``; ``None`` if it is their own.
    dead
        Inputs that are always zero, bool ``[inputs]``, in that order.
    remarks
        Says so if damping was raised.

    Raises
    ------
    ArithmeticError
        If the Gram matrix cannot be factorized even with 1000 times the damping.
    """

    def __init__(self, inputs: InputStatistics, damping: float, order: Tensor | None = None) -> None:
        self.remarks: tuple[str, ...] = ()
        self.order = order
        for times in _RAISED:
            self.upper = inputs.gram_above_diagonal() if order is None else inputs.gram_itself()[order[:, None], order]
            diagonal = self.upper.diagonal()
            self.dead = diagonal == 0
            diagonal.masked_fill_(self.dead, 1)
            diagonal += damping * times * diagonal.mean()
            if factorize(self.upper):
                if times > 1:
                    self.remarks = (f"damping raised from {damping:g} to {damping * times:g}",)
                return
        raise ArithmeticError(f"the Gram matrix of the inputs has no Cholesky factor even with {times} x the damping")


def factor(inputs: InputStatistics, damping: float, *, by_size: bool = False) -> Factor:
    """Return the factor of the inputs' Gram matrix; it is computed once for all recipes that use it.

    Parameters
    ----------
    inputs, damping
        As for :class:`Factor`.
    by_size
        Whether inputs are ordered by falling mean square.
    """
    key = ("factor", damping, by_size)
    if key not in inputs.memo:
        order = torch.argsort(inputs.squares, descending=True, stable=True) if by_size else None
        inputs.memo[key] = Factor(inputs, damping, order)
    found: Factor = inputs.memo[key]
    return found


def factorize(matrix: Tensor) -> bool:
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
