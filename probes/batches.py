"""Segments as batches of token ids, padded to one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pruning.errors import TextError
from pruning.text.sources import Segment

_B = TypeVar("_B")
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Segments as token ids, padded to one length.

    Attributes
    ----------
    segments
        Index of each row's segment in the list that the batches were made from.
    ids
        Token ids, int64 ``[batch, tokens]``.
    real
        1 where a token is real, 0 where it is padding, int64 ``[batch, tokens]``.
    counted
        1.0 where a token counts (:meth:`Batcher.counts`), 0.0 elsewhere and at padding, float32 ``[batch, tokens]``.
    """

    segments: tuple[int, ...]
    ids: Tensor
    real: Tensor
    counted: Tensor

    @property
    def predicted(self) -> Tensor:
        """Whether a token counts and has one before it to be predicted from, bool ``[batch, tokens - 1]``."""
        return (self.counted[:, 1:] * self.real[:, :-1]).bool()

    @property
    def positions(self) -> Tensor:
        """Position of each token in its segment, whichever side is padded, int64 ``[batch, tokens]``."""
        return (self.real.cumsum(dim=1) - 1).clamp(min=0)

    @cached_property
    def n_tokens(self) -> int:
        """Number of real tokens; asked of the device once."""
        return int(self.real.sum())


class Batcher:
    """Tokenizes text and cuts it into batches.

    Parameters
    ----------
    tokenizer
        As ``transformers`` has it.
    device
        Where batches go.
    max_length
        Segments are cut after this many tokens, special ones included.
    batch_tokens
        Tokens of a batch at most, padding included; bounds the memory.
    padding
        Side on which short segments are padded.
    skip_first
        Whether to leave out what :meth:`counts` says.
    """

    def __init__(
        self,
        tokenizer: Any,
        device: torch.device,
        *,
        max_length: int,
        batch_tokens: int,
        padding: Side,
        skip_first: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.padding = padding
        self.skip_first = skip_first
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)

    def counts(self, ids: Sequence[int]) -> Tensor:
        """Return which tokens of a text count, in means, frequencies, signal and loss, and in patches.

        This is the one place that decides. The first token of a text is an attention sink, with by far the largest
        states, the same in every text, and it is never predicted: with `skip_first` it does not count, be it BOS or,
        from a tokenizer that adds none, the first token of the text itself. Nor do other special tokens, which are not
        text.

        Parameters
        ----------
        ids
            All tokens of one text, as the tokenizer returns them.

        Returns
        -------
        Tensor
            bool ``[tokens]``.
        """
        if not self.skip_first:
            return torch.ones(len(ids), dtype=torch.bool)
        counted = ~torch.isin(torch.tensor(ids, dtype=torch.int64), self._special)
        counted[:1] = False
        return counted

    def batches(self, segments: Sequence[Segment]) -> list[Batch]:
        """Cut segments into batches of similar length.

        Raises
        ------
        TextError
            If a segment has no token that counts.
        """
        encoded = [self.tokenizer(s.text, truncation=True, max_length=self.max_length)["input_ids"] for s in segments]
        for segment, ids in zip(segments, encoded, strict=True):
            if not self.counts(ids).any():
                raise TextError(f'segment "{segment.id}" has no token to count: {segment.text!r}; leave it out')
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        return [self.batch(rows, [encoded[i] for i in rows]) for rows in _by_length(order, encoded, self.batch_tokens)]

    def batch(self, segments: Sequence[int], encoded: Sequence[Sequence[int]]) -> Batch:
        """Pad token ids to one length; `segments` says which segment each row is of."""
        width = max(map(len, encoded))
        filler = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(encoded), width), filler)
        real = torch.zeros_like(ids)
        counted = torch.zeros(ids.shape)
        for row, tokens in enumerate(encoded):
            place = slice(0, len(tokens)) if self.padding == "right" else slice(width - len(tokens), width)
            ids[row, place] = torch.tensor(tokens)
            real[row, place] = 1
            counted[row, place] = self.counts(tokens).float()
        return Batch(tuple(segments), ids.to(self.device), real.to(self.device), counted.to(self.device))

    def bytes_predicted(self, segment: Segment) -> int:
        """Return the bytes of UTF-8 of the part of a segment that is predicted (:attr:`Batch.predicted`).

        That is what `max_length` leaves, from the end of the first token on: all of it after BOS. A character that the
        first token is only a part of does not count.
        """
        encoded = self.tokenizer(segment.text, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        first, *others = encoded["offset_mapping"]
        spans = [(first[1], max(stop for _, stop in (first, *others)))]
        special = [
            span for span, counts in zip(others, self.counts(encoded["input_ids"])[1:], strict=True) if not counts
        ]
        whole, left_out = (sum(len(segment.text[a:b].encode("utf-8")) for a, b in part) for part in (spans, special))
        return whole - left_out


def _by_length(order: list[int], encoded: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield runs of `order` (by rising length) whose padded size stays within `batch_tokens`."""
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * len(encoded[i]) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def within_memory(batches: Sequence[_B], sizes: Sequence[int], limit: int) -> Iterator[list[_B]]:
    """Yield runs of batches whose sizes, in bytes, add up to no more than `limit`; one batch at least."""
    group: list[_B] = []
    held = 0
    for batch, size in zip(batches, sizes, strict=True):
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group
