"""Firing: biases that keep each MLP neuron's probability of firing, whatever its row has lost.

A neuron fires where its activation function gets a positive input, z = w·x + b. Pruning w changes the mean of z and
its spread, so that some neurons fire more rarely, some more often, and the rarest are the first to fall silent. Means
and covariances of x are known from the text; if z is normally distributed, the neuron fires with probability
Φ(mean / standard deviation), and a bias can bring it back to that of the dense row on the same inputs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import GRAM, MOMENTS, InputStatistics
from .registry import AT_A_TIME, Corrector, row_errors

#: Share of the mean square below which a variance is rounding.
_ROUNDING = 1e-6


def settle(
    weight: Float[Tensor, "neurons inputs"],
    pruned: Float[Tensor, "neurons inputs"],
    inputs: InputStatistics,
    bias: Float[Tensor, " neurons"] | None,
    *,
    scale: float | int = 0,
    permute: float | int = 0,
) -> tuple[Float[Tensor, "neurons inputs"], Float[Tensor, " neurons"]]:
    """Return the weights and biases with which neurons fire as often as before, as far as z is normal.

    With mean μ and standard deviation σ of z over the calibration text before pruning, and μ', σ' after, without a
    bias, the new bias is ``μ·σ'/σ − μ'``, so that the ratio of mean and deviation is that of the dense row. With
    `scale`, the kept weights are multiplied by σ/σ' too, and mean and deviation themselves are kept. Where z does not
    vary before or after (the row has lost all its weights, say), the mean alone is kept.

    Parameters
    ----------
    weight, pruned
        Dense weights, and those to correct, 0 where pruned, of the matrix that computes z.
    inputs
        Must have the Gram matrix and the moments.
    bias
        The dense bias, if there is one.
    scale
        1 to rescale the kept weights as well, 0 to leave them as they are.
    permute
        A control: if above 0, the seed of a random order in which the changes of the biases are dealt out to the
        neurons of the matrix, which keeps their sizes, and `scale` those of the factors.

    Raises
    ------
    ArithmeticError
        If a bias is NaN or infinite.
    """
    own = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float()
    before, spread = _moments(weight, inputs)
    after, left = _moments(pruned, inputs)
    varies = (spread > 0) & (left > 0)
    one = torch.ones_like(spread)
    shrunk = torch.where(varies, left / torch.where(varies, spread, one), one)
    mean = before + own
    factor = 1 / shrunk if scale else one
    change = (mean - factor * after if scale else mean * shrunk - after) - own
    if permute:
        order = torch.randperm(len(change), generator=torch.Generator().manual_seed(int(permute))).to(change.device)
        change, factor = change[order], factor[order]
    if not bool(torch.isfinite(change).all() & torch.isfinite(factor).all()):
        raise ArithmeticError("a bias is NaN or infinite")
    scaled = (pruned.float() * factor[:, None]).to(weight.dtype) if scale else pruned
    return scaled, (own + change).to(weight.dtype)


def _moments(
    weight: Float[Tensor, "neurons inputs"], inputs: InputStatistics
) -> tuple[Float[Tensor, " neurons"], Float[Tensor, " neurons"]]:
    """Return mean and standard deviation of ``w·x`` over the text, 0 where it does not vary."""
    means, squares = [], []
    for rows in weight.split(max(AT_A_TIME // inputs.inputs, 1)):
        wide = rows.float()
        means.append(wide @ inputs.mean)
        squares.append(row_errors(wide, inputs) / inputs.tokens)
    mean, square = torch.cat(means), torch.cat(squares)
    variance = square - mean.square()
    return mean, torch.where(variance > _ROUNDING * square, variance, 0).sqrt()


FIRING = Corrector(
    "firing",
    "biases of MLP neurons that keep the ratio of mean and standard deviation of what they are given",
    settle=settle,
    needs=frozenset({GRAM, MOMENTS}),
    parameters={
        "scale": Parameter(0, 0, 1, "1: rescale the kept weights too, to keep the deviation; 0: not", whole=True),
        "permute": Parameter(0, 0, 2**31 - 1, "a control: seed of an order in which changes are dealt out", whole=True),
    },
)
