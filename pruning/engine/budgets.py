"""Number of weights to remove per projection: known in advance, or determined by a survey of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from ..allocation import (
    CROSS_LINGUAL,
    DIAGNOSIS,
    OWL,
    STANDARDIZED,
    Budgets,
    allocation_named,
    by_block,
    by_matrix,
    language_correlation,
    outlier_share,
    shifted,
    tail_weighted,
    threshold,
    uniform,
)
from ..methods import wanda
from ..models.anatomy import Anatomy
from ..patterns import BLOCKS, MODEL, Shape
from ..projections import Key
from ..recipes import Recipe
from ..spectrum import squared_singular_values, tail_exponent
from ..statistics import SQUARES, InputStatistics, Passage, Statistics
from .choosing import Derivatives, finite, not_finite, scored, unseen
from .jobs import Job, covered_shapes, diagnosed_sparsities
from .parts import weighted
from .structures import block_budgets, covered_families, standardized_budgets, unit_budgets
from .units import block_score, unit_scores


def needs_survey(recipe: Recipe) -> bool:
    """Whether the whole dense model must be looked at before any weight is removed."""
    allocation = allocation_named(recipe.allocation)
    return allocation.surveys or allocation.weighs or _compares(recipe)


def survey_needs(recipe: Recipe) -> frozenset[str]:
    """Return the input statistics that a recipe's survey requires."""
    needs = recipe.scoring.of_inputs if _compares(recipe) else frozenset()
    return needs | ({SQUARES} if allocation_named(recipe.allocation).surveys else set())


def _compares(recipe: Recipe) -> bool:
    """Whether what is removed is chosen by comparing scores over the whole model."""
    return recipe.pattern in (MODEL, BLOCKS) or recipe.allocation == STANDARDIZED


@dataclass
class Survey:
    """What one job needs to know about the dense model, collected block by block.

    Attributes
    ----------
    job
        The job.
    scores
        Scores of every projection, for a single threshold over the model.
    importance
        Importance of every block, for allocations.
    units
        Standardized scores of the units of every family, by block and reader, for a single threshold over them.
    unseen
        Projections whose input no token reached.
    """

    job: Job
    scores: dict[Key, Tensor] = field(default_factory=dict)
    importance: dict[int, float] = field(default_factory=dict)
    units: dict[Key, Tensor] = field(default_factory=dict)
    unseen: list[Key] = field(default_factory=list)

    def look(
        self,
        anatomy: Anatomy,
        layer: int,
        inputs: Mapping[str, InputStatistics],
        derivatives: Derivatives | None = None,
        passage: Passage | None = None,
    ) -> None:
        """Add one block."""
        recipe = self.job.recipe
        if recipe.allocation != CROSS_LINGUAL:  # which compares languages by their plain inputs
            inputs = weighted(recipe, inputs)
        if recipe.pattern == BLOCKS:
            if recipe.covers_block(layer):
                self.importance[layer] = block_score(anatomy, layer, recipe, inputs, derivatives, passage)
            return
        if recipe.allocation == STANDARDIZED:
            for family in covered_families(anatomy, layer, recipe):
                scores, remarks = unit_scores(anatomy, layer, family, recipe, inputs, derivatives, standardized=True)
                if remarks:
                    self.unseen.append((layer, family.reader))
                else:
                    self.units[layer, family.reader] = scores
            return
        covered = [
            (group, role) for group in anatomy.groups(layer) for role in group.roles if recipe.covers(layer, role)
        ]
        if not covered:
            return
        if recipe.pattern == MODEL:
            for group, role in covered:
                seen = inputs.get(group.leader)
                if unseen(recipe, seen):
                    self.unseen.append((layer, role))
                else:
                    self.scores[layer, role] = scored(anatomy, layer, role, recipe, seen, derivatives)
        elif recipe.allocation == OWL:
            self.importance[layer] = outlier_share(
                [wanda.score(anatomy.weight(layer, role), Statistics(inputs[group.leader])) for group, role in covered],
                recipe.allocation_parameters["outlier"],
            )
        elif recipe.allocation == CROSS_LINGUAL:
            groups = dict.fromkeys(group.leader for group, _ in covered)
            self.importance[layer] = language_correlation([inputs[leader] for leader in groups])

    def budgets(self, anatomy: Anatomy) -> tuple[Budgets, list[str]]:
        """Return the budgets and any remarks about them."""
        recipe = self.job.recipe
        if recipe.pattern == BLOCKS:
            return block_budgets(anatomy, recipe, self.importance)
        if recipe.allocation == STANDARDIZED:
            return standardized_budgets(anatomy, recipe, self.units), []
        shapes = covered_shapes(anatomy, recipe)
        even = uniform(shapes, recipe.choosing, recipe.sparsity)
        total = sum(even.values())
        if recipe.pattern == MODEL:
            apart = {key: even[key] for key in self.unseen}
            return threshold(self.scores, total - sum(apart.values())) | apart, []
        if any(value != value for value in self.importance.values()):
            return even, [
                "cross-lingual allocation needs at least two languages, and this calibration set has one: "
                "sparsity is uniform"
            ]
        sign = recipe.allocation_parameters.get("sign", -1.0)  # OWL: the more outliers, the fewer weights a block loses
        importance = {layer: -sign * value for layer, value in self.importance.items()}
        return _by_importance(shapes, importance, recipe, total), []


def weighed(anatomy: Anatomy, recipe: Recipe, exponents: dict[Key, float]) -> Budgets:
    """Return the budgets of a recipe whose allocation follows the spectra of the weights.

    Parameters
    ----------
    anatomy, recipe
        Anatomy of the dense model, and the recipe.
    exponents
        Tail exponents that are already known; those of the recipe's other matrices are added.

    Raises
    ------
    ModelError
        If a weight is NaN or infinite.
    RecipeError
        If a block has no spectrum, or a sparsity would fall outside [0, 1).
    """
    shapes = covered_shapes(anatomy, recipe)
    for layer in dict.fromkeys(layer for layer, _ in shapes):
        unknown = [key for key in shapes if key[0] == layer and key not in exponents]
        with anatomy.loaded(layer, to_read=True) if unknown else nullcontext():
            for key in unknown:
                weight = anatomy.weight(*key).detach()
                if not finite(weight):
                    raise not_finite(*key)
                exponents[key] = tail_exponent(squared_singular_values(weight))
    total = sum(uniform(shapes, recipe.choosing, recipe.sparsity).values())
    return _by_importance(shapes, tail_weighted({key: exponents[key] for key in shapes}), recipe, total)


def _by_importance(shapes: Mapping[Key, Shape], importance: Mapping[int, float], recipe: Recipe, total: int) -> Budgets:
    sizes = [sum(shape[0] * shape[1] for key, shape in shapes.items() if key[0] == layer) for layer in importance]
    spread = recipe.allocation_parameters["spread"]
    sparsities = shifted(list(importance.values()), sizes, recipe.sparsity, spread)
    return by_block(shapes, dict(zip(importance, sparsities, strict=True)), total)


def settled(anatomy: Anatomy, jobs: Sequence[Job]) -> dict[Job, Budgets]:
    """Return the budgets of the jobs that need no survey."""
    return {job: _settled(anatomy, job.recipe) for job in jobs if not needs_survey(job.recipe)}


def _settled(anatomy: Anatomy, recipe: Recipe) -> Budgets:
    if recipe.quantizes:
        return {}
    if recipe.choosing.structure:
        return unit_budgets(anatomy, recipe)
    shapes = covered_shapes(anatomy, recipe)
    even = uniform(shapes, recipe.choosing, recipe.sparsity)
    if recipe.allocation == DIAGNOSIS:
        return by_matrix(shapes, diagnosed_sparsities(anatomy, recipe), sum(even.values()))
    return even
