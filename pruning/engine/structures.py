"""How many neurons and heads a recipe removes of each block, and which blocks, in weights of each projection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from ..allocation import UNIFORM, Budgets, lowest_within
from ..errors import RecipeError
from ..models.anatomy import Anatomy
from ..models.families import Family, families
from ..patterns import removed
from ..projections import Key
from ..recipes import Recipe


def covered_families(anatomy: Anatomy, layer: int, recipe: Recipe) -> Iterator[Family]:
    """Yield the families of one block that a recipe prunes."""
    if recipe.covers_block(layer):
        yield from families(anatomy, layer, recipe.choosing.structure)


def unit_budgets(anatomy: Anatomy, recipe: Recipe) -> Budgets:
    """Return the number of weights to remove from each projection if every family loses the same share of its units.

    Raises
    ------
    RecipeError
        If a family has so few units that none would be removed; not if one threshold decides over all families.
    """
    budgets: Budgets = {}
    for layer in range(len(anatomy.blocks)):
        for family in covered_families(anatomy, layer, recipe):
            count = removed(family.units, recipe.sparsity)
            if count == 0 and recipe.allocation == UNIFORM:
                least = math.ceil(1e4 / family.units) / 1e4
                raise RecipeError(
                    f"sparsity {recipe.sparsity:g} removes none of the {family.units} {family.called} of block {layer} "
                    + (f"({family.reader}); use at least {least:g}" if family.units > 1 else "; use another pattern")
                )
            budgets |= {
                (layer, role): count * family.weights(role, anatomy.shape(layer, role)) for role in family.roles
            }
    return budgets


def standardized_budgets(anatomy: Anatomy, recipe: Recipe, scores: Mapping[Key, Tensor]) -> Budgets:
    """Return the number of weights to remove from each projection by one threshold over the units of all families.

    Parameters
    ----------
    anatomy, recipe
        The dense model and the recipe.
    scores
        Standardized scores of the units, by block and reader. Families without any lose their uniform share.

    Raises
    ------
    RecipeError
        If none would be removed.
    """
    even = unit_budgets(anatomy, recipe)
    by_reader = {
        (layer, family.reader): family
        for layer in range(len(anatomy.blocks))
        for family in covered_families(anatomy, layer, recipe)
    }
    compared = {key: by_reader[key] for key in scores}
    costs = {key: _cost(anatomy, key[0], family) for key, family in compared.items()}
    total = sum(cost * compared[key].units for key, cost in costs.items())
    counts = lowest_within(scores, costs, removed(total, recipe.sparsity))
    if not any(counts.values()):
        raise RecipeError(
            f"sparsity {recipe.sparsity:g} removes no {recipe.pattern.replace('+', ' and no ')}; raise it"
        )
    return even | {
        (layer, role): counts[layer, reader] * family.weights(role, anatomy.shape(layer, role))
        for (layer, reader), family in compared.items()
        for role in family.roles
    }


def _cost(anatomy: Anatomy, layer: int, family: Family) -> int:
    """Return the number of weights of one unit."""
    return sum(family.weights(role, anatomy.shape(layer, role)) for role in family.roles)


def block_budgets(anatomy: Anatomy, recipe: Recipe, importance: Mapping[int, float]) -> tuple[Budgets, list[str]]:
    """Return the number of weights to remove from each projection if whole blocks go, and remarks.

    The least important blocks go first, of equal ones the first.
    They go as long as their weights are at most the recipe's share of those in scope; one of each stack always stays.

    Raises
    ------
    RecipeError
        If none would be removed.
    """
    shapes = {layer: {role: anatomy.shape(layer, role) for role in anatomy.roles(layer)} for layer in importance}
    sizes = {layer: sum(outputs * inputs for outputs, inputs in own.values()) for layer, own in shapes.items()}
    left = removed(sum(sizes.values()), recipe.sparsity)
    present = {stack.first: stack.stop - stack.first for stack in anatomy.stacks}
    gone = []
    for layer in sorted(importance, key=lambda layer: (importance[layer], layer)):
        stack = anatomy.stack_of(layer).first
        if sizes[layer] > left:
            break
        if present[stack] > 1:
            gone.append(layer)
            left -= sizes[layer]
            present[stack] -= 1
    if not gone:
        raise _too_few_blocks(recipe, sizes)
    said = ", ".join(f"{layer} ({importance[layer]:.4g})" for layer in sorted(gone))
    budgets = {
        (layer, role): outputs * inputs * (layer in gone)
        for layer, own in shapes.items()
        for role, (outputs, inputs) in own.items()
    }
    return budgets, [f"{len(gone)} of {len(importance)} blocks removed, with their scores: {said}"]


def check_blocks(anatomy: Anatomy, recipe: Recipe) -> None:
    """Raise ``RecipeError`` if the sparsity is too low to remove any block."""
    sizes = {
        layer: sum(math.prod(anatomy.shape(layer, role)) for role in anatomy.roles(layer))
        for layer in range(len(anatomy.blocks))
        if recipe.covers_block(layer)
    }
    if min(sizes.values()) > removed(sum(sizes.values()), recipe.sparsity):
        raise _too_few_blocks(recipe, sizes)


def _too_few_blocks(recipe: Recipe, sizes: Mapping[int, int]) -> RecipeError:
    least = math.ceil(1e4 * max(sizes.values()) / sum(sizes.values())) / 1e4
    advice = f"use at least {least:g}" if least < 1 else "widen the range of blocks"
    return RecipeError(f"sparsity {recipe.sparsity:g} removes none of {len(sizes)} blocks; {advice}")
