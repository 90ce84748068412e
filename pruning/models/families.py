"""Which rows and columns of which projections belong to one neuron, or to one attention head.

A *family* is the neurons of one MLP (or one expert), or the heads of one attention. Removing a unit of a family means
that the columns of ``down`` or ``o`` that read it become zero, and with them the rows that compute it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import RecipeError
from ..patterns import BLOCKS, HEADS, NEURONS, Shape
from .anatomy import ROLES, Anatomy
from .layouts import role_kind

#: The projection that reads the units of a family, to those that compute them.
_WRITERS = {
    "down": ("gate", "up"),
    "shared_down": ("shared_gate", "shared_up"),
    "o": ("q", "k", "v"),
    "cross_o": ("cross_q", "cross_k", "cross_v"),
}
_KINDS = {"down": NEURONS, "shared_down": NEURONS, "o": HEADS, "cross_o": HEADS}


@dataclass(frozen=True)
class Family:
    """The neurons of one MLP, or the heads of one attention.

    Attributes
    ----------
    kind
        ``neurons`` or ``heads``.
    reader
        The role that reads the units: ``down``, ``o``, or one of their relatives.
    units
        Number of units.
    width
        Number of consecutive inputs of the reader that belong to each unit.
    rows
        Roles that compute the units, to the number of consecutive outputs that belong to each.
    sharing
        Number of query heads in a unit.
    """

    kind: str
    reader: str
    units: int
    width: int
    rows: Mapping[str, int]
    sharing: int = 1

    @property
    def roles(self) -> tuple[str, ...]:
        """All its roles, in order of execution."""
        return (*self.rows, self.reader)

    @property
    def called(self) -> str:
        """What its units are called in messages."""
        return self.kind if self.sharing == 1 else f"groups of {self.sharing} heads that share keys and values"

    def weights(self, role: str, shape: Shape) -> int:
        """Return how many weights of a projection belong to one unit."""
        outputs, inputs = shape
        return outputs * self.width if role == self.reader else inputs * self.rows[role]

    def mask(self, role: str, kept: Bool[Tensor, " units"], shape: Shape) -> Bool[Tensor, "outputs inputs"]:
        """Return the mask of one projection, given which units are kept; its rows or columns share memory."""
        if role == self.reader:
            return kept.repeat_interleave(self.width)[None].expand(shape)
        return kept.repeat_interleave(self.rows[role])[:, None].expand(shape)

    def total(self, role: str, scores: Float[Tensor, "outputs inputs"]) -> Float[Tensor, " units"]:
        """Return, for every unit, the sum of the scores of its weights in one projection."""
        if role == self.reader:
            return scores.sum(dim=0).unflatten(0, (self.units, self.width)).sum(dim=1)
        return scores.sum(dim=1).unflatten(0, (self.units, self.rows[role])).sum(dim=1)


def families(anatomy: Anatomy, layer: int, kinds: tuple[str, ...]) -> Iterator[Family]:
    """Yield the families of some kinds in one block, in order of execution.

    Where several query heads share keys and values, they are one unit. If all heads of a block share one key and one
    value head (multi-query attention), each query head is a unit, and keys and values belong to none.

    Raises
    ------
    RecipeError
        If the rows of the heads cannot be told apart.
    """
    roles = anatomy.roles(layer)
    for reader in roles:
        kind, dot, number = reader.partition(".")
        if kind in _WRITERS and _KINDS[kind] in kinds:
            writers = [role for role in (f"{name}{dot}{number}" for name in _WRITERS[kind]) if role in roles]
            inputs = anatomy.shape(layer, reader)[1]
            if _KINDS[kind] == NEURONS:
                yield Family(NEURONS, reader, inputs, 1, dict.fromkeys(writers, 1))
            else:
                yield _heads(anatomy, layer, reader, *writers)


def _heads(anatomy: Anatomy, layer: int, o: str, q: str, k: str, v: str) -> Family:
    heads = int(anatomy.config.num_attention_heads)
    inputs = anatomy.shape(layer, o)[1]
    outputs = {role: anatomy.shape(layer, role)[0] for role in (q, k, v)}
    size = inputs // heads
    groups = outputs[k] // size
    if outputs != {q: heads * size, k: groups * size, v: groups * size} or heads * size != inputs or heads % groups:
        raise RecipeError(
            f'the heads of block {layer} of this "{anatomy.kind}" model cannot be told apart; use pattern "{NEURONS}"'
        )
    if groups == 1:
        return Family(HEADS, o, heads, size, {q: size} if heads > 1 else {q: size, k: size, v: size})
    return Family(HEADS, o, groups, inputs // groups, {q: inputs // groups, k: size, v: size}, heads // groups)


def roles_of(structure: tuple[str, ...]) -> frozenset[str]:
    """Return the kinds of roles that removing such structures may prune; all of them for whole blocks, and for none."""
    if not structure or BLOCKS in structure:
        return frozenset(ROLES)
    readers = [reader for reader, kind in _KINDS.items() if kind in structure]
    return frozenset(role for reader in readers for role in (reader, *_WRITERS[reader]))


def is_reader(role: str) -> bool:
    """Whether a role reads neurons or heads."""
    return role_kind(role) in _WRITERS
