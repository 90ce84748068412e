"""Wanda: the score of a weight is its absolute value times its input's norm."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..statistics import SQUARES, Statistics
from .registry import Method, register


def score(weight: Float[Tensor, "outputs inputs"], statistics: Statistics) -> Float[Tensor, "outputs inputs"]:
    """Return ``|W_ij| · ‖X_j‖₂`` in float32 (Sun et al., ICLR 2024, 2306.11695, eq. 1).

    The published code divides the norm by the number of samples, which scales all scores alike and changes no rank.
    """
    return (weight.float() * statistics.known_inputs.norms).abs_()


METHOD = register(
    Method("wanda", score, source="Sun et al., ICLR 2024, 2306.11695", needs=frozenset({SQUARES}), pattern="row")
)
