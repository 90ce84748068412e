"""RIA, relative importance and activations: a weight's share of its row and column, times its input's norm."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import SQUARES, Statistics
from .registry import Method, register


def score(
    weight: Float[Tensor, "outputs inputs"], statistics: Statistics, *, power: float = 0.5
) -> Float[Tensor, "outputs inputs"]:
    """Return ``(|W| / Σ_column |W| + |W| / Σ_row |W|) · ‖X_j‖₂^power`` in float32.

    Zhang et al., ICLR 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models". Zero
    weights score zero, even in rows or columns of zeros.
    """
    size = weight.float().abs()
    shares = 1 / size.sum(dim=0, keepdim=True).clamp_min(1e-30) + 1 / size.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return size * shares * statistics.known_inputs.norms.pow(power)


METHOD = register(
    Method(
        "ria",
        score,
        source="Zhang et al., ICLR 2024",
        needs=frozenset({SQUARES}),
        parameters={"power": Parameter(0.5, 0, 4, "exponent of the input's norm")},
    )
)
