"""From the statistics of a block to the masks of one job, where whole neurons or heads are removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..allocation import UNIFORM, Budgets
from ..methods import magnitude
from ..models.anatomy import Anatomy
from ..models.families import Family
from ..models.layouts import role_kind
from ..patterns import BLOCKS
from ..recipes import Recipe
from ..statistics import InputStatistics, Passage, Statistics
from . import choosing
from .choosing import Choice, Derivatives, finite, not_finite, scored, unseen
from .parts import weighted
from .structures import covered_families


def choose(
    anatomy: Anatomy,
    layer: int,
    recipe: Recipe,
    budgets: Budgets,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Choice:
    """Return one job's masks and weights for one block; see :func:`pruning.engine.choosing.choose`.

    Where the recipe removes structures, the budget of a projection is that of the whole structures in it.
    """
    if not recipe.choosing.structure:
        return choosing.choose(anatomy, layer, recipe, budgets, inputs, derivatives, masks)
    choice, inputs = Choice(), weighted(recipe, inputs)
    if recipe.pattern == BLOCKS:
        return _whole_block(anatomy, layer, budgets)
    for family in covered_families(anatomy, layer, recipe):
        scores, remarks = unit_scores(anatomy, layer, family, recipe, inputs, derivatives)
        reader = anatomy.shape(layer, family.reader)
        count = budgets[layer, family.reader] // family.weights(family.reader, reader)
        kept = recipe.choosing.keep(scores[None], count)[0]
        choice.masks |= {role: family.mask(role, kept, anatomy.shape(layer, role)) for role in family.roles}
        choice.biases |= _without(anatomy, layer, family, kept) if count else {}
        alike = recipe.allocation == UNIFORM  # in all blocks, and all experts
        where, role = ("", role_kind(family.reader)) if alike else (f"block {layer}: ", family.reader)
        said = f"{where}{count} of {family.units} {family.called} removed (inputs of {role})"
        choice.remarks += remarks if said in choice.remarks else [*remarks, said]
        if recipe.scoring.compensate is not None and count:
            _compensate(anatomy, layer, family, recipe, inputs, kept, choice)
    return choice


def _compensate(
    anatomy: Anatomy,
    layer: int,
    family: Family,
    recipe: Recipe,
    inputs: Mapping[str, InputStatistics],
    kept: Tensor,
    choice: Choice,
) -> None:
    """Add to the bias of the reader what the method says that the removed units contributed."""
    role = family.reader
    if "." in role:
        choice.remarks.append("experts have no biases that could make up for removed neurons")
        return
    weight, removed = anatomy.weight(layer, role), ~kept.repeat_interleave(family.width)
    leader = next(group.leader for group in anatomy.groups(layer) if role in group.roles)
    assert recipe.scoring.compensate is not None
    added = recipe.scoring.compensate(weight, Statistics(inputs.get(leader)), removed, **recipe.method_parameters)
    if added is not None:
        bias = anatomy.bias(layer, role)
        choice.biases[role] = (added if bias is None else bias.float() + added).to(weight.dtype)


def _without(anatomy: Anatomy, layer: int, family: Family, kept: Tensor) -> dict[str, Tensor]:
    """Return the biases of the projections that compute the units, zero for removed ones, so that they are silent."""
    biases = {role: anatomy.bias(layer, role) for role in family.rows}
    return {
        role: bias.masked_fill(~kept.repeat_interleave(family.rows[role]), 0)
        for role, bias in biases.items()
        if bias is not None
    }


def _whole_block(anatomy: Anatomy, layer: int, budgets: Budgets) -> Choice:
    """Return the choice for a block that is removed as a whole, or kept."""
    choice = Choice()
    for role in anatomy.roles(layer):
        weight = anatomy.weight(layer, role)
        gone = budgets[layer, role] > 0
        choice.masks[role] = torch.full((1, 1), not gone, device=weight.device).expand(weight.shape)
        bias = anatomy.bias(layer, role)
        if gone and bias is not None:
            choice.biases[role] = torch.zeros_like(bias)
    return choice


def block_score(
    anatomy: Anatomy,
    layer: int,
    recipe: Recipe,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None,
    passage: Passage | None,
) -> float:
    """Return the score of one block: the method's own if it scores blocks, else the mean over the block's weights.

    Raises
    ------
    ModelError
        If it is NaN or infinite.
    """
    assert recipe.scoring.score is not None
    if recipe.scoring.scores == "blocks":
        score = float(recipe.scoring.score(None, Statistics(passage=passage), **recipe.method_parameters))
        if not math.isfinite(score):
            raise not_finite(layer, anatomy.roles(layer)[0])
        return score
    total, weights = 0.0, 0
    for group in anatomy.groups(layer):
        seen = inputs.get(group.leader)
        for role in group.roles:
            if unseen(recipe, seen):
                scores = magnitude.score(anatomy.weight(layer, role))
            else:
                scores = scored(anatomy, layer, role, recipe, seen, derivatives)
            total, weights = total + float(scores.mean()) * scores.numel(), weights + scores.numel()
    return total / weights


def unit_scores(
    anatomy: Anatomy,
    layer: int,
    family: Family,
    recipe: Recipe,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None = None,
    *,
    standardized: bool = False,
) -> tuple[Tensor, list[str]]:
    """Return the score of every unit of a family, float32 ``[units]``, and remarks.

    It is the mean over the unit's weights or, if the method scores channels, over the unit's channels. Experts that no
    token reached are scored by magnitude, with a remark.

    Parameters
    ----------
    anatomy, layer, family
        The family.
    recipe
        The recipe.
    inputs
        Input statistics, by leading role.
    derivatives
        Derivatives of the loss, for methods that need them.
    standardized
        Whether to turn scores into z-scores first: those of the channels, if the method scores channels, else those of
        the units.
    """
    seen = {role: inputs.get(group.leader) for group in anatomy.groups(layer) for role in group.roles}
    if any(unseen(recipe, seen[role]) for role in family.roles):
        remark = f"block {layer}, {' and '.join(family.roles)}: no calibration token reached them; pruned by magnitude"
        return _mean(anatomy, layer, family, lambda role: magnitude.score(anatomy.weight(layer, role))), [remark]
    if recipe.scoring.scores == "channels":
        role = family.reader
        weight = anatomy.weight(layer, role)
        assert recipe.scoring.score is not None
        channels = recipe.scoring.score(weight, Statistics(seen[role]), **recipe.method_parameters)
        if not finite(channels):
            raise not_finite(layer, role)
        channels = _z_scores(channels) if standardized else channels
        return channels.unflatten(0, (family.units, family.width)).mean(dim=1), []
    means = _mean(anatomy, layer, family, lambda role: scored(anatomy, layer, role, recipe, seen[role], derivatives))
    return _z_scores(means) if standardized else means, []


def _z_scores(scores: Tensor) -> Tensor:
    """Return scores with mean 0 and (sample) standard deviation 1; zeros if they are all the same."""
    deviations = scores - scores.mean()
    return deviations / scores.std() if len(scores) > 1 and bool(deviations.any()) else torch.zeros_like(scores)


def _mean(anatomy: Anatomy, layer: int, family: Family, score: Callable[[str], Tensor]) -> Tensor:
    """Return the mean score of every unit's weights, ``[units]``; the scores of one matrix at a time are held."""
    weights = sum(family.weights(role, anatomy.shape(layer, role)) for role in family.roles)
    return torch.stack([family.total(role, score(role)) for role in family.roles]).sum(dim=0) / weights
