"""GBLM: Wanda's score plus a term for the gradient of the loss, sequence by sequence."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import SLOPES, SQUARES, Statistics
from .registry import Method, register

#: Number of sequences over which the published code sums squared gradients.
_PUBLISHED = 128


def score(
    weight: Float[Tensor, "outputs inputs"], statistics: Statistics, *, slope: float = 100.0
) -> Float[Tensor, "outputs inputs"]:
    """Return ``|W| · (√(Σ X_j² / N) + slope · √128 · rms g)`` in float32, N the number of sequences.

    Das et al., 2311.04902, sec. 3: ``rms g`` is the root mean square over the sequences of the gradient of a sequence's
    mean token loss in the dense model. The published code divides the sum of squared inputs by N, but not that of
    squared gradients, so that their balance changes with N; here it is what it is there with the published 128
    sequences, however many there are. Both terms still depend on the length of a sequence.
    """
    inputs = (statistics.known_inputs.squares / max(statistics.sequences, 1)).sqrt()
    slopes = statistics.known_slopes * (slope * math.sqrt(_PUBLISHED))
    return slopes.add_(inputs).mul_(weight.float().abs())


METHOD = register(
    Method(
        "gblm",
        score,
        source="Das et al., 2023, 2311.04902",
        needs=frozenset({SQUARES, SLOPES}),
        pattern="row",
        parameters={"slope": Parameter(100, 0, 1e9, "weight of the gradient")},
    )
)
