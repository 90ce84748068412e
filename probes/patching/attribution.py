"""Attribution patching: the effects of all components at once, estimated from gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pruning.models.anatomy import EXPERTS, expert_site
from pruning.projections import Key

from ..batches import Batch
from ..readers.base import Reader
from ..readers.keep import Keep
from ..readers.routing import Added, KeepAdded
from ..scoring import Progress, Question, QuestionBatch, ScoreTable, final_states, objective
from ..session import Session, part_at
from .components import Component, Place, Site
from .damaged import DamagedModel
from .runs import COUNTED, DAMAGE, RESTORE, Direction, Patched, Positions, groups, patched_tokens, run, sites_of, turned

#: Factor by which batches shrink when activations must be kept for the backward pass.
_DIFFERENTIATED = 4


def attribute(
    session: Session,
    questions: Sequence[Question],
    damage: DamagedModel,
    components: Sequence[Component],
    *,
    direction: Direction = RESTORE,
    positions: Positions = COUNTED,
    progress: Progress = lambda tokens: None,
) -> Patched:
    """Estimate what :func:`patch` measures, for all components at once, from gradients (attribution patching).

    The estimate is the gradient of the objective in the patched model times the change that patching would make.
    The parameters are those of :func:`patch`.

    Activations in several blocks (:func:`neurons`) are estimated block by block and summed. What patching the earlier
    blocks changes in the later ones is then counted twice, since the change there contains it already; exact patching
    overwrites it. To leave it out, the paths between the blocks would have to be cut in a backward pass for each such
    component alone, which costs more than to patch it exactly. Weights do not depend on each other, and have no such
    error.
    """
    components = [component.on(session.anatomy.device) for component in components]
    inside = {place.layer for component in components for place in component.places if _of_expert(place.site)}
    sites = sites_of(_with_gradient(place) for component in components for place in component.places)
    wanted = {key for component in components for key in component.weights}
    dense, pruned = ScoreTable(questions), ScoreTable(questions)
    first, second = (dense, pruned) if direction == RESTORE else (pruned, dense)
    totals: dict[Key, float] = dict.fromkeys(wanted, 0.0)
    placed = [i for i, component in enumerate(components) if component.places]
    sums = np.zeros((len(placed), len(questions)))
    for group in groups(session, questions, sites, inside, smaller=_DIFFERENTIATED):
        with turned(damage, direction == DAMAGE):
            added = [KeepAdded(inside) for _ in group]
            kept = [
                run(session, batch, first, sites, progress, readers=[own])
                for batch, own in zip(group, added, strict=True)
            ]
        summed: dict[Key, Tensor] = {}
        summed_biases: dict[Key, Tensor] = {}
        biases = [key for key in damage.biases if key in wanted]
        with turned(damage, direction == RESTORE), damage.differentiable_biases():
            for batch, values, theirs in zip(group, kept, added, strict=True):
                own = KeepAdded(inside)
                gradients = _differentiate(session, batch, second, sites, bool(wanted), biases, own)
                progress(3 * batch.batch.n_tokens)
                if placed:
                    parts = {site: part_at(session.anatomy, *site, batch.batch) for site in sites}
                    masks = {site: patched_tokens(part, positions) for site, part in parts.items()}
                    by_expert = _by_expert(gradients, theirs, own, masks)
                    rows = _effects([components[i] for i in placed], gradients, values, parts, masks, by_expert)
                    np.add.at(sums.T, np.array(batch.batch.segments), rows.T.cpu().numpy())
                for key, gradient in gradients.weights.items():
                    if key in wanted:
                        summed[key] = summed[key].add_(gradient) if key in summed else gradient
                for key, gradient in gradients.biases.items():
                    summed_biases[key] = summed_biases[key].add_(gradient) if key in summed_biases else gradient
        for key, gradient in summed.items():
            effect = float((gradient * damage.change(key)).sum(dtype=torch.float64))
            if key in summed_biases:
                effect += float((summed_biases[key] * damage.bias_change(key)).sum(dtype=torch.float64))
            totals[key] += effect if direction == RESTORE else -effect
    attributed: dict[int, np.ndarray] = dict(zip(placed, sums, strict=True))
    for i, component in enumerate(components):
        if component.weights:
            attributed[i] = np.array([sum(totals[key] for key in component.weights)])
    return Patched(dense.scores, pruned.scores, attributed=attributed)


@dataclass(frozen=True)
class _Gradients:
    """Activations of the patched run, and gradients of the objective by activations, weights and biases."""

    values: Mapping[Site, Tensor]
    gradients: Mapping[Site, Tensor]
    weights: Mapping[Key, Tensor]
    biases: Mapping[Key, Tensor]


def _differentiate(
    session: Session,
    batch: QuestionBatch,
    scores: ScoreTable,
    sites: Mapping[Site, None],
    weights: bool,
    biases: Sequence[Key],
    added: Reader,
) -> _Gradients:
    # Every site gets an identity edit: its value may be a view of a larger output, and must be a tensor of its own in
    # the graph to have a gradient.
    with session.differentiable(biases) as parameters, torch.enable_grad():
        keep = Keep(sites)
        touches = [_Touch(*site) for site in sites]
        final = final_states(session, batch.batch, [keep, added], touches)
        found = batch.scores(session.anatomy, final)
        scores.take(batch, found)
        total = objective(found, batch.answers).sum()
        leaves = [*keep.values.values(), *(parameters.values() if weights else ())]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    n = len(keep.values)
    at_sites = dict(zip(keep.values, gradients[:n], strict=True))
    at_weights = {
        name: gradient for name, gradient in zip(parameters, gradients[n:], strict=False) if gradient is not None
    }
    return _Gradients(
        {site: value.detach() for site, value in keep.values.items()},
        {site: gradient for site, gradient in at_sites.items() if gradient is not None},
        session.anatomy.by_projection(at_weights),
        session.anatomy.biases_by_projection(biases, at_weights),
    )


@dataclass(frozen=True)
class _Touch:
    """The identity edit, which makes a site's value a tensor of its own in the graph."""

    layer: int
    site: str

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        return value * 1.0


def _of_expert(site: str) -> bool:
    return site.startswith("expert.")


def _with_gradient(place: Place) -> Place:
    """Return where the gradient is taken: what an expert adds has that of the sum of all experts of the block."""
    return replace(place, site=EXPERTS) if _of_expert(place.site) else place


def _by_expert(run: _Gradients, others: KeepAdded, own: KeepAdded, masks: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Return the estimated effect of patching what each expert adds, float64 ``[rows]``, by block and its site.

    No tensor has a place for every expert and token: each token is routed to a few.
    """
    found: dict[Site, Tensor] = {}
    for layer, theirs in others.added.items():
        if (layer, EXPERTS) not in run.gradients:
            continue
        gradient = run.gradients[layer, EXPERTS] * masks[layer, EXPERTS][..., None]
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # two sums are subtracted
        change = _towards(gradient, theirs) - _towards(gradient, own.added[layer])
        found |= {(layer, expert_site(expert)): effect for expert, effect in enumerate(change.T)}
    return found


def _towards(gradient: Tensor, added: Added) -> Tensor:
    """Return the inner product of the gradient and what each expert adds, float64 ``[rows, experts]``."""
    products = (gradient.flatten(0, 1)[:, None] * added.values).sum(dim=-1).double()
    sums = products.new_zeros(len(gradient), added.experts)
    rows = (len(gradient), -1)
    return sums.scatter_add_(1, added.chosen.view(rows), products.view(rows))


def _effects(
    components: Sequence[Component],
    run: _Gradients,
    others: Mapping[Site, Tensor],
    parts: Mapping[Site, Batch],
    masks: Mapping[Site, Tensor],
    by_expert: Mapping[Site, Tensor],
) -> Tensor:
    """Return the estimated effect of patching each component on the objective, float64 ``[components, rows]``.

    `parts` says whose tokens a site has values of, and `masks` which of them are patched at all.
    """
    changes = {site: (others[site] - run.values[site]) * masks[site][..., None] for site in run.gradients}
    any_mask = next(iter(masks.values()))
    found = any_mask.new_zeros((len(components), len(any_mask)), dtype=torch.float64)
    for own, component in zip(found, components, strict=True):
        for place in component.places:
            site = place.layer, place.site
            if site in by_expert:
                own += by_expert[site]
            elif site in changes:
                effects = place.product(changes[site], run.gradients[site])
                own += (effects if place.tokens is None else effects * parts[site].of_class(place.tokens)).sum(dim=1)
    return found
