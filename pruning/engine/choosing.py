"""From the statistics of a block to the masks and weights of one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..allocation import Budgets
from ..correction import NONE, corrector_named, refiner_named
from ..errors import ModelError
from ..methods import magnitude, rtn
from ..models.anatomy import Anatomy, InputGroup
from ..projections import Key
from ..quantization import Quantized
from ..recipes import Recipe
from ..statistics import InputStatistics, Statistics
from ..variants.masks import pack_bits, unpack_bits
from .jobs import projection_seed
from .parts import weighted


@dataclass
class Choice:
    """Masks, updated weights and codes of one block for one job.

    Attributes
    ----------
    masks
        Role to mask, ``True`` = kept.
    weights
        Role to updated weights, for methods that update them.
    codes
        Role to quantized weights, for methods that quantize; they have no masks.
    biases
        Role to bias, where it differs from the dense model's.
    remarks
        Notes for the variant's record.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Quantized] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of the loss for every projection; empty if no method needs them."""

    gradient: Mapping[Key, Tensor] = field(default_factory=dict)
    curvature: Mapping[Key, Tensor] = field(default_factory=dict)
    slopes: Mapping[Key, Tensor] = field(default_factory=dict)
    sequences: int = 0


@dataclass(frozen=True)
class Packed:
    """Masks of a block in host memory, eight weights per byte: by role, each with its number of inputs."""

    bits: Mapping[str, tuple[Tensor, int]]

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> Packed:
        """Pack masks."""
        return cls({role: (pack_bits(mask), mask.shape[1]) for role, mask in masks.items()})

    def masks(self, device: torch.device) -> dict[str, Tensor]:
        """Unpack them on a device."""
        return {role: unpack_bits(bits.to(device), inputs) for role, (bits, inputs) in self.bits.items()}


def choose(
    anatomy: Anatomy,
    layer: int,
    recipe: Recipe,
    budgets: Budgets,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Choice:
    """Return one job's masks, weights and codes for one block, refined and corrected.

    Parameters
    ----------
    anatomy, layer, recipe, budgets, inputs, derivatives
        As for :func:`choose_masks`.
    masks
        Masks that were chosen already, by derivatives alone.
    """
    chosen = Choice(dict(masks)) if masks is not None else None
    choice = chosen or choose_masks(anatomy, layer, recipe, budgets, inputs, derivatives)
    if recipe.follows:
        for group in anatomy.groups(layer):
            roles = [role for role in group.roles if recipe.covers(layer, role)]
            if roles:
                _follow(anatomy, layer, roles, recipe, inputs[group.leader], choice)
    return choice


def _follow(
    anatomy: Anatomy, layer: int, roles: Sequence[str], recipe: Recipe, inputs: InputStatistics, choice: Choice
) -> None:
    """Refine the masks of projections that read the same input, and correct their weights."""
    if inputs.tokens == 0:
        if not recipe.scoring.of_inputs:  # otherwise the mask's own remark says so
            undone = ", ".join(f"no {step}" for step in (recipe.refinement, recipe.correction) if step != NONE)
            choice.remarks.append(f"block {layer}, {' and '.join(roles)}: no calibration token reached them; {undone}")
        return
    weights = [anatomy.weight(layer, role) for role in roles]
    refine, corrector = refiner_named(recipe.refinement).refine, corrector_named(recipe.correction)
    try:
        if refine is not None:
            for role, weight in zip(roles, weights, strict=True):
                mask = choice.masks[role]
                choice.masks[role] = refine(weight, mask, inputs, recipe.choosing, **recipe.refinement_parameters)
        if corrector.settle is not None:
            _settle(anatomy, layer, roles, recipe, inputs, choice)
        if corrector.correct is not None:
            masks = [choice.masks[role] for role in roles]
            corrected = corrector.correct(weights, masks, inputs, **recipe.correction_parameters)
            choice.weights |= dict(zip(roles, corrected.weights, strict=True))
            choice.remarks += [f"block {layer}, {' and '.join(roles)}: {remark}" for remark in corrected.remarks]
    except ArithmeticError as error:
        raise not_finite(layer, roles[0]) from error


def _settle(
    anatomy: Anatomy, layer: int, roles: Sequence[str], recipe: Recipe, inputs: InputStatistics, choice: Choice
) -> None:
    """Correct the biases of the projections that compute what neurons fire on, and their weights if that is asked."""
    settle = corrector_named(recipe.correction).settle
    assert settle is not None
    for role in roles:
        if role in anatomy.firing_roles(layer):
            weight = anatomy.weight(layer, role)
            updated = choice.weights.get(role)
            pruned = weight.masked_fill(~choice.masks[role], 0) if updated is None else updated
            bias = anatomy.bias(layer, role)
            found, choice.biases[role] = settle(weight, pruned, inputs, bias, **recipe.correction_parameters)
            if found is not pruned:
                choice.weights[role] = found


def choose_masks(
    anatomy: Anatomy,
    layer: int,
    recipe: Recipe,
    budgets: Budgets,
    inputs: Mapping[str, InputStatistics],
    derivatives: Derivatives | None = None,
) -> Choice:
    """Return the masks that one job's method chooses for one block, and the weights that it updates or quantizes.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model.
    layer
        Index of the block.
    recipe
        The recipe.
    budgets
        Number of weights to remove from each projection.
    inputs
        Input statistics, by leading role.
    derivatives
        Derivatives of the loss, for methods that need them.
    """
    choice = Choice()
    inputs = weighted(recipe, inputs)
    for group in anatomy.groups(layer):
        roles = [role for role in group.roles if recipe.covers(layer, role)]
        if not roles:
            continue
        seen = inputs.get(group.leader)
        if recipe.quantizes:
            _quantize(anatomy, layer, group, roles, recipe, seen, choice)
        elif unseen(recipe, seen):
            choice.remarks.append(
                f"block {layer}, {' and '.join(roles)}: no calibration token reached them; pruned by magnitude"
            )
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
    """Whether a calibrated method has no input statistics: no token was routed to this expert."""
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
    key, known = (layer, role), derivatives or Derivatives()
    statistics = Statistics(
        inputs,
        known.gradient.get(key),
        known.curvature.get(key),
        projection_seed(key),
        known.slopes.get(key),
        known.sequences,
    )
    assert recipe.scoring.score is not None
    scores = recipe.scoring.score(anatomy.weight(layer, role), statistics, **recipe.method_parameters)
    if not finite(scores):
        raise not_finite(layer, role)
    return scores


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; checking only the extremes is ten times as fast."""
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())


def not_finite(layer: int, role: str) -> ModelError:
    """Return the error for a weight or activation that is NaN or infinite."""
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


def _quantize(
    anatomy: Anatomy,
    layer: int,
    group: InputGroup,
    roles: Sequence[str],
    recipe: Recipe,
    inputs: InputStatistics | None,
    choice: Choice,
) -> None:
    weights = [anatomy.weight(layer, role) for role in roles]
    if not all(map(finite, weights)):
        raise not_finite(layer, group.leader)
    method, parameters = recipe.scoring, recipe.method_parameters
    if unseen(recipe, inputs):
        choice.remarks.append(
            f"block {layer}, {' and '.join(roles)}: no calibration token reached them; rounded to the nearest"
        )
        method, parameters = rtn.METHOD, {}
    parameters.pop("symmetric", None)  # is part of the grid
    assert method.quantize is not None
    try:
        coded = method.quantize(weights, Statistics(inputs), recipe.grid, roles, **parameters)
    except ArithmeticError as error:
        raise not_finite(layer, group.leader) from error
    if not all(finite(quantized.scales) for quantized in coded.weights):
        raise not_finite(layer, group.leader)
    choice.codes |= dict(zip(roles, coded.weights, strict=True))
    choice.remarks += [f"block {layer}, {' and '.join(roles)}: {remark}" for remark in coded.remarks]
