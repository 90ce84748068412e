"""Round to nearest: every weight to the nearest value of its group's grid. Needs no text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..parameters import Parameter
from ..quantization import Grid
from ..statistics import Statistics
from .registry import Coded, Method, register

#: The parameter that all quantizing methods have; it is part of their grid.
SYMMETRIC = {"symmetric": Parameter(0, 0, 1, "1: codes symmetric around a fixed zero, without zero points", whole=True)}


def quantize(weights: Sequence[Tensor], statistics: Statistics, grid: Grid, roles: Sequence[str]) -> Coded:
    """Round matrices, each ``[outputs, inputs]``; neither statistics nor roles are used."""
    return Coded([grid.quantized(weight) for weight in weights])


METHOD = register(
    Method("rtn", source="the baseline of Frantar et al., 2210.17323", quantize=quantize, parameters=SYMMETRIC)
)
