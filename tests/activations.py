"""Inputs of a projection like those of a model, and their statistics."""

from __future__ import annotations

import torch

from pruning.statistics import GRAM, InputStatistics


def inputs_like_a_models(inputs: int, tokens: int) -> torch.Tensor:
    """Return inputs of unequal scales that are correlated, ``[tokens, inputs]``; always the same."""
    random = torch.Generator().manual_seed(1)
    scales = torch.randn(inputs, generator=random).exp()
    causes = torch.randn(tokens, 8, generator=random) @ torch.randn(8, inputs, generator=random) / 3
    return (torch.randn(tokens, inputs, generator=random) + causes) * scales


def statistics_of(x: torch.Tensor, *needs: str) -> InputStatistics:
    """Return statistics of inputs that come in batches; the Gram matrix unless others are named."""
    statistics = InputStatistics(x.shape[1], frozenset(needs or {GRAM}))
    for rows in x.split(100):
        statistics.add(rows)
    return statistics
