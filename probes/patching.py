"""Activation and weight patching between the dense and the pruned model, to locate where pruning does its damage.

A *component* is what is patched: the residual stream after a block, a subspace of it, the output of a role, what one
expert adds to the stream (nothing to tokens that are not routed to it), some neurons, or the weights of a projection.
In an encoder-decoder it lies in either stack: what is patched in the encoder acts on the rest of the encoder, and
through its output on the whole decoder. *Restoring* patches the dense model's values into the pruned model; *damaging*
patches the pruned model's values into the dense one. Both runs read the same tokens, so values correspond position by
position. By default activations are patched where tokens count (:meth:`probes.batches.Batcher.counts`), so not at the
first one unless the session was told to count it; weights act on every token. The start token of a decoder is always
patched: the first token is predicted from it.

Exact patching needs one run per component. Attribution patching (Nanda, 2023; Syed et al., 2024, 2310.10348) estimates
all effects at once from gradients of the patched run. It is a first-order approximation, and of a component in several
blocks a rougher one (:func:`attribute`); the exact runs tell how good.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pruning.models.anatomy import EXPERTS, ROLES, Anatomy, expert_site
from pruning.projections import Key
from pruning.variants.biases import biased
from pruning.variants.owner import DenseModel, write_weight
from pruning.variants.variant import Variant

from .batches import Batch, within_memory
from .readers.base import Reader
from .readers.keep import Keep
from .readers.routing import Added, KeepAdded
from .scoring import (
    ChoiceScores,
    Progress,
    Question,
    QuestionBatch,
    ScoreTable,
    final_states,
    objective,
    question_batches,
)
from .session import Session, part_at

Direction = Literal["restore", "damage"]
#: Tokens whose activations are patched: those that count, or all of them, the first and special ones too.
Positions = Literal["counted", "all"]
RESTORE: Direction = "restore"
DAMAGE: Direction = "damage"
COUNTED: Positions = "counted"
EVERY: Positions = "all"
#: Bytes of source-run activations held at a time.
_KEPT_BYTES = 1 << 30
#: Factor by which batches shrink when activations must be kept for the backward pass.
_DIFFERENTIATED = 4

Site = tuple[int, str]


@dataclass(frozen=True, eq=False)
class Place:
    """The part of a site that is patched.

    Attributes
    ----------
    layer, site
        Block, counted from 0, and site.
    basis
        Orthonormal columns, float32 ``[width, rank]``: patches only their span.
    outside
        Patches the orthogonal complement of the basis instead.
    columns
        Patches only these dimensions, int64 ``[n]``.
    """

    layer: int
    site: str
    basis: Tensor | None = None
    outside: bool = False
    columns: Tensor | None = None

    def part(self, values: Tensor) -> Tensor:
        """Return this part of ``[..., width]`` values: projected onto the basis, the columns alone, or all of them."""
        if self.columns is not None:
            return values[..., self.columns.to(values.device)]
        if self.basis is None:
            return values
        basis = self.basis.to(values)
        inside = (values @ basis) @ basis.T
        return values - inside if self.outside else inside

    def product(self, change: Tensor, gradient: Tensor) -> Tensor:
        """Return the inner product of two values' parts, over the last dimension."""
        if self.columns is not None:
            columns = self.columns.to(change.device)
            return (change[..., columns] * gradient[..., columns]).sum(dim=-1)
        if self.basis is None:
            return (change * gradient).sum(dim=-1)
        basis = self.basis.to(change)
        inside = ((change @ basis) * (gradient @ basis)).sum(dim=-1)
        return (change * gradient).sum(dim=-1) - inside if self.outside else inside

    def put(self, value: Tensor, other: Tensor) -> Tensor:
        """Return `value` with this part replaced by that of `other`."""
        if self.columns is not None:
            return value.index_copy(-1, self.columns.to(value.device), self.part(other))
        return other if self.basis is None else value + self.part(other - value)


@dataclass(frozen=True, eq=False)
class Component:
    """What is patched in one intervention.

    Attributes
    ----------
    kind
        One of ``residual``, ``specific``, ``agnostic``, ``random``, ``output``, ``weights``, ``neurons``,
        ``random_neurons``.
    layer, role
        Block and role, if the component belongs to a single one.
    places
        Activations to patch.
    weights
        Projections whose weights to patch.
    draw
        Number of the random draw, of a control.
    """

    kind: str
    layer: int | None = None
    role: str | None = None
    places: tuple[Place, ...] = ()
    weights: tuple[Key, ...] = ()
    draw: int | None = None

    @property
    def first_layer(self) -> int:
        """The first block that is patched."""
        return min([place.layer for place in self.places] + [layer for layer, _ in self.weights])

    def on(self, device: torch.device) -> Component:
        """Return it with its bases and columns on a device, so that they are copied once, not for every batch."""

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        places = (replace(place, basis=moved(place.basis), columns=moved(place.columns)) for place in self.places)
        return replace(self, places=tuple(places))

    @property
    def label(self) -> str:
        """A short name, unique among the components of a diagnosis: ``weights 9.down``."""
        place = ".".join(str(part) for part in (self.layer, self.role) if part is not None)
        draw = "" if self.draw is None else f"draw {self.draw}"
        return " ".join(part for part in (self.kind, place, draw) if part)


def residual(layer: int) -> Component:
    """Return the whole residual stream after a block."""
    return Component("residual", layer, places=(Place(layer, "residual"),))


def stream_part(kind: str, layer: int, basis: Tensor, *, outside: bool = False, draw: int | None = None) -> Component:
    """Return the part of the residual stream after a block that lies in the span of a basis, or outside it."""
    return Component(kind, layer, places=(Place(layer, "residual", basis, outside),), draw=draw)


def role_output(layer: int, role: str) -> Component:
    """Return the output of a role in one block."""
    return Component("output", layer, role, places=(Place(layer, role),))


def expert_output(layer: int, expert: int) -> Component:
    """Return what one expert of a block adds to the stream: its output times the router's weight.

    Patching it also undoes the change in which tokens are routed to this expert, and with what weight.
    """
    return Component("output", layer, expert_site(expert), places=(Place(layer, expert_site(expert)),))


def experts_output(layer: int) -> Component:
    """Return what all experts of a block add to the stream together."""
    return Component("output", layer, EXPERTS, places=(Place(layer, EXPERTS),))


def role_weights(layer: int, role: str) -> Component:
    """Return the weights of a role in one block: restoring them undoes its mask."""
    return Component("weights", layer, role, weights=((layer, role),))


def neurons(kind: str, anatomy: Anatomy, chosen: Mapping[int, Tensor], *, draw: int | None = None) -> Component:
    """Return a set of MLP neurons over all blocks as one component.

    The activation is patched and, in a gated MLP, the other factor of the product too, so that the neurons' whole
    output is patched. Of neurons in several blocks, attribution is a rough estimate (:func:`attribute`).
    """
    places = [
        Place(layer, site, columns=columns)
        for layer, columns in chosen.items()
        if len(columns)
        for site in anatomy.sites(layer)
        if site == "activation" or (site == "up" and anatomy.has_gate(layer))
    ]
    return Component(kind, places=tuple(places), draw=draw)


class DamagedModel:
    """A dense model that can be switched quickly to a pruned variant and back.

    Parameters
    ----------
    owner
        Owner of the dense model (``session.owner``), which must be in memory.
    variant
        A variant of that model.

    Raises
    ------
    VariantError
        If the variant was made from another model.
    """

    def __init__(self, owner: DenseModel, variant: Variant) -> None:
        owner.check(variant)
        self._owner = owner
        self._variant = variant
        present = {key: owner.anatomy.bias(*key) for key in variant.biases}
        self._dense_biases = {key: None if bias is None else bias.clone() for key, bias in present.items()}

    @property
    def projections(self) -> tuple[Key, ...]:
        """The projections that were pruned or quantized."""
        return self._variant.projections

    def damaged(self) -> AbstractContextManager[None]:
        """Context manager within which the model is pruned."""
        return self._owner.pruned_to(self._variant)

    @property
    def biases(self) -> tuple[Key, ...]:
        """The projections whose biases differ from the dense model's."""
        return tuple(self._variant.biases)

    def differentiable_biases(self) -> AbstractContextManager[None]:
        """Context manager within which every projection whose bias differs has one, of zeros if it has none now."""
        anatomy = self._owner.anatomy
        lacking = {key: bias for key, bias in self._variant.biases.items() if anatomy.bias(*key) is None}
        return biased(anatomy, {key: torch.zeros_like(bias) for key, bias in lacking.items()})

    def bias_change(self, key: Key) -> Tensor:
        """Return a projection's dense bias minus its pruned bias, on the model's device; no bias is one of zeros."""
        pruned = self._variant.biases[key].to(self._owner.anatomy.device)
        dense = self._dense_biases[key]
        return -pruned if dense is None else dense - pruned

    def change(self, key: Key) -> Tensor:
        """Return a projection's dense weight minus its pruned weight, on the model's device."""
        dense = self._owner.dense[key].to(self._owner.anatomy.device)
        pruned = torch.empty_like(dense)
        self._variant.write(key, dense, pruned)
        return dense - pruned

    @contextmanager
    def with_weights(self, keys: Sequence[Key], *, dense: bool) -> Iterator[None]:
        """Context manager within which some projections have their dense, or their pruned, weights and biases."""
        try:
            for key in keys:
                self._write(key, dense=dense)
            yield
        finally:
            for key in keys:
                self._write(key, dense=not dense)

    def _write(self, key: Key, *, dense: bool) -> None:
        if dense:
            self._owner.anatomy.set_weight(*key, self._owner.dense[key])
        else:
            write_weight(self._owner.anatomy, key, self._variant, self._owner.dense[key])
        if key in self._variant.biases:
            bias = self._dense_biases[key] if dense else self._variant.biases[key]
            self._owner.anatomy.set_bias(*key, bias)


@dataclass(frozen=True)
class Patched:
    """Scores of the same questions by the dense model, the pruned model, and the patched models.

    Attributes
    ----------
    dense, pruned
        Scores of the two models.
    exact
        Index of the component → scores of the model with it patched.
    attributed
        Index of the component → estimated effect on the objective (:func:`probes.scoring.objective`), float64
        ``[questions]``; for weights only the sum over questions is known, a single value.
    """

    dense: ChoiceScores
    pruned: ChoiceScores
    exact: Mapping[int, ChoiceScores] = field(default_factory=dict)
    attributed: Mapping[int, np.ndarray] = field(default_factory=dict)


def patch(
    session: Session,
    questions: Sequence[Question],
    damage: DamagedModel,
    components: Sequence[Component],
    *,
    direction: Direction = RESTORE,
    positions: Positions = COUNTED,
    progress: Progress = lambda tokens: None,
) -> Patched:
    """Patch the components one at a time, and score the questions each time.

    Parameters
    ----------
    session
        The dense model's session.
    questions
        Questions to score.
    damage
        The pruned model.
    components
        What to patch.
    direction
        ``"restore"``: from the dense model into the pruned one; ``"damage"``: the reverse.
    positions
        Tokens whose activations are patched. All of them include the first one, whose states are by far the largest and
        which the subspaces are not fitted on.
    progress
        Called with the number of tokens read, after every batch of every run.
    """
    components = [component.on(session.anatomy.device) for component in components]
    sites = _sites(place for component in components for place in component.places)
    dense, pruned = ScoreTable(questions), ScoreTable(questions)
    exact = [ScoreTable(questions) for _ in components]
    first, second = (dense, pruned) if direction == RESTORE else (pruned, dense)
    for group in _groups(session, questions, sites):
        with _as(damage, direction == DAMAGE):
            kept = [_run(session, batch, first, sites, progress) for batch in group]
        with _as(damage, direction == RESTORE):
            clean: list[dict[int, Any]] = [{} for _ in group]
            for batch, outputs in zip(group, clean, strict=True):
                _run(session, batch, second, {}, progress, outputs)
            for component, scores in zip(components, exact, strict=True):
                with damage.with_weights(component.weights, dense=direction == RESTORE):
                    start = component.first_layer  # up to here, the run equals the clean one
                    for batch, values, outputs in zip(group, kept, clean, strict=True):
                        edits = [_Put(place, values[place.layer, place.site], positions) for place in component.places]
                        final = final_states(session, batch.batch, edits=edits, outputs=outputs, start=start)
                        scores.take(batch, batch.scores(session.anatomy, final))
                        progress(batch.batch.n_tokens)
    return Patched(dense.scores, pruned.scores, {i: table.scores for i, table in enumerate(exact)})


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
    sites = _sites(_with_gradient(place) for component in components for place in component.places)
    wanted = {key for component in components for key in component.weights}
    dense, pruned = ScoreTable(questions), ScoreTable(questions)
    first, second = (dense, pruned) if direction == RESTORE else (pruned, dense)
    totals: dict[Key, float] = dict.fromkeys(wanted, 0.0)
    placed = [i for i, component in enumerate(components) if component.places]
    sums = np.zeros((len(placed), len(questions)))
    for group in _groups(session, questions, sites, inside, smaller=_DIFFERENTIATED):
        with _as(damage, direction == DAMAGE):
            added = [KeepAdded(inside) for _ in group]
            kept = [
                _run(session, batch, first, sites, progress, readers=[own])
                for batch, own in zip(group, added, strict=True)
            ]
        summed: dict[Key, Tensor] = {}
        summed_biases: dict[Key, Tensor] = {}
        biases = [key for key in damage.biases if key in wanted]
        with _as(damage, direction == RESTORE), damage.differentiable_biases():
            for batch, values, theirs in zip(group, kept, added, strict=True):
                own = KeepAdded(inside)
                gradients = _differentiate(session, batch, second, sites, bool(wanted), biases, own)
                progress(3 * batch.batch.n_tokens)
                if placed:
                    masks = {site: _mask(part_at(session.anatomy, *site, batch.batch), positions) for site in sites}
                    by_expert = _by_expert(gradients, theirs, own, masks)
                    rows = _effects([components[i] for i in placed], gradients, values, masks, by_expert)
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


@contextmanager
def _as(damage: DamagedModel, pruned: bool) -> Iterator[None]:
    if pruned:
        with damage.damaged():
            yield
    else:
        yield


def _sites(places: Iterator[Place]) -> dict[Site, None]:
    return dict.fromkeys((place.layer, place.site) for place in places)


@dataclass(frozen=True, eq=False)
class _Put:
    """An edit that patches a site with the source run's values."""

    place: Place
    other: Tensor
    positions: Positions

    @property
    def layer(self) -> int:
        return self.place.layer

    @property
    def site(self) -> str:
        return self.place.site

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        return torch.where(_mask(batch, self.positions)[..., None], self.place.put(value, self.other), value)


def _mask(batch: Batch, positions: Positions) -> Tensor:
    """Return which tokens are patched, bool ``[batch, tokens]``."""
    return (batch.counted if positions == COUNTED else batch.real).bool()


def _run(
    session: Session,
    batch: QuestionBatch,
    scores: ScoreTable,
    sites: Mapping[Site, None],
    progress: Progress,
    outputs: dict[int, Any] | None = None,
    readers: Sequence[Reader] = (),
) -> dict[Site, Tensor]:
    """Score one batch with the model as it is, and return its activations at some sites."""
    keep = Keep(sites)
    final = final_states(session, batch.batch, [keep, *readers], outputs=outputs)
    scores.take(batch, batch.scores(session.anatomy, final))
    progress(batch.batch.n_tokens)
    return keep.values


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
    masks: Mapping[Site, Tensor],
    by_expert: Mapping[Site, Tensor],
) -> Tensor:
    """Return the estimated effect of patching each component on the objective, float64 ``[components, rows]``.

    `masks` says which tokens are patched at every site.
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
                own += place.product(changes[site], run.gradients[site]).sum(dim=1)
    return found


def _groups(
    session: Session,
    questions: Sequence[Question],
    sites: Mapping[Site, None],
    inside: Collection[int] = (),
    smaller: int = 1,
) -> Iterator[list[QuestionBatch]]:
    """Yield groups of batches whose kept activations fit into the memory set aside for them."""
    anatomy = session.anatomy
    width = sum(anatomy.hidden_size * int(anatomy.config.num_experts_per_tok) for _ in inside)
    width += sum(_width(anatomy, *site) for site in sites) + len(anatomy.blocks) * anatomy.hidden_size
    batches = question_batches(session, questions, smaller)
    tokens = [max(batch.batch.ids.numel(), batch.batch.last.ids.numel()) for batch in batches]
    sizes = [number * width * anatomy.element_size for number in tokens]
    return within_memory(batches, sizes, _KEPT_BYTES)


def _width(anatomy: Anatomy, layer: int, site: str) -> int:
    if site in ROLES:
        return anatomy.shape(layer, site)[0]
    return anatomy.n_neurons if site == "activation" else anatomy.hidden_size
