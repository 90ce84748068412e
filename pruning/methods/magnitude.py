"""Magnitude pruning: the score of a weight is its absolute value."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..statistics import Statistics
from .registry import Method, register


def score(
    weight: Float[Tensor, "outputs inputs"], statistics: Statistics | None = None
) -> Float[Tensor, "outputs inputs"]:
    """Return ``|W|`` in float32; `statistics` are not used."""
    return weight.float().abs()


METHOD = register(Method("magnitude", score, source="Han et al., NeurIPS 2015, 1506.02626"))
