"""GraSP: prune the weights whose removal reduces the gradient flow least, or increases it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..statistics import CURVATURE, Statistics
from .registry import Method, register


def score(weight: Float[Tensor, "outputs inputs"], statistics: Statistics) -> Float[Tensor, "outputs inputs"]:
    """Return ``w · (H g)`` in float32, with H and g of the mean token loss (Wang et al., ICLR 2020, 2002.07376).

    The paper prunes the largest of ``-w · (H g)``; here the lowest scores are pruned, which is the same.
    """
    return weight.float() * statistics.known_curvature


METHOD = register(
    Method(
        "grasp",
        score,
        source="Wang et al., ICLR 2020, 2002.07376",
        needs=frozenset({CURVATURE}),
        pattern="model",
    )
)
