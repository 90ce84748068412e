"""What a block itself does to the language-agnostic part of the stream, apart from what earlier blocks did.

That part is nearly the whole stream. Restoring it after a block also brings back what was lost in all blocks before, so
as it stands it cannot be ranked with single roles: after the last block it would come first whatever the damage. What a
block *adds* can: what restoring the part after the block brings back beyond restoring the whole stream before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.patching import Component

#: Kind of what a block adds, beside those of :class:`probes.patching.Component`.
AGNOSTIC_ADDED = "agnostic_added"


@dataclass(frozen=True)
class Added:
    """What one block adds, by the numbers of the components whose effects it is made of.

    Attributes
    ----------
    layer
        The block.
    part, whole
        The agnostic part of the stream after the block, and all of it.
    before
        The whole stream after the block before; None for the first block, in front of which both models are the same.
    """

    layer: int
    part: int
    whole: int
    before: int | None

    @property
    def component(self) -> Component:
        """What it is called; it has nothing to patch of its own."""
        return Component(AGNOSTIC_ADDED, self.layer)

    @property
    def needs(self) -> set[int]:
        """The components that have to be patched to know it."""
        return {self.part} | ({self.before} if self.before is not None else set())

    def rank_by(self, effects: Mapping[int, float]) -> float:
        """Return by what it is ranked: its effect, but no more than the whole stream adds in this block.

        Parts can recover more than the whole does. Such a surplus would put a block's sum before the role in it that
        did all of the damage.
        """
        before = 0.0 if self.before is None else effects[self.before]
        return min(effects[self.part], effects[self.whole]) - before


def added(components: Sequence[Component]) -> list[Added]:
    """Return what every block adds, as far as its stream and agnostic part are among the components."""
    number = {(c.kind, c.layer): i for i, c in enumerate(components)}
    found = []
    for (kind, layer), part in number.items():
        whole, before = number.get(("residual", layer)), number.get(("residual", (layer or 0) - 1))
        if kind == "agnostic" and layer is not None and whole is not None and (before is not None or layer == 0):
            found.append(Added(layer, part, whole, before))
    return found
