"""Readers: states at a sample of positions, for what costs too much at all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.errors import TextError

from ..batches import Batch
from .base import Reader

#: Of a batch: which positions of the sample are in it, and their rows and columns; each int64 ``[positions]``.
Place = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Sample:
    """Positions of a text, drawn at random from those that count and whose next token counts too.

    Which ones are drawn depends on the text and the seed only, not on how it is cut into batches.

    Attributes
    ----------
    segment, position
        Segment of each, and its position in the tokens of the segment, int64 ``[positions]``, sorted.
    following
        The token after each, int64 ``[positions]``, on the model's device.
    places
        By the segments of a batch; batches that hold none of the positions are left out.
    """

    segment: Tensor
    position: Tensor
    following: Tensor
    places: Mapping[tuple[int, ...], Place]

    @classmethod
    def of(cls, batches: Sequence[Batch], count: int, seed: int = 0) -> Sample:
        """Draw `count` positions, or take all if there are fewer.

        Parameters
        ----------
        batches
            All batches of a text; of an encoder-decoder, what its decoder reads is sampled.
        count, seed
            Number of positions, and seed of the draw.

        Raises
        ------
        TextError
            If there is none.
        """
        read = decoded(batches)
        there = [_eligible(batch) for batch in read]
        segment, position, following = (torch.cat(part) for part in zip(*(own[2:] for own in there), strict=True))
        if not len(segment):
            raise TextError("a lens needs two tokens in a row that count, and no segment has them; add longer text")
        order = np.lexsort((position.cpu().numpy(), segment.cpu().numpy()))
        drawn = np.random.default_rng(seed).choice(len(order), min(count, len(order)), replace=False)
        chosen = torch.from_numpy(order[np.sort(drawn)])
        number = torch.full((len(order),), -1)
        number[chosen] = torch.arange(len(chosen))
        places = {}
        for batch, own, index in zip(read, there, number.split([len(own[0]) for own in there]), strict=True):
            inside = index >= 0
            if inside.any():
                on_device = inside.to(own[0].device)
                places[batch.segments] = (index[inside].to(own[0].device), own[0][on_device], own[1][on_device])
        return cls(segment.cpu()[chosen], position.cpu()[chosen], following[chosen.to(following.device)], places)

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.segment)


def decoded(batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches in which the next token is predicted: in an encoder-decoder, those with a decoder's part."""
    return [batch for batch in batches if batch.decoder is not None] or list(batches)


def _eligible(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return row, column, segment, position and next token of what may be drawn of a batch."""
    read = batch.last
    rows, columns = (read.predicted & read.counted[:, :-1].bool()).nonzero(as_tuple=True)
    segments = torch.tensor(batch.segments, device=rows.device)[rows]
    return rows, columns, segments, read.positions[rows, columns], read.ids[rows, columns + 1]


class SampledStates(Reader):
    """Gathers the values of one site at the positions of a sample, on the model's device.

    Parameters
    ----------
    sample
        The positions.
    site
        ``residual``, or ``final`` for what the head reads.
    first
        The first block of which they are gathered.
    """

    def __init__(self, sample: Sample, site: str, first: int = 0) -> None:
        self.sample = sample
        self.sites = frozenset({site})
        self._first = first
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def wants(self, layer: int, site: str) -> bool:
        """Whether it gathers a site of a block."""
        return site in self.sites and layer >= self._first

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Gather the positions of one batch."""
        place = self.sample.places.get(batch.segments)
        if place is not None:
            index, rows, columns = place
            self._waiting.setdefault(layer, []).append((index, value[rows, columns]))

    def taken(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield block, positions (their numbers in the sample) and states of what was gathered since the last call."""
        for layer, parts in self._waiting.items():
            yield layer, torch.cat([index for index, _ in parts]), torch.cat([states for _, states in parts])
        self._waiting = {}


class StoredStates(SampledStates):
    """Writes the states after every block at the positions of a sample to a tensor.

    Parameters
    ----------
    sample
        The positions.
    states
        Filled in, ``[layers, positions, hidden]``.
    first
        The first block, which is the first of `states`.
    """

    def __init__(self, sample: Sample, states: Tensor, first: int = 0) -> None:
        super().__init__(sample, "residual", first)
        self.states = states

    def flush(self) -> None:
        """Write what was gathered."""
        for layer, index, found in self.taken():
            self.states[layer - self._first, index.cpu()] = found.to("cpu", self.states.dtype)
