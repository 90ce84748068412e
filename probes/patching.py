"""Interventions: a part of one run put into another, to see how much of the damage it makes or takes back.

A *component* is what is put over: the residual stream after a block, a part of it, the output of a role, some
neurons, or the weights of a projection. *Restoring* puts the dense model's into the pruned one; *damaging* puts the
pruned model's into the dense one. Both runs read the same tokens, so values fit place by place.

Exact patching runs the model once for each component. Attribution estimates all of them at once from gradients of the
run that is changed (attribution patching: Nanda, 2023; Syed et al., 2024, 2310.10348): exact only as far as the model
is linear, which is what the exact runs are there to tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pruning.models.anatomy import ROLES, Anatomy
from pruning.projections import Key
from pruning.variants.owner import DenseModel, write_weight
from pruning.variants.variant import Variant

from .batches import Batch, within_memory
from .readers.keep import Keep
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
from .session import Session

Direction = Literal["restore", "damage"]
RESTORE: Direction = "restore"
DAMAGE: Direction = "damage"
#: Bytes of activations of the run that is put over, kept at a time.
_KEPT_BYTES = 1 << 30
#: Batches are so many times smaller where everything on the way to a gradient has to be kept.
_DIFFERENTIATED = 4

Site = tuple[int, str]


@dataclass(frozen=True, eq=False)
class Place:
    """Part of one site, to be put over.

    Attributes
    ----------
    layer, site
        Where.
    basis
        Orthonormal columns, float32 ``[width, rank]``: only what lies in their span, or with `outside` only the rest.
    columns
        Only these values of each token, int64 ``[n]``.
    """

    layer: int
    site: str
    basis: Tensor | None = None
    outside: bool = False
    columns: Tensor | None = None

    def part(self, values: Tensor) -> Tensor:
        """Return this part of values ``[..., width]``: in the basis, of the columns, or whole."""
        if self.columns is not None:
            return values[..., self.columns.to(values.device)]
        if self.basis is None:
            return values
        basis = self.basis.to(values)
        inside = (values @ basis) @ basis.T
        return values - inside if self.outside else inside

    def put(self, value: Tensor, other: Tensor) -> Tensor:
        """Return `value` with this part taken from `other`."""
        if self.columns is not None:
            return value.index_copy(-1, self.columns.to(value.device), self.part(other))
        return other if self.basis is None else value + self.part(other - value)


@dataclass(frozen=True, eq=False)
class Component:
    """What is put over as one.

    Attributes
    ----------
    kind
        What it is: ``residual``, ``specific``, ``agnostic``, ``random``, ``output``, ``weights``, ``neurons``,
        ``random_neurons``.
    layer, role
        The block, if it is of one; the role likewise.
    places
        Values that are put over.
    weights
        Projections whose weights are.
    """

    kind: str
    layer: int | None = None
    role: str | None = None
    places: tuple[Place, ...] = ()
    weights: tuple[Key, ...] = ()

    @property
    def first_layer(self) -> int:
        """The first block in which anything is put over."""
        return min([place.layer for place in self.places] + [layer for layer, _ in self.weights])

    @property
    def label(self) -> str:
        """A short name, unique among the components of a diagnosis: ``weights 9.down``."""
        place = ".".join(str(part) for part in (self.layer, self.role) if part is not None)
        return f"{self.kind} {place}".strip()


def residual(layer: int) -> Component:
    """Return the whole residual stream after a block."""
    return Component("residual", layer, places=(Place(layer, "residual"),))


def stream_part(kind: str, layer: int, basis: Tensor, *, outside: bool = False) -> Component:
    """Return the part of the residual stream after a block in the span of a basis, or outside of it."""
    return Component(kind, layer, places=(Place(layer, "residual", basis, outside),))


def role_output(layer: int, role: str) -> Component:
    """Return the output of a role in one block."""
    return Component("output", layer, role, places=(Place(layer, role),))


def role_weights(layer: int, role: str) -> Component:
    """Return the weights of a role in one block: restoring them undoes its mask."""
    return Component("weights", layer, role, weights=((layer, role),))


def neurons(kind: str, anatomy: Anatomy, chosen: Mapping[int, Tensor]) -> Component:
    """Return MLP neurons, by block, in all blocks together: their gates' activation and, in a gated MLP, the product's
    other factor, so that what they put out is put over.
    """
    places = [
        Place(layer, site, columns=columns)
        for layer, columns in chosen.items()
        if len(columns)
        for site in anatomy.sites(layer)
        if site == "activation" or (site == "up" and anatomy.has_gate(layer))
    ]
    return Component(kind, places=tuple(places))


class DamagedModel:
    """A dense model that can be turned into a pruned variant and back quickly.

    Parameters
    ----------
    owner
        Of the dense model (``session.owner``), which must be in memory.
    variant
        Of that model.

    Raises
    ------
    VariantError
        If the variant is of another model.
    """

    def __init__(self, owner: DenseModel, variant: Variant) -> None:
        owner.check(variant)
        self._owner = owner
        self._variant = variant

    @property
    def projections(self) -> tuple[Key, ...]:
        """The projections that were pruned."""
        return tuple(self._variant.masks)

    def damaged(self) -> AbstractContextManager[None]:
        """Make the model the pruned one inside a ``with`` block."""
        return self._owner.pruned_to(self._variant)

    def change(self, key: Key) -> Tensor:
        """Return a projection's dense weight minus its pruned one, on the model's device."""
        dense = self._owner.dense[key].to(self._owner.anatomy.device)
        pruned = torch.empty_like(dense)
        self._variant.write(key, dense, pruned)
        return dense - pruned

    @contextmanager
    def with_weights(self, keys: Sequence[Key], *, dense: bool) -> Iterator[None]:
        """Give some projections the weights of the dense, or of the pruned model, inside a ``with`` block."""
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


@dataclass(frozen=True)
class Patched:
    """Scores of the same questions in the dense and the pruned model, and with components put over.

    Attributes
    ----------
    dense, pruned
        Scores of the two models.
    exact
        Component's place in the list that was asked for → scores of the changed model with it put over.
    attributed
        Component's place → the estimated change of the objective (:func:`probes.scoring.objective`), float64
        ``[questions]``; of weights only the sum over questions is known: a single value.
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
    progress: Progress = lambda tokens: None,
) -> Patched:
    """Put every component over, one at a time, and score the questions.

    Parameters
    ----------
    session
        Of the dense model.
    questions
        What is scored.
    damage
        The pruned model.
    components
        What is put over.
    direction
        ``"restore"``: the dense model's into the pruned one; ``"damage"``: the other way.
    progress
        Told of the tokens as they are read, by one run after another.
    """
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
                    start = component.first_layer  # before it, the run is the clean one
                    for batch, values, outputs in zip(group, kept, clean, strict=True):
                        edits = [_Put(place, values[place.layer, place.site]) for place in component.places]
                        final = final_states(session, batch.batch, edits=edits, outputs=outputs, start=start)
                        scores.take(batch, batch.scores(session.anatomy, final))
                        progress(int(batch.batch.real.sum()))
    return Patched(dense.scores, pruned.scores, {i: table.scores for i, table in enumerate(exact)})


def attribute(
    session: Session,
    questions: Sequence[Question],
    damage: DamagedModel,
    components: Sequence[Component],
    *,
    direction: Direction = RESTORE,
    progress: Progress = lambda tokens: None,
) -> Patched:
    """Estimate what :func:`patch` would measure, for all components at once, from gradients.

    The gradient of the objective in the model that is changed, times the difference that the component makes there.
    Parameters are those of :func:`patch`.
    """
    sites = _sites(place for component in components for place in component.places)
    wanted = {key for component in components for key in component.weights}
    dense, pruned = ScoreTable(questions), ScoreTable(questions)
    first, second = (dense, pruned) if direction == RESTORE else (pruned, dense)
    totals: dict[Key, float] = dict.fromkeys(wanted, 0.0)
    effects = {i: np.zeros(len(questions)) for i, component in enumerate(components) if component.places}
    for group in _groups(session, questions, sites, smaller=_DIFFERENTIATED):
        with _as(damage, direction == DAMAGE):
            kept = [_run(session, batch, first, sites, progress) for batch in group]
        summed: dict[Key, Tensor] = {}
        with _as(damage, direction == RESTORE):
            for batch, values in zip(group, kept, strict=True):
                gradients = _differentiate(session, batch, second, sites, bool(wanted))
                progress(3 * int(batch.batch.real.sum()))
                for i, sums in effects.items():
                    rows = sum(_effect(place, gradients, values) for place in components[i].places)
                    assert isinstance(rows, Tensor)
                    np.add.at(sums, np.array(batch.batch.segments), rows.double().cpu().numpy())
                for key, gradient in gradients.weights.items():
                    if key in wanted:
                        summed[key] = summed[key].add_(gradient) if key in summed else gradient
        for key, gradient in summed.items():
            effect = float((gradient * damage.change(key)).sum(dtype=torch.float64))
            totals[key] += effect if direction == RESTORE else -effect
    attributed = {**effects}
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
    """Puts the other run's values into a site."""

    place: Place
    other: Tensor

    @property
    def layer(self) -> int:
        return self.place.layer

    @property
    def site(self) -> str:
        return self.place.site

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        return self.place.put(value, self.other)


def _run(
    session: Session,
    batch: QuestionBatch,
    scores: ScoreTable,
    sites: Mapping[Site, None],
    progress: Progress,
    outputs: dict[int, Any] | None = None,
) -> dict[Site, Tensor]:
    """Score one batch with the model as it is, and return what it does at some sites."""
    keep = Keep(sites)
    final = final_states(session, batch.batch, [keep], outputs=outputs)
    scores.take(batch, batch.scores(session.anatomy, final))
    progress(int(batch.batch.real.sum()))
    return keep.values


@dataclass(frozen=True)
class _Gradients:
    """Values at sites of the run that is changed, the objective's gradients there, and those of the weights."""

    values: Mapping[Site, Tensor]
    gradients: Mapping[Site, Tensor]
    weights: Mapping[Key, Tensor]


def _differentiate(
    session: Session, batch: QuestionBatch, scores: ScoreTable, sites: Mapping[Site, None], weights: bool
) -> _Gradients:
    # Every site is touched by an edit that changes nothing: its value, which may be a part of a larger output, is then
    # a tensor of its own on the way to the end, which a gradient can be asked of.
    with session.differentiable() as parameters, torch.enable_grad():
        keep = Keep(sites)
        touches = [_Touch(*site) for site in sites]
        final = final_states(session, batch.batch, [keep], touches)
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
    )


@dataclass(frozen=True)
class _Touch:
    """Changes nothing, but makes a site's value a tensor of its own."""

    layer: int
    site: str

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        return value * 1.0


def _effect(place: Place, run: _Gradients, others: Mapping[Site, Tensor]) -> Tensor:
    """Return the estimated change of the objective if a place is put over, by row."""
    site = place.layer, place.site
    if site not in run.gradients:
        return torch.zeros(len(run.values[site]))
    change = place.part(others[site] - run.values[site])
    return (change * place.part(run.gradients[site])).flatten(1).sum(dim=1)


def _groups(
    session: Session, questions: Sequence[Question], sites: Mapping[Site, None], smaller: int = 1
) -> Iterator[list[QuestionBatch]]:
    """Yield runs of batches whose kept activations fit the memory set aside for them."""
    anatomy = session.anatomy
    width = sum(_width(anatomy, *site) for site in sites) + len(anatomy.blocks) * anatomy.hidden_size
    batches = question_batches(session, questions, smaller)
    sizes = [batch.batch.ids.numel() * width * anatomy.element_size for batch in batches]
    return within_memory(batches, sizes, _KEPT_BYTES)


def _width(anatomy: Anatomy, layer: int, site: str) -> int:
    if site in ROLES:
        return anatomy.shape(layer, site)[0]
    return anatomy.n_neurons if site == "activation" else anatomy.hidden_size
