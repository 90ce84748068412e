"""From the statistics of a block to the masks of one job, where whole neurons or heads are removed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..allocation import Budgets
from ..methods import magnitude
from ..models.anatomy import Anatomy
from ..models.families import Family
from ..recipes import Recipe
from ..statistics import InputStatistics, Statistics
from . import choosing
from .choosing import Choice, Derivatives, finite, not_finite, scored, unseen
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
    choice = Choice()
    for family in covered_families(anatomy, layer, recipe):
        scores, remarks = unit_scores(anatomy, layer, family, recipe, inputs, derivatives)
        reader = anatomy.shape(layer, family.reader)
        count = budgets[layer, family.reader] // family.weights(family.reader, reader)
        kept = recipe.choosing.keep(scores[None], count)[0]
        choice.masks |= {role: family.mask(role, kept, anatomy.shape(layer, role)) for role in family.roles}
        choice.remarks += remarks
        if family.sharing > 1:
            choice.remarks.append(f"whole {family.called} were removed")
    return choice


def unit_scores(
    anatomy: Anatomy,
    layer: int,
    family: Family,
    recipe: Recipe,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None = None,
) -> tuple[Tensor, list[str]]:
    """Return the score of every unit of a family, float32 ``[units]``, and remarks.

    It is the mean over the unit's weights or, if the method scores channels, over the unit's channels. Experts that no
    token reached are scored by magnitude.
    """
    seen = {role: inputs.get(group.leader) for group in anatomy.groups(layer) for role in group.roles}
    if any(unseen(recipe, seen[role]) for role in family.roles):
        remark = f"block {layer}, {' and '.join(family.roles)}: no calibration token reached them; pruned by magnitude"
        return _mean(anatomy, layer, family, {r: magnitude.score(anatomy.weight(layer, r)) for r in family.roles}), [
            remark
        ]
    if recipe.scoring.scores == "channels":
        role = family.reader
        weight = anatomy.weight(layer, role)
        assert recipe.scoring.score is not None
        channels = recipe.scoring.score(weight, Statistics(seen[role]), **recipe.method_parameters)
        if not finite(channels):
            raise not_finite(layer, role)
        return channels.unflatten(0, (family.units, family.width)).mean(dim=1), []
    scores = {role: scored(anatomy, layer, role, recipe, seen[role], derivatives) for role in family.roles}
    return _mean(anatomy, layer, family, scores), []


def _mean(anatomy: Anatomy, layer: int, family: Family, scores: Mapping[str, Tensor]) -> Tensor:
    weights = sum(family.weights(role, anatomy.shape(layer, role)) for role in scores)
    return torch.stack([family.total(role, own) for role, own in scores.items()]).sum(dim=0) / weights
