"""What is patched in one intervention: parts of sites, or weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruning.models.anatomy import EXPERTS, HEADS, Anatomy, expert_site
from pruning.projections import Key

from ..batches import TokenClass

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
    tokens
        Patches only this class of the tokens of minimal pairs, and nothing in what is no pair; None patches whatever
        token is patched. Not of what an expert adds.
    """

    layer: int
    site: str
    basis: Tensor | None = None
    outside: bool = False
    columns: Tensor | None = None
    tokens: TokenClass | None = None

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
        One of ``residual``, ``residual_differing``, ``residual_last``, ``residual_elsewhere``, ``specific``,
        ``agnostic``, ``random``, ``output``, ``head``, ``weights``, ``neurons``, ``random_neurons``.
    layer, role
        Block and role, if the component belongs to a single one; of a head ``"head.3"``.
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


def residual_at(layer: int, tokens: TokenClass) -> Component:
    """Return the residual stream after a block at one class of the tokens of minimal pairs."""
    return Component(f"residual_{tokens}", layer, places=(Place(layer, "residual", tokens=tokens),))


def stream_part(kind: str, layer: int, basis: Tensor, *, outside: bool = False, draw: int | None = None) -> Component:
    """Return the part of the residual stream after a block that lies in the span of a basis, or outside it."""
    return Component(kind, layer, places=(Place(layer, "residual", basis, outside),), draw=draw)


def role_output(layer: int, role: str) -> Component:
    """Return the output of a role in one block."""
    return Component("output", layer, role, places=(Place(layer, role),))


def head(anatomy: Anatomy, layer: int, number: int, site: str = "heads") -> Component:
    """Return what one head of a block's attention puts out, before it is mixed with that of the others.

    With grouped keys and values it is a head of queries. Where a norm follows the attention (Gemma), heads do not add
    up to its output.
    """
    width = anatomy.shape(layer, HEADS[site])[1] // anatomy.n_heads(layer, site)
    columns = torch.arange(number * width, (number + 1) * width)
    return Component("head", layer, head_role(number, site), places=(Place(layer, site, columns=columns),))


def head_role(number: int, site: str = "heads") -> str:
    """Return what a head is called.

    >>> head_role(3), head_role(0, "cross_heads")
    ('head.3', 'cross_head.0')
    """
    return f"{site.removesuffix('s')}.{number}"


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
