"""Choosing: from the statistics of a block to the masks and weights of one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..allocation import Budgets
from ..errors import ModelError
from ..methods import magnitude
from ..models.anatomy import Anatomy, InputGroup
from ..projections import Key
from ..recipes import Recipe
from ..statistics import InputStatistics, Statistics
from .jobs import projection_seed


@dataclass
class Choice:
    """What a job makes of one block.

    Attributes
    ----------
    masks
        Role to kept weights.
    weights
        Role to corrected weights, for methods that correct them.
    remarks
        What a reader of the recipe should know.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of the loss for every projection, as far as a method asked for them."""

    gradient: Mapping[Key, Tensor] = field(default_factory=dict)
    curvature: Mapping[Key, Tensor] = field(default_factory=dict)


def choose(
    anatomy: Anatomy,
    layer: int,
    recipe: Recipe,
    budgets: Budgets,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None = None,
) -> Choice:
    """Return one job's masks and weights for one block.

    Parameters
    ----------
    anatomy
        Of the dense model.
    layer
        The block.
    recipe
        What to do.
    budgets
        How many weights each projection gives.
    inputs
        Statistics of the inputs, by leading role.
    derivatives
        For methods that differentiate.
    """
    choice = Choice()
    for group in anatomy.groups(layer):
        roles = [role for role in group.roles if recipe.covers(layer, role)]
        if not roles:
            continue
        seen = inputs.get(group.leader)
        if unseen(recipe, seen):
            choice.remarks.append(f"block {layer}, {' and '.join(roles)}: no token came here; chosen by magnitude")
            for role in roles:
                score = magnitude.score(anatomy.weight(layer, role))
                choice.masks[role] = recipe.choosing.keep(score, budgets[layer, role])
        elif recipe.scoring.solve is not None:
            _solve(anatomy, layer, group, roles, recipe, budgets, seen, choice)
        else:
            for role in roles:
                score = scored(anatomy, layer, role, recipe, seen, derivatives)
                choice.masks[role] = recipe.choosing.keep(score, budgets[layer, role])
    return choice


def unseen(recipe: Recipe, inputs: InputStatistics | None) -> bool:
    """Whether a method that judges by its inputs has not had any: an expert that no token was sent to."""
    return recipe.scoring.calibrated and inputs is not None and inputs.tokens == 0


def scored(
    anatomy: Anatomy,
    layer: int,
    role: str,
    recipe: Recipe,
    inputs: InputStatistics | None,
    derivatives: Derivatives | None,
) -> Tensor:
    """Return one projection's scores.

    Raises
    ------
    ModelError
        If any is NaN or infinite.
    """
    gradient = derivatives.gradient.get((layer, role)) if derivatives else None
    curvature = derivatives.curvature.get((layer, role)) if derivatives else None
    statistics = Statistics(inputs, gradient, curvature, projection_seed((layer, role)))
    scores = recipe.scoring.score(anatomy.weight(layer, role), statistics, **recipe.method_parameters)
    if not finite(scores):
        raise not_finite(layer, role)
    return scores


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; extremes show both, ten times as fast as looking at each value."""
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())


def not_finite(layer: int, role: str) -> ModelError:
    """Return the error of a weight or an input that is no number."""
    return ModelError(
        f"block {layer}, role {role}: a weight or an activation is NaN or infinite; "
        "check the checkpoint, or load it with dtype float32 or bfloat16"
    )


def _solve(
    anatomy: Anatomy,
    layer: int,
    group: InputGroup,
    roles: Sequence[str],
    recipe: Recipe,
    budgets: Budgets,
    inputs: InputStatistics | None,
    choice: Choice,
) -> None:
    weights = [anatomy.weight(layer, role) for role in roles]
    solve = recipe.scoring.solve
    assert solve is not None
    try:
        solved = solve(
            weights,
            Statistics(inputs),
            recipe.choosing,
            [budgets[layer, role] for role in roles],
            **recipe.method_parameters,
        )
    except ArithmeticError as error:
        raise not_finite(layer, group.leader) from error
    if not all(map(finite, solved.weights)):
        raise not_finite(layer, group.leader)
    choice.masks |= dict(zip(roles, solved.masks, strict=True))
    choice.weights |= dict(zip(roles, solved.weights, strict=True))
    choice.remarks += [f"block {layer}, {' and '.join(roles)}: {remark}" for remark in solved.remarks]
