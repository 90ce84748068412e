"""Models to patch, and patching by hand."""

from __future__ import annotations

import torch

from pruning import Recipe, prune


def half_pruned(model, tokenizer, sparsity=0.5):
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=sparsity))
    return variant


def mixed(place, value, other):
    """A part of one value taken from another, with whole projection matrices."""
    if place.columns is not None:
        result = value.clone()
        for column in place.columns.tolist():
            result[..., column] = other[..., column]
        return result
    if place.basis is None:
        return other
    projection = place.basis @ place.basis.T
    if place.outside:
        projection = torch.eye(len(projection)) - projection
    return value @ (torch.eye(len(projection)) - projection) + other @ projection
