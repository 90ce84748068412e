"""DSnoT: exchange a pruned and a kept weight of a row until its expected output is that of the dense row.

For a row w with pruned weights P, the expected error is ``E = Σ_P w_j S_j``; S_j is a multiple of the mean of input
j. A cycle revives the pruned weight that lowers E most for the variance of its input, and prunes the least important
kept weight that lowers E too. Only means, variances and norms of the inputs are needed, so that memory is that of
Wanda.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..parameters import Parameter
from ..patterns import Pattern
from ..statistics import MOMENTS, SQUARES, InputStatistics
from .registry import Refiner

#: Length of the sequences over which the published code sums inputs: the unit of the tolerance.
_PUBLISHED = 2048
#: Weights whose rows are refined together.
_AT_A_TIME = {"cpu": 1 << 20}
_AT_A_TIME_ON_A_GPU = 1 << 25
#: Share of rows that must be unfinished; else the others are put aside.
_UNFINISHED = 0.5


def refine(
    weight: Float[Tensor, "outputs inputs"],
    mask: Bool[Tensor, "outputs inputs"],
    inputs: InputStatistics,
    pattern: Pattern,
    *,
    cycles: float = 50,
    tolerance: float = 0.1,
) -> Bool[Tensor, "outputs inputs"]:
    """Return a mask with a smaller expected error and as many weights in every row (or group of n:m).

    Zhang et al., ICLR 2024, 2310.08915. Each cycle of a row revives, of the pruned weights whose ``w_j S_j`` has the
    sign of E, that with the largest ``|w_j S_j| / Var_j``, and prunes, of the kept weights whose ``w_i S_i`` has the
    opposite sign, that with the lowest Wanda score. A weight is moved once. A row is finished when ``|E|`` is at most
    the tolerance, or no such pair is left. With n:m, both weights are of one group, and a row is also finished when E
    has changed its sign.

    Parameters
    ----------
    weight, mask
        Dense weights and mask.
    inputs
        Must have the moments and the sums of squares.
    pattern
        The pattern of the mask.
    cycles
        Most exchanges per row.
    tolerance
        For ``S_j`` the sum of input j over 2048 average tokens, as published; so it does not depend on the length of
        the calibration sequences.
    """
    rows = max(_AT_A_TIME.get(weight.device.type, _AT_A_TIME_ON_A_GPU) // inputs.inputs, 1)
    sums, spread = inputs.mean * _PUBLISHED, inputs.variance
    spread = spread.clamp_min(torch.finfo(spread.dtype).tiny)
    parts = []
    for dense, kept in zip(weight.split(rows), mask.split(rows), strict=True):
        wide, kept = dense.float().contiguous(), kept.contiguous()  # they may be transposed
        adds = wide * sums
        state = _Rows.of(adds, adds / spread, wide.abs() * inputs.norms, kept, pattern.group or inputs.inputs)
        parts.append(_refined(kept, state, int(cycles), tolerance, until_the_sign_changes=pattern.group > 0))
    return torch.cat(parts)


class _Rows:
    """Some rows between two cycles; all but `expected` are ``[rows, groups, group]``.

    Attributes
    ----------
    adds
        What a weight adds to the expected output, ``w_j S_j``.
    merit
        The same relative to the variance of its input.
    size
        Wanda's score.
    gone, left
        Weights that may be revived, and that may be pruned.
    expected
        E, ``[rows]``.
    """

    def __init__(self, adds: Tensor, merit: Tensor, size: Tensor, gone: Tensor, left: Tensor, expected: Tensor) -> None:
        self.adds, self.merit, self.size, self.gone, self.left, self.expected = adds, merit, size, gone, left, expected

    @classmethod
    def of(cls, adds: Tensor, merit: Tensor, size: Tensor, kept: Tensor, group: int) -> _Rows:
        expected = adds.masked_fill(kept, 0).sum(dim=1)
        adds, merit, size, left = (part.unflatten(1, (-1, group)) for part in (adds, merit, size, kept))
        return cls(adds, merit, size, ~left, left.clone(), expected)

    def __getitem__(self, which: Tensor) -> _Rows:
        parts = (self.adds, self.merit, self.size, self.gone, self.left, self.expected)
        return _Rows(*(part[which] for part in parts))

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return which rows have a pair to exchange, and the weights to revive and to prune, each ``[rows]``."""
        sign = self.expected.sign()[:, None, None]
        towards = self.adds * sign
        prunable = self.left & (towards < 0)
        revivable = self.gone & (towards > 0) & prunable.any(dim=2, keepdim=True)
        best, revived = (self.merit * sign).masked_fill(~revivable, -torch.inf).flatten(1).max(dim=1)
        rows, group = torch.arange(len(best), device=best.device), self.adds.shape[2]
        where = revived // group
        costs = self.size[rows, where].masked_fill(~prunable[rows, where], torch.inf)
        return best > -torch.inf, revived, where * group + costs.argmin(dim=1)

    def exchange(self, rows: Tensor, revived: Tensor, pruned: Tensor) -> None:
        """Revive and prune a weight in each of some rows."""
        adds = self.adds.flatten(1)
        self.gone.flatten(1)[rows, revived] = False
        self.left.flatten(1)[rows, pruned] = False
        self.expected[rows] += adds[rows, pruned] - adds[rows, revived]


def _refined(
    kept: Tensor, rows: _Rows, cycles: int, tolerance: float, *, until_the_sign_changes: bool
) -> Bool[Tensor, "rows inputs"]:
    """Return the mask of some rows after their cycles."""
    refined = kept.clone()
    numbers = torch.arange(len(kept), device=kept.device)
    first = rows.expected.sign()
    for _ in range(cycles):
        found, revived, pruned = rows.pairs()
        found &= rows.expected.abs() > tolerance
        if until_the_sign_changes:
            found &= rows.expected.sign() == first[numbers]
        going = found.nonzero().flatten()
        if len(going) == 0:
            break
        if len(going) < _UNFINISHED * len(found):
            numbers, rows, revived, pruned = numbers[going], rows[going], revived[going], pruned[going]
            going = torch.arange(len(numbers), device=kept.device)
        rows.exchange(going, revived[going], pruned[going])
        refined[numbers[going], revived[going]] = True
        refined[numbers[going], pruned[going]] = False
    return refined


DSNOT = Refiner(
    "dsnot",
    "Zhang et al., ICLR 2024, 2310.08915",
    refine,
    {
        "cycles": Parameter(50, 1, 1e6, "most exchanges per row", whole=True),
        "tolerance": Parameter(0.1, 0, 1e9, "expected error of a row, summed over 2048 tokens, that needs no exchange"),
    },
    needs=frozenset({MOMENTS, SQUARES}),
)
