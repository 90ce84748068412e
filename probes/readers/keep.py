"""Reader: whole values of some sites, for what needs them as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..batches import Batch
from .base import Reader


class Keep(Reader):
    """Keeps the values of some sites of one batch, on the model's device.

    Parameters
    ----------
    wanted
        Sites of any block (``"down"``), or of one (``(3, "down")``).

    Attributes
    ----------
    values
        ``(layer, site)`` to ``[batch, tokens, width]``, in the model's dtype.
    """

    def __init__(self, wanted: Iterable[str | tuple[int, str]]) -> None:
        self._wanted = frozenset(wanted)
        self.sites = frozenset(one if isinstance(one, str) else one[1] for one in self._wanted)
        self.values: dict[tuple[int, str], Tensor] = {}

    def wants(self, layer: int, site: str) -> bool:
        """Whether it keeps a site of a block."""
        return site in self._wanted or (layer, site) in self._wanted

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Keep one site's value."""
        self.values[layer, site] = value
