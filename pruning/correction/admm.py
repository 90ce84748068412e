"""ADMM: iterative least squares on a given mask, all rows of a matrix at once.

The kept weights of every row minimise ``(ŵ − w) H (ŵ − w)ᵀ``, where H is the Gram matrix of the inputs, scaled to unit
diagonal, plus a ridge. The rows' masks differ, so an exact solution takes a system of equations for each. ADMM
alternates between the minimum without the mask, for which one matrix is inverted for all rows, and the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import InputStatistics
from .registry import Corrected, Corrector, row_by_row, unit_diagonal


def correct(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    inputs: InputStatistics,
    *,
    ridge: float = 0.1,
    penalty: float = 1.0,
    rounds: float = 20,
) -> Corrected:
    """Update the kept weights of matrices that read the same input (Boža, 2024, 2401.02938, with a given mask).

    A round takes one product with a ``[inputs, inputs]`` matrix. Its inverse is computed once for all recipes with the
    same `ridge` and `penalty` on the same calibration set.

    Parameters
    ----------
    weights, masks
        Dense weights ``[outputs, inputs]`` and their masks.
    inputs
        Must have the Gram matrix, on any scale.
    ridge
        Added to the unit diagonal of the scaled Gram matrix; keeps updated weights near the dense ones. Because of it
        the error on the calibration text stays above that of least squares.
    penalty
        ADMM's ρ.
    rounds
        Number of rounds.

    Raises
    ------
    ArithmeticError
        If the Gram matrix is not finite.
    """
    system = _system(inputs, ridge, penalty)
    gram = inputs.gram_itself()

    def solve(dense: Float[Tensor, "rows inputs"], kept: Bool[Tensor, "rows inputs"]) -> Float[Tensor, "rows inputs"]:
        weight = dense * system.scale
        target = (dense @ gram).div_(system.scale).add_(weight, alpha=ridge)
        sign = kept.to(weight.dtype).mul_(2).sub_(1)
        pruned = ~kept
        dual = torch.zeros_like(weight)
        for _ in range(int(rounds)):
            # With S = V + U, Z = S where kept, and U = S where pruned: Z − U is S with its pruned part negated.
            total = dual.add_(weight)
            right = torch.addcmul(target, sign, total, value=penalty)
            torch.mm(right, system.inverse, out=weight)
            dual = total.mul_(pruned)
        return weight / system.scale

    return Corrected(row_by_row(weights, masks, inputs, solve))


@dataclass(frozen=True)
class _System:
    """Norms of the inputs, 1 for dead ones, and the inverse of ``H + ρI``."""

    scale: Float[Tensor, " inputs"]
    inverse: Float[Tensor, "inputs inputs"]


def _system(inputs: InputStatistics, ridge: float, penalty: float) -> _System:
    key = ("admm", ridge, penalty)
    if key not in inputs.memo:
        inputs.memo[key] = _inverted(inputs, ridge, penalty)
    system: _System = inputs.memo[key]
    return system


def _inverted(inputs: InputStatistics, ridge: float, penalty: float) -> _System:
    matrix = inputs.gram_itself().clone()
    scale = unit_diagonal(matrix)
    matrix.diagonal().add_(ridge + penalty)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise ArithmeticError("the Gram matrix of the inputs is not finite")
    del matrix
    return _System(scale, torch.cholesky_inverse(lower))


ADMM = Corrector(
    "admm",
    "Boža, 2024, 2401.02938",
    correct,
    {
        "ridge": Parameter(0.1, 0, 10, "added to the unit diagonal of the scaled Gram matrix"),
        "penalty": Parameter(1, 1e-3, 1e3, "ADMM's rho"),
        "rounds": Parameter(20, 1, 10_000, "rounds of ADMM", whole=True),
    },
)
