"""What every reader is: it wants some sites of a model and reduces each value as it passes."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..batches import Batch


class Reader(ABC):
    """Takes values of some sites inside an nnsight trace and reduces them there.

    Nothing whole is kept unless a reader keeps it. To spare a GPU a synchronisation at every site, :meth:`read` leaves
    its small results on the device; :meth:`flush` brings them to the host.

    Attributes
    ----------
    sites
        The sites that it wants, where blocks have them (:meth:`pruning.Anatomy.sites`), or ``final``.
    compares
        Whether it also wants the dense model's value of the same batch and site.
    """

    sites: frozenset[str]
    compares = False

    def wants(self, layer: int, site: str) -> bool:
        """Whether it wants a site of this block; by default those in :attr:`sites`, whatever the block."""
        return site in self.sites

    @abstractmethod
    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Take in the output of one site.

        Parameters
        ----------
        layer
            The block, counted from 0; the number of blocks for ``final``.
        site
            Which of :attr:`sites`.
        value
            Its output, ``[batch, tokens, width]``; at ``routing`` a :class:`probes.routing.Routed`.
        batch
            What was read.
        dense
            The dense model's output there, likewise; only for a reader that compares.
        """

    def flush(self) -> None:
        """Bring what was taken in since the last call to the host. Called after a batch, or after several."""
        return
