"""SNIP: the score of a weight is the sensitivity of the loss to scaling it down."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..statistics import GRADIENT, Statistics
from .registry import Method, register


def score(weight: Float[Tensor, "outputs inputs"], statistics: Statistics) -> Float[Tensor, "outputs inputs"]:
    """Return ``|w · ∂L/∂w|`` in float32, with L the mean token loss (Lee et al., ICLR 2019, 1810.02340)."""
    return (weight.float() * statistics.known_gradient).abs()


METHOD = register(
    Method(
        "snip",
        score,
        source="Lee et al., ICLR 2019, 1810.02340",
        needs=frozenset({GRADIENT}),
        pattern="model",
    )
)
