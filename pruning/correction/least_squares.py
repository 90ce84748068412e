"""Least squares: the best weights for a given mask, one system of equations a row; for small matrices and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import InputStatistics
from .registry import Corrected, Corrector, row_by_row, unit_diagonal

#: Entries of the rows' systems of equations that are held at a time.
_ENTRIES = 1 << 23
#: Factors by which the ridge is raised until the factorizations succeed.
_RAISED = (1, 10, 100, 1000, 10_000)
#: Smallest ridge that is tried after none.
_SMALLEST = 1e-7


def correct(
    weights: Sequence[Tensor], masks: Sequence[Tensor], inputs: InputStatistics, *, ridge: float = 1e-6
) -> Corrected:
    """Update the kept weights of every row to ``G_KK⁻¹ G_K· w``, in float64, where K are the row's kept inputs.

    What is solved for is the change of the kept weights that makes up for the pruned ones: where the text is too short
    to determine it, the ridge picks the smallest. A row with k kept weights takes ``k³/3`` multiplications.

    Parameters
    ----------
    weights, masks
        Dense weights ``[outputs, inputs]`` and their masks.
    inputs
        Must have the Gram matrix, on any scale.
    ridge
        Added to the diagonal of the Gram matrix, which is scaled to unit diagonal first. The default is about as exact
        as sums in float32 are; raised, with a remark, if a factorization fails.

    Raises
    ------
    ArithmeticError
        If a factorization fails even with the highest ridge, as when the Gram matrix is not finite.
    """
    exact = torch.float32 if inputs.device.type == "mps" else torch.float64  # that device has no float64
    gram = inputs.gram_itself().to(exact, copy=True)
    scale = unit_diagonal(gram)
    for times in _RAISED:
        added = max(ridge, _SMALLEST * (times > 1)) * times
        solver = _Solver(gram, scale, added)
        corrected = row_by_row(weights, masks, inputs, solver.rows)
        if solver.failed is None or not bool(solver.failed):
            raised = (f"ridge raised from {ridge:g} to {added:g}",) if times > 1 else ()
            return Corrected(corrected, raised)
    raise ArithmeticError(f"the Gram matrix of the inputs has no Cholesky factor even with a ridge of {added:g}")


class _Solver:
    """Solves the systems of many rows at once, padded to the most weights that any of them keeps.

    Attributes
    ----------
    failed
        Whether a factorization failed, a tensor on the device; ``None`` before any.
    """

    def __init__(self, gram: Float[Tensor, "inputs inputs"], scale: Float[Tensor, " inputs"], ridge: float) -> None:
        self.gram = gram
        self.scale = scale
        self.ridge = ridge
        self.failed: Tensor | None = None

    def rows(
        self, dense: Float[Tensor, "rows inputs"], kept: Bool[Tensor, "rows inputs"]
    ) -> Float[Tensor, "rows inputs"]:
        most = int(kept.sum(dim=1).amax())
        corrected = dense.clone()
        if most == 0:
            return corrected
        few = max(_ENTRIES // most**2, 1)
        for rows, mask, out in zip(dense.split(few), kept.split(few), corrected.split(few), strict=True):
            out.copy_(self._few(rows, mask, most))
        return corrected

    def _few(
        self, dense: Float[Tensor, "rows inputs"], kept: Bool[Tensor, "rows inputs"], most: int
    ) -> Float[Tensor, "rows inputs"]:
        weight = dense.to(self.gram.dtype) * self.scale
        places = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        there = kept.gather(1, places)
        systems = self.gram[places[:, :, None], places[:, None, :]]
        systems.mul_(there[:, :, None] & there[:, None, :])
        systems.diagonal(dim1=1, dim2=2).add_(self.ridge).add_(~there)
        owed = (weight.masked_fill(kept, 0) @ self.gram).gather(1, places) * there
        lower, failed = torch.linalg.cholesky_ex(systems)
        change = torch.cholesky_solve(owed[:, :, None], lower)[:, :, 0]
        wrong = failed != 0
        self.failed = wrong.any() if self.failed is None else self.failed | wrong.any()
        weight.scatter_add_(1, places, change.masked_fill_(~there | wrong[:, None], 0))
        return (weight / self.scale).to(dense.dtype)


LEAST_SQUARES = Corrector(
    "least-squares",
    "the minimum of the reconstruction error on a given mask",
    correct,
    {"ridge": Parameter(1e-6, 0, 10, "added to the unit diagonal of the scaled Gram matrix")},
)
