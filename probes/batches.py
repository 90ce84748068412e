"""Segments as batches of token ids, padded to one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pruning.errors import TextError
from pruning.text.sources import Segment

_B = TypeVar("_B")
Side = Literal["left", "right"]
#: The tokens of an item of a minimal pair: those of the words in which it differs from its twin; the last one of the
#: prompt and those of a choice, from which the choice is predicted (in an encoder-decoder all that its decoder reads);
#: and the others of the prompt. Each is of one class, a last token of a word that differs too.
TokenClass = Literal["differing", "last", "elsewhere"]
TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)


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
    decoder
        In an encoder-decoder, what the decoder reads while the encoder reads this, row by row; None if only the encoder
        runs, and in a decoder-only model.
    classes
        Place of every token's class in :data:`TOKEN_CLASSES`, −1 at padding and in what is no item of a minimal pair,
        int8 ``[batch, tokens]``; None if nothing is.
    """

    segments: tuple[int, ...]
    ids: Tensor
    real: Tensor
    counted: Tensor
    decoder: Batch | None = None
    classes: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        """Whether a token counts and has one before it to be predicted from, bool ``[batch, tokens - 1]``."""
        return (self.counted[:, 1:] * self.real[:, :-1]).bool()

    @property
    def positions(self) -> Tensor:
        """Position of each token in its segment, whichever side is padded, int64 ``[batch, tokens]``."""
        return (self.real.cumsum(dim=1) - 1).clamp(min=0)

    def of_class(self, tokens: TokenClass) -> Tensor:
        """Return which tokens are of one class, bool ``[batch, tokens]``; none where nothing is of a minimal pair."""
        if self.classes is None:
            return torch.zeros_like(self.real, dtype=torch.bool)
        return self.classes == TOKEN_CLASSES.index(tokens)

    @property
    def last(self) -> Batch:
        """What the last stack that runs reads: the decoder's part, if there is one."""
        return self if self.decoder is None else self.decoder

    @cached_property
    def n_tokens(self) -> int:
        """Number of real tokens, the decoder's included; asked of the device once."""
        return int(self.real.sum()) + (0 if self.decoder is None else self.decoder.n_tokens)


class Batcher:
    """Tokenizes text and cuts it into batches.

    An encoder-decoder reads a text twice: the encoder alone reads all of it, and then the encoder its first half while
    the decoder is given, and predicts, the second (:meth:`halves`), as in pruning.

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
    decoder_start
        The token that the decoder of an encoder-decoder starts from; None for a decoder-only model.
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
        decoder_start: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.padding = padding
        self.skip_first = skip_first
        self.decoder_start = decoder_start
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)

    @property
    def encoder_decoder(self) -> bool:
        """Whether batches are for an encoder-decoder."""
        return self.decoder_start is not None

    def counts(self, ids: Sequence[int], *, encoder: bool = False) -> Tensor:
        """Return which tokens of a text count, in means, frequencies, signal and loss, and in patches.

        This is the one place that decides. The first token of a text is an attention sink, with by far the largest
        states, the same in every text, and it is never predicted: with `skip_first` it does not count, be it BOS or,
        from a tokenizer that adds none, the first token of the text itself. Nor do other special tokens, which are not
        text. An encoder reads in both directions, so to it the first token of a text is one like any other. The first
        one of a decoder is its start token.

        Parameters
        ----------
        ids
            All tokens of one text, as the tokenizer returns them.
        encoder
            Whether the encoder of an encoder-decoder reads them.

        Returns
        -------
        Tensor
            bool ``[tokens]``.
        """
        if not self.skip_first:
            return torch.ones(len(ids), dtype=torch.bool)
        counted = ~torch.isin(torch.tensor(ids, dtype=torch.int64), self._special)
        if not encoder:
            counted[:1] = False
        return counted

    def batches(self, segments: Sequence[Segment]) -> list[Batch]:
        """Cut segments into batches of similar length; for an encoder-decoder, whole ones first, then in halves.

        Raises
        ------
        TextError
            If a segment has no token that counts.
        """
        encoded = [self.encoded(segment) for segment in segments]
        for segment, ids in zip(segments, encoded, strict=True):
            if not self.counts(ids, encoder=self.encoder_decoder).any():
                raise TextError(f'segment "{segment.id}" has no token to count: {segment.text!r}; leave it out')
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        groups = list(_by_length(order, encoded, self.batch_tokens))
        whole = [self.batch(rows, [encoded[i] for i in rows], encoder=self.encoder_decoder) for rows in groups]
        if not self.encoder_decoder:
            return whole
        halves = {i: self.halves(segments[i], encoded[i]) for i in order}
        return whole + [
            self.paired(rows, [halves[i][0] for i in rows], [halves[i][1] for i in rows]) for rows in groups
        ]

    def encoded(self, segment: Segment) -> list[int]:
        """Return the token ids of a segment, special ones included, cut to the maximum length."""
        ids: list[int] = self.tokenizer(segment.text, truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    def halves(self, segment: Segment, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return what encoder and decoder read of a segment: its first half, and the start token with its second half.

        The special tokens that the tokenizer puts around a text stand around the first half; the second one ends with
        those at the end.

        Raises
        ------
        TextError
            If nothing is left for the decoder to predict, or for the encoder to read.
        """
        middle, stop = self._halved(ids)
        start = [] if self.decoder_start is None else [self.decoder_start]
        first = [*ids[:middle], *ids[stop:]]
        second = [*start, *ids[middle:]]
        if not first or not self.counts(second).any():
            raise TextError(f'segment "{segment.id}" is too short to be halved: {segment.text!r}; leave it out')
        return first, second

    def _halved(self, ids: Sequence[int]) -> tuple[int, int]:
        """Return where the second half of a text begins within its token ids, and where it stops."""
        special = set(self._special.tolist())
        text = [place for place, token in enumerate(ids) if token not in special] or [len(ids) - 1]
        begin, stop = text[0], text[-1] + 1
        return begin + (stop - begin) // 2, stop

    def paired(
        self,
        segments: Sequence[int],
        encoder: Sequence[Sequence[int]],
        decoder: Sequence[Sequence[int]],
        *,
        start_counts: bool = False,
    ) -> Batch:
        """Return a batch of what encoder and decoder read, row by row; see :meth:`batch`.

        `start_counts` says whether the decoder's start token counts, as it must where activations are patched: the
        first token is predicted from it alone, and unlike a BOS token it has read the encoder's output.
        """
        read = self.batch(segments, decoder)
        if start_counts:
            first = read.real.bool() & (read.positions == 0)
            read = replace(read, counted=read.counted.masked_fill(first, 1.0))
        return replace(self.batch(segments, encoder, encoder=True), decoder=read)

    def batch(self, segments: Sequence[int], encoded: Sequence[Sequence[int]], *, encoder: bool = False) -> Batch:
        """Pad token ids to one length; `segments` says which segment each row is of, `encoder` who reads them."""
        filler = self.tokenizer.pad_token_id or 0
        ids = self.padded([torch.tensor(tokens, dtype=torch.int64) for tokens in encoded], filler)
        real = self.padded([torch.ones(len(tokens), dtype=torch.int64) for tokens in encoded])
        counted = self.padded([self.counts(tokens, encoder=encoder).float() for tokens in encoded])
        return Batch(tuple(segments), ids.to(self.device), real.to(self.device), counted.to(self.device))

    def padded(self, rows: Sequence[Tensor], filler: int = 0) -> Tensor:
        """Return rows of different lengths as one matrix, filled up on the side that is padded."""
        return pad_sequence(list(rows), batch_first=True, padding_value=filler, padding_side=self.padding)

    def bytes_predicted(self, segment: Segment) -> int:
        """Return the bytes of UTF-8 of the part of a segment that is predicted (:attr:`Batch.predicted`).

        That is what `max_length` leaves, from the end of the first token on: all of it after BOS; in an encoder-decoder
        from the end of the first half on. A character that the token before is only a part of does not count.
        """
        encoded = self.tokenizer(segment.text, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        given = self._halved(encoded["input_ids"])[0] if self.encoder_decoder else 1
        before, others = encoded["offset_mapping"][:given], encoded["offset_mapping"][given:]
        spans = [(max((stop for _, stop in before), default=0), max(stop for _, stop in (*before, *others)))]
        counted = self.counts(encoded["input_ids"], encoder=self.encoder_decoder)[given:]
        special = [span for span, counts in zip(others, counted, strict=True) if not counts]
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
