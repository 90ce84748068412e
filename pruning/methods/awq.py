"""AWQ: scale up the inputs' weights that matter before rounding, then clip the grids; both by a search.

The published code measures what a candidate does to the output of whole modules on stored inputs. Here the error of a
candidate Ŵ is that of the projections themselves, ‖X (W - Ŵ)ᵀ‖², which the Gram matrix G of the inputs gives exactly,
tr (W - Ŵ) G (W - Ŵ)ᵀ: no inputs are stored, and all calibration text counts. The scales are not fused into the module
before, which only some architectures allow, but stored with the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from ..parameters import Parameter
from ..quantization import Grid
from ..statistics import ABSOLUTE, GRAM, Statistics
from .registry import Coded, Method, register
from .rtn import SYMMETRIC

#: The powers of the inputs' mean magnitude that are tried as scales: 0, 1/20, ... 19/20.
_POWERS = 20
#: The shares of a group's largest weight that its grid is clipped to: 1, 0.95, ... 0.55.
_CLIPPED = tuple(1 - step / 20 for step in range(10))
#: Roles whose grids are not clipped.
_NEVER_CLIPPED = ("q", "k")
#: The smallest mean magnitude and scale.
_LEAST = 1e-4
#: Number of weights whose error is computed at a time.
_AT_A_TIME = 1 << 24


def quantize(
    weights: Sequence[Tensor], statistics: Statistics, grid: Grid, roles: Sequence[str], *, clip: float = 1
) -> Coded:
    """Quantize matrices that read the same input (Lin et al., MLSys 2024, 2306.00978).

    The scale of input j is ``mean|x_j|^r``, normalised so that the largest and the smallest are each other's inverse;
    of 20 powers r from 0 to 0.95 the one with the least error of all matrices together is taken. Then each group's grid
    is clipped to the share of its largest weight, of ten from 1 to 0.55, with the least error of the group's own part
    of the output. With the power 0 and without clipping this is rounding to nearest.

    Parameters
    ----------
    weights
        Dense weights, each ``[outputs, inputs]``.
    statistics
        Must have the Gram matrix and the mean magnitude of the inputs.
    grid
        The grid.
    roles
        What the matrices are: q and k are not clipped.
    clip
        0: no clipping.

    Raises
    ------
    ArithmeticError
        If an input is NaN or infinite.
    """
    inputs = statistics.known_inputs
    gram, magnitude = inputs.gram_itself(), inputs.mean_magnitude.clamp(min=_LEAST)
    if not bool(torch.isfinite(magnitude).all()):
        raise ArithmeticError("an input is NaN or infinite")
    dense = [weight.float() for weight in weights]
    errors = []
    for step in range(_POWERS):
        scale = _scale(magnitude, step)
        each = [_error(w - grid.quantized(w * scale.float(), scale).weight(), gram) for w in dense]
        errors.append(torch.stack(each).sum())
    scale = _scale(magnitude, int(torch.stack(errors).argmin()))
    found = []
    for weight, role in zip(dense, roles, strict=True):
        large = weight * scale.float()
        if clip and role not in _NEVER_CLIPPED:
            large = _clipped(large, gram, scale, grid)
        found.append(grid.quantized(large, scale))
    return Coded(found)


def _scale(magnitude: Float[Tensor, " inputs"], step: int) -> Float16[Tensor, " inputs"]:
    """Return the scales for a power of the inputs' mean magnitude, in the 16 bits that they are stored in."""
    scale = magnitude.pow(step / _POWERS).clamp(min=_LEAST)
    return (scale / (scale.max() * scale.min()).sqrt()).half()


def _error(difference: Float[Tensor, "outputs inputs"], gram: Float[Tensor, "inputs inputs"]) -> Tensor:
    """Return ``tr D G Dᵀ``, float64: what a difference of weights does to the output, over tokens and outputs."""
    rows = max(_AT_A_TIME // difference.shape[1], 1)
    parts = [((some @ gram) * some).sum(dtype=torch.float64) for some in difference.split(rows)]
    return torch.stack(parts).sum()


def _clipped(
    weight: Float[Tensor, "outputs inputs"],
    gram: Float[Tensor, "inputs inputs"],
    scale: Float16[Tensor, " inputs"],
    grid: Grid,
) -> Float[Tensor, "outputs inputs"]:
    """Return a scaled weight, each group clipped to the limit with the least error of its part of the output."""
    inputs = weight.shape[1]
    width = grid.width(inputs)
    blocks = gram.unflatten(1, (-1, width)).unflatten(0, (-1, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = scale.float().unflatten(0, (-1, width))
    within = blocks / own[:, None] / own[:, :, None]  # of the scaled inputs, [groups, w, w]
    rows = max(_AT_A_TIME // inputs, 1)
    parts = []
    for some in weight.split(rows):
        grouped = some.unflatten(1, (-1, width))
        largest = grouped.abs().amax(dim=2, keepdim=True)
        best, least = largest, torch.full_like(largest, torch.inf)
        for share in _CLIPPED:
            limit = share * largest
            made = grid.quantized(torch.clamp(grouped, -limit, limit).flatten(1)).weight().unflatten(1, (-1, width))
            difference = (grouped - made).transpose(0, 1)  # [groups, rows, w]
            error = ((difference @ within) * difference).sum(dim=2).T[..., None]
            best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
        parts.append(torch.clamp(grouped, -best, best).flatten(1))
    return torch.cat(parts)


METHOD = register(
    Method(
        "awq",
        source="Lin et al., MLSys 2024, 2306.00978",
        needs=frozenset({GRAM, ABSOLUTE}),
        quantize=quantize,
        parameters={"clip": Parameter(1, 0, 1, "0: grids are not clipped", whole=True), **SYMMETRIC},
        search=float(_POWERS),
    )
)
