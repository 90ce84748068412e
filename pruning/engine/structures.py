"""How many neurons and heads a recipe removes of each block, and how many weights that is of each projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..allocation import Budgets
from ..errors import RecipeError
from ..models.anatomy import Anatomy
from ..models.families import Family, families
from ..patterns import removed
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
        If a family has so few units that none would be removed.
    """
    budgets: Budgets = {}
    for layer in range(len(anatomy.blocks)):
        for family in covered_families(anatomy, layer, recipe):
            count = removed(family.units, recipe.sparsity)
            if count == 0:
                least = math.ceil(1e4 / family.units) / 1e4
                raise RecipeError(
                    f"sparsity {recipe.sparsity:g} removes none of the {family.units} {family.called} of block {layer} "
                    + (f"({family.reader}); use at least {least:g}" if family.units > 1 else "; use another pattern")
                )
            budgets |= {
                (layer, role): count * family.weights(role, anatomy.shape(layer, role)) for role in family.roles
            }
    return budgets
