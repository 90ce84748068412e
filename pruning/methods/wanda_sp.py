"""Wanda-sp: Wanda for whole neurons and heads, each scored by the weights that read it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..statistics import SQUARES, Statistics
from .registry import Method, register


def score(weight: Float[Tensor, "outputs inputs"], statistics: Statistics) -> Float[Tensor, " inputs"]:
    """Return ``mean_i |W_ij| · ‖X_j‖₂`` in float32, for every input j of ``o`` or ``down``.

    An et al., AAAI 2024, 2312.11983, who compare FLAP with it.
    """
    return weight.float().abs().mean(dim=0) * statistics.known_inputs.norms


METHOD = register(
    Method(
        "wanda-sp",
        score,
        source="An et al., AAAI 2024, 2312.11983",
        needs=frozenset({SQUARES}),
        pattern="neurons+heads",
        scores="channels",
    )
)
