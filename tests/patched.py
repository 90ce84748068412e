"""Models to patch, and patching by hand."""

from __future__ import annotations

from contextlib import ExitStack
from operator import attrgetter

import torch

from pruning import Recipe, prune
from pruning.models.anatomy import HEADS


def half_pruned(model, tokenizer, sparsity=0.5):
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=sparsity))
    return variant


def hooked(model, anatomy, edits, **run):
    """The model's own logits with values changed, or only seen, by plain PyTorch hooks.

    An edit is a block, a site, and a function that returns the new value, or None to leave it.
    """

    def hook(layer, site, change):
        def replace(module, inputs, output):
            value = anatomy.site(layer, site, output, run["input_ids"].shape)
            changed = change(value.clone())
            return None if changed is None else anatomy.with_site(layer, site, output, changed)

        def replace_first(module, inputs):
            changed = change(inputs[0].clone())
            return None if changed is None else (changed, *inputs[1:])

        module = attrgetter(anatomy.path(layer, site))(model)
        if site in HEADS:
            return module.register_forward_pre_hook(replace_first)
        return module.register_forward_hook(replace)

    with ExitStack() as hooks, torch.no_grad():
        for edit in edits:
            hooks.callback(hook(*edit).remove)
        return model(**run).logits


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
