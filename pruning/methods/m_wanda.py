"""M-Wanda, a reconstruction: Wanda that also asks how an input differs between languages and how often it fires.

Choenni & Titov (EMNLP 2025, 2505.21171) give Wanda's score a term for the variance over languages and one for the
probability of an activation, and weight the sparsity of each layer by correlations between languages. Their exact
formulas could not be obtained; those below are ours, and results made with them are not results of their method.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..parameters import Parameter
from ..statistics import POSITIVE, SQUARES, Statistics
from .registry import Method, register


def score(
    weight: Float[Tensor, "outputs inputs"], statistics: Statistics, *, variance: float = 1.0, firing: float = 0.0
) -> Float[Tensor, "outputs inputs"]:
    """Return ``|W| · (mean_ℓ n_ℓ + variance · std_ℓ n_ℓ) · p^firing`` in float32 (a reconstruction, see above).

    ``n_ℓ`` is ``‖X_j‖₂`` in language ℓ, at equal numbers of tokens; the standard deviation is that of the population; p
    is the share of tokens with a positive input. By default `firing` is 0, which leaves the last factor out: inputs of
    great strength that are never positive would lose all their weights, which ruins models that have such inputs.
    """
    inputs = statistics.known_inputs
    norms = torch.stack(list(inputs.norms_by_language().values()))
    strength = norms.mean(dim=0) + variance * norms.std(dim=0, correction=0)
    return weight.float().abs() * (strength * inputs.firing.pow(firing))


METHOD = register(
    Method(
        "m-wanda",
        score,
        source="reconstruction after Choenni & Titov, EMNLP 2025, 2505.21171",
        needs=frozenset({SQUARES, POSITIVE}),
        pattern="row",
        allocation="cross-lingual",
        parameters={
            "variance": Parameter(1, 0, 100, "weight of the deviation between languages"),
            "firing": Parameter(0, 0, 10, "exponent of the share of tokens with a positive input"),
        },
    )
)
