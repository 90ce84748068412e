"""M-Wanda, a reconstruction: Wanda with the variation of input norms between languages and their firing rates.

Choenni & Titov (EMNLP 2025, 2505.21171) add to Wanda's score a term for the variance across languages and one for the
activation probability, and weight each layer's sparsity by cross-lingual correlations. Their exact formulas were not
available; those below are ours, and results obtained with them are not results of their method.
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

    ``n_ℓ`` is ``‖X_j‖₂`` in language ℓ, rescaled to equal numbers of tokens; ``std`` is the population standard
    deviation; p is the share of tokens with a positive input. By default `firing` is 0, which drops the last factor:
    otherwise strong inputs that are never positive would lose all their weights, which ruins models that have them.
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
            "variance": Parameter(1, 0, 100, "weight of the standard deviation across languages"),
            "firing": Parameter(0, 0, 10, "exponent of the share of tokens with a positive input"),
        },
    )
)
