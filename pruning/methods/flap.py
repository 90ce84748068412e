"""FLAP: remove what fluctuates least, and put its mean into a bias."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import MOMENTS, Statistics
from .registry import Method, register


def score(
    weight: Float[Tensor, "outputs inputs"], statistics: Statistics, *, bias: float = 1
) -> Float[Tensor, " inputs"]:
    """Return ``Var(X_j) · ‖W_:j‖₂²`` in float32, for every input j of ``o`` or ``down`` (2312.11983, eq. 5).

    The published code squares the scores of ``o``, but not those of ``down``, and leaves the first sample out of the
    variance; neither is done here.
    """
    return statistics.known_inputs.variance * weight.float().square().sum(dim=0)


def compensate(
    weight: Float[Tensor, "outputs inputs"],
    statistics: Statistics,
    removed: Bool[Tensor, " inputs"],
    *,
    bias: float = 1,
) -> Float[Tensor, " outputs"] | None:
    """Return ``W (x̄ ⊙ removed)``, what the removed inputs contribute on average, or ``None`` if `bias` is 0."""
    return weight.float() @ (statistics.known_inputs.mean * removed) if bias else None


METHOD = register(
    Method(
        "flap",
        score,
        source="An et al., AAAI 2024, 2312.11983",
        needs=frozenset({MOMENTS}),
        pattern="neurons+heads",
        allocation="standardized",
        propagation="dense",
        parameters={"bias": Parameter(1, 0, 1, "1: biases make up for the mean of what goes; 0: not", whole=True)},
        scores="channels",
        compensate=compensate,
    )
)
