"""Reader: how far the right choice of a question is ahead after every block, through a lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.models.anatomy import Anatomy
from pruning.models.arithmetic import fast_float32

from ..batches import Batch
from .base import Reader
from .lens import Lens

#: States that are read at a time.
_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class FirstDifference:
    """Where the choices of a batch's questions first differ, and by which tokens.

    Attributes
    ----------
    questions
        The questions, int64 ``[questions]``.
    rows, columns
        Where the state is that all choices are predicted from, int64 ``[questions]``.
    right
        Token of the right choice, int64 ``[questions]``.
    others
        Tokens of the others, int64 ``[questions, choices]``, padded with that of the right one.
    """

    questions: Tensor
    rows: Tensor
    columns: Tensor
    right: Tensor
    others: Tensor


class BlockMargins(Reader):
    """Logit of the right choice's token minus the highest of the others', where choices first differ.

    All choices are predicted from one state there, so that this is the difference of their log-probabilities; only the
    rows of the head for these tokens are needed.

    Parameters
    ----------
    anatomy
        Of the model; its final norm and head must be loaded wherever :meth:`flush` is called.
    places
        By the questions of a batch (its segments).
    margins
        Filled in, float64 ``[lenses, layers, questions]``.
    lenses
        The lenses that states are read through.
    first
        The first block that is read, which is the first of `margins`.
    """

    sites = frozenset({"residual"})

    def __init__(
        self,
        anatomy: Anatomy,
        places: Mapping[tuple[int, ...], FirstDifference],
        margins: Tensor,
        lenses: Sequence[Lens],
        first: int = 0,
    ) -> None:
        self._anatomy = anatomy
        self._places = places
        self._lenses = lenses
        self._first = first
        self.margins = margins
        self._waiting: list[tuple[int, FirstDifference, Tensor]] = []

    def wants(self, layer: int, site: str) -> bool:
        """Whether it reads a site of a block."""
        return site in self.sites and layer >= self._first

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Gather the states of one batch's questions."""
        place = self._places.get(batch.segments)
        if place is not None:
            self._waiting.append((layer, place, value[place.rows, place.columns]))

    @torch.no_grad()
    def flush(self) -> None:
        """Compare the choices of the questions that were read."""
        found = [
            (layer, place.questions, torch.stack([self._margins(lens(layer, states), place) for lens in self._lenses]))
            for layer, place, states in self._waiting
        ]
        for layer, questions, margins in found:
            self.margins[:, layer - self._first, questions.cpu()] = margins.double().cpu()
        self._waiting = []

    def _margins(self, states: Tensor, place: FirstDifference) -> Tensor:
        normed = self._anatomy.normed(states)
        parts = zip(*(each.split(_AT_ONCE) for each in (normed, place.right, place.others)), strict=True)
        return torch.cat([self._of_some(*part) for part in parts])

    def _of_some(self, normed: Tensor, right: Tensor, others: Tensor) -> Tensor:
        wanted = torch.cat([right[:, None], others], dim=1)
        tokens, place = wanted.unique(return_inverse=True)
        with fast_float32(normed.device):
            logits = self._anatomy.precise_logits(normed, tokens).gather(1, place)
        against = logits[:, 1:].masked_fill(others == right[:, None], -torch.inf)
        return logits[:, 0] - against.amax(dim=1)
