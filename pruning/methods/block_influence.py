"""Block influence: a block that hardly turns the hidden states matters little."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..statistics import SIMILARITY, Statistics
from .registry import Method, register


def score(weight: Tensor | None, statistics: Statistics) -> Float[Tensor, ""]:
    """Return ``1 - mean_t cos(h_t, h'_t)``, for the states of token t before and after a block.

    Men et al. (ShortGPT), 2403.03853, eq. 1. Both states are those of the residual stream, after the last block too:
    the model's final norm would make that block look vital. `weight` is not used.
    """
    return torch.tensor(statistics.known_passage.turn, dtype=torch.float64)


METHOD = register(
    Method(
        "block-influence",
        score,
        source="Men et al. (ShortGPT), 2403.03853",
        needs=frozenset({SIMILARITY}),
        pattern="blocks",
        scores="blocks",
    )
)
