"""What a corrector and a refiner are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import GRAM, InputStatistics

#: Weights that are corrected at a time, so that temporary copies stay small.
AT_A_TIME = 1 << 23
#: Columns of the Gram matrix that are multiplied at a time.
_PANEL = 1024


@dataclass(frozen=True)
class Corrected:
    """Result of a corrector for matrices that read the same input.

    Attributes
    ----------
    weights
        Updated weights, zero where pruned, in the dtype of the dense ones.
    remarks
        Notes for the record.
    """

    weights: list[Tensor]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corrector:
    """Updates the kept weights of a mask, or the biases of neurons.

    Attributes
    ----------
    name
        As written in a recipe.
    source
        The publication that defines it.
    correct
        ``correct(weights, masks, inputs, **parameters)`` returns a :class:`Corrected` for matrices that read the same
        input, given their dense weights and masks. Raises ``ArithmeticError`` if it cannot.
    parameters
        What a recipe may set.
    needs
        Statistics of the inputs that it requests.
    settle
        Instead of `correct`: ``settle(weight, pruned, inputs, bias, **parameters)`` returns the weights and the bias of
        a matrix that computes what MLP neurons fire on, given the dense weights, those of the pruned model and the
        dense bias, if any. Other matrices are left as they are. Raises ``ArithmeticError`` if it cannot.
    """

    name: str
    source: str
    correct: Callable[..., Corrected] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: frozenset[str] = frozenset({GRAM})
    settle: Callable[..., tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Refiner:
    """Improves a mask, without updating weights.

    Attributes
    ----------
    name, source, parameters
        As for a corrector.
    refine
        ``refine(weight, mask, inputs, pattern, **parameters)`` returns a mask with as many weights in each row, and in
        each group of an n:m pattern. Raises ``ArithmeticError`` if it cannot.
    needs
        Statistics of the inputs that it requests.
    """

    name: str
    source: str
    refine: Callable[..., Tensor] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs: frozenset[str] = frozenset({GRAM})


def row_errors(change: Float[Tensor, "rows inputs"], inputs: InputStatistics) -> Float[Tensor, " rows"]:
    """Return ``d G dᵀ`` for every row d of a change of weights: the summed square of what it does to the output."""
    gram = inputs.gram_itself()
    errors = change.new_zeros(len(change))
    for start in range(0, inputs.inputs, _PANEL):  # G is symmetric: half of the product will do
        panel = change[:, start : start + _PANEL]
        later = change[:, start + _PANEL :] @ gram[start + _PANEL :, start : start + _PANEL]
        square = gram[start : start + _PANEL, start : start + _PANEL]
        errors += (torch.addmm(later, panel, square, beta=2) * panel).sum(dim=1)
    return errors


def unit_diagonal(gram: Float[Tensor, "inputs inputs"]) -> Float[Tensor, " inputs"]:
    """Scale a Gram matrix to unit diagonal in place; return the norms, 1 for inputs that are always zero."""
    norms = gram.diagonal().sqrt()
    norms = norms.masked_fill(norms == 0, 1)
    gram.div_(norms).div_(norms[:, None])
    return norms


def row_by_row(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    inputs: InputStatistics,
    solve: Callable[[Float[Tensor, "rows inputs"], Bool[Tensor, "rows inputs"]], Float[Tensor, "rows inputs"]],
) -> list[Tensor]:
    """Return the updated weights that `solve` finds for some rows at a time, where they are better than none.

    A row of which rounding, a ridge or too few rounds would leave more error than the mask alone keeps its dense
    weights, so the reconstruction error on the calibration text is never above the mask's.

    Parameters
    ----------
    weights, masks
        Dense weights ``[outputs, inputs]`` and masks of matrices that read the same input.
    inputs
        Must have the Gram matrix.
    solve
        Returns updated weights of rows, given dense ones in float32 and their masks; what it returns for pruned ones
        is ignored.

    Raises
    ------
    ArithmeticError
        If an updated weight is NaN or infinite.
    """
    corrected = [torch.empty_like(weight) for weight in weights]
    rows = max(AT_A_TIME // inputs.inputs, 1)
    extremes = []
    for weight, mask, out in zip(weights, masks, corrected, strict=True):
        for dense, kept, part in zip(weight.split(rows), mask.split(rows), out.split(rows), strict=True):
            wide = dense.float()
            found = solve(wide, kept).to(weight.dtype).masked_fill_(~kept, 0)
            extremes += list(found.aminmax())
            before = row_errors(wide.masked_fill(kept, 0), inputs)
            after = row_errors(wide - found.float(), inputs)
            plain = dense.masked_fill(~kept, 0)
            torch.where((after < before)[:, None], found, plain, out=part)
    if not bool(torch.isfinite(torch.stack(extremes)).all()):
        raise ArithmeticError("an updated weight is NaN or infinite")
    return corrected
