"""GPTQ: quantize column by column, and update the later columns to compensate for the error.

It is SparseGPT's sweep with another rule: a column is rounded to its grid instead of losing weights. Both use the same
factor of the Gram matrix, which is computed once for all recipes on the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd

import torch
from torch import Tensor

from ..parameters import Parameter
from ..quantization import Grid, Quantized
from ..statistics import GRAM, Statistics
from .columns import NARROW, factor, stacked, sweep
from .registry import Coded, Method, register
from .rtn import SYMMETRIC

#: Columns of a block, unless groups are wider.
_WIDTH = 128


def quantize(
    weights: Sequence[Tensor],
    statistics: Statistics,
    grid: Grid,
    roles: Sequence[str],
    *,
    damping: float = 0.01,
    order: float = 0,
    static: float = 0,
) -> Coded:
    """Quantize matrices that read the same input in one sweep over the columns (Frantar et al., ICLR 2023, 2210.17323).

    A group's grid is fitted when its first column is reached, on weights that were updated for all columns before it,
    unless grids are static; the grid of a whole row is that of the dense weights.

    Parameters
    ----------
    weights
        Dense weights, each ``[outputs, inputs]``.
    statistics
        Must have the Gram matrix of the inputs, on any scale.
    grid
        The grid.
    roles
        Not used.
    damping
        Share of the mean diagonal added to the Gram matrix; raised, with a remark, if the factorization fails.
    order
        1: columns by falling mean square of their inputs ("act-order"). Groups stay those of neighbouring inputs, with
        static grids, so that no index has to be stored.
    static
        1: grids of groups are fitted on the dense weights, as llm-compressor does it.

    Raises
    ------
    ArithmeticError
        If the Gram matrix cannot be factorized even with 1000 times the damping.
    """
    found = factor(statistics.known_inputs, damping, by_size=bool(order))
    ordered = weights if found.order is None else [weight[:, found.order] for weight in weights]
    stored = stacked(ordered, found.dead)
    rounding = _Rounding(stored, grid, found.order, static=bool(static))
    width = max(_WIDTH // grid.group, 1) * grid.group if grid.group else _WIDTH
    sweep(stored, found.upper, rounding, width=width, narrow=gcd(NARROW, grid.group))
    return Coded(rounding.quantized([len(weight) for weight in weights]), found.remarks)


class _Rounding:
    """Round columns to their groups' grids.

    Parameters
    ----------
    stored
        The weight, transposed, its columns in the order of the sweep; float32 ``[inputs, outputs]``.
    grid
        The grid.
    columns
        The columns in the order of the sweep, if it is not their own; grids are then static.
    static
        Whether all grids are fitted in advance.
    """

    def __init__(self, stored: Tensor, grid: Grid, columns: Tensor | None = None, *, static: bool = False) -> None:
        inputs, outputs = stored.shape
        group = grid.width(inputs)
        self._grid, self._group, self._columns = grid, group, columns
        self._codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=stored.device)
        self._scale = torch.empty(inputs // group, outputs, device=stored.device)
        self._zero = torch.empty_like(self._scale)
        self._level = torch.empty(outputs, device=stored.device)
        self._static = static or columns is not None or group == inputs
        own = stored if columns is None else torch.empty_like(stored).index_copy_(0, columns, stored)
        if self._static:
            self._fit(slice(None), own.unflatten(0, (-1, group)).aminmax(dim=1))
        self._of = None if columns is None else (columns // group).tolist()

    def _fit(self, groups: int | slice, extremes: tuple[Tensor, ...]) -> None:
        self._scale[groups], self._zero[groups] = self._grid.fit(*extremes)

    def enter(self, block: Tensor, diagonal: Tensor, begin: int) -> None:
        self._begin, self._diagonal = begin, diagonal
        self._new, self._coded = torch.empty_like(block), torch.empty_like(block)

    def approach(self, first: int, last: int, ahead: Callable[[int], Tensor]) -> None:
        at = self._begin + first
        if not self._static and at % self._group == 0:
            self._fit(at // self._group, tuple(ahead(first + self._group).aminmax(dim=0)))

    def decide(self, j: int, column: Tensor, error: Tensor) -> None:
        at = self._begin + j
        group = at // self._group if self._of is None else self._of[at]
        scale, zero = self._scale[group], self._zero[group]
        code, new = self._coded[j], self._new[j]
        torch.div(column, scale, out=code).round_().add_(zero).clamp_(0, self._grid.top)
        torch.sub(code, zero, out=new).mul_(scale)
        torch.sub(column, new, out=error).mul_(self._diagonal[j])

    def leave(self, block: Tensor) -> None:
        block.copy_(self._new)
        self._codes[self._begin : self._begin + len(block)] = self._coded.to(torch.uint8)

    def quantized(self, outputs: Sequence[int]) -> list[Quantized]:
        """Return the quantized matrices, given how many rows each has."""
        codes = self._codes
        if self._columns is not None:
            codes = torch.empty_like(codes).index_copy_(0, self._columns, codes)
        parts = zip(*(part.split(list(outputs), dim=1) for part in (codes, self._scale, self._zero)), strict=True)
        return [self._grid.coded(*(part.T.contiguous() for part in three)) for three in parts]


METHOD = register(
    Method(
        "gptq",
        source="Frantar et al., ICLR 2023, 2210.17323",
        needs=frozenset({GRAM}),
        quantize=quantize,
        parameters={
            "damping": Parameter(0.01, 1e-6, 10, "share of the mean diagonal added to the Gram matrix"),
            "order": Parameter(0, 0, 1, "1: columns by falling mean square of their inputs", whole=True),
            "static": Parameter(0, 0, 1, "1: grids of groups are fitted on the dense weights", whole=True),
            **SYMMETRIC,
        },
    )
)
