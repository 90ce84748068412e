"""Number of weights to remove per projection: known in advance, or determined by a survey of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..allocation import (
    CROSS_LINGUAL,
    DIAGNOSIS,
    OWL,
    Budgets,
    allocation_named,
    by_block,
    by_matrix,
    language_correlation,
    outlier_share,
    shifted,
    threshold,
    uniform,
)
from ..methods import wanda
from ..models.anatomy import Anatomy
from ..patterns import MODEL
from ..projections import Key
from ..recipes import Recipe
from ..statistics import POSITIVE, SQUARES, InputStatistics, Statistics
from .choosing import Derivatives, scored, unseen
from .jobs import Job, covered_shapes, diagnosed_sparsities


def needs_survey(recipe: Recipe) -> bool:
    """Whether statistics of the whole dense model are required before any weight is removed."""
    return allocation_named(recipe.allocation).surveys or recipe.pattern == MODEL


def survey_needs(recipe: Recipe) -> frozenset[str]:
    """Return the input statistics that a recipe's survey requires."""
    needs = set(recipe.scoring.needs) & {SQUARES, POSITIVE, "gram"} if recipe.pattern == MODEL else set()
    return frozenset(needs | ({SQUARES} if allocation_named(recipe.allocation).surveys else set()))


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
    unseen
        Projections whose input no token reached.
    """

    job: Job
    scores: dict[Key, Tensor] = field(default_factory=dict)
    importance: dict[int, float] = field(default_factory=dict)
    unseen: list[Key] = field(default_factory=list)

    def look(
        self,
        anatomy: Anatomy,
        layer: int,
        inputs: Mapping[str, InputStatistics],
        derivatives: Derivatives | None = None,
    ) -> None:
        """Add one block."""
        recipe = self.job.recipe
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
        shapes = covered_shapes(anatomy, recipe)
        even = uniform(shapes, recipe.choosing, recipe.sparsity)
        total = sum(even.values())
        if recipe.pattern == MODEL:
            apart = {key: even[key] for key in self.unseen}
            return threshold(self.scores, total - sum(apart.values())) | apart, []
        sign = recipe.allocation_parameters.get("sign", -1.0)  # OWL: the more outliers, the fewer weights a block loses
        values = [-sign * importance for importance in self.importance.values()]
        if any(value != value for value in values):
            return even, [
                "cross-lingual allocation needs at least two languages, and this calibration set has one: "
                "sparsity is uniform"
            ]
        sizes = [sum(shape[0] * shape[1] for key, shape in shapes.items() if key[0] == b) for b in self.importance]
        sparsities = shifted(values, sizes, recipe.sparsity, recipe.allocation_parameters["spread"])
        return by_block(shapes, dict(zip(self.importance, sparsities, strict=True)), total), []


def settled(anatomy: Anatomy, jobs: Sequence[Job]) -> dict[Job, Budgets]:
    """Return the budgets of the jobs that need no survey."""
    return {job: _settled(anatomy, job.recipe) for job in jobs if not needs_survey(job.recipe)}


def _settled(anatomy: Anatomy, recipe: Recipe) -> Budgets:
    shapes = covered_shapes(anatomy, recipe)
    even = uniform(shapes, recipe.choosing, recipe.sparsity)
    if recipe.allocation == DIAGNOSIS:
        return by_matrix(shapes, diagnosed_sparsities(anatomy, recipe), sum(even.values()))
    return even
