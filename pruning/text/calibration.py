"""Calibration sets, and their text as sequences of token ids."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from ..errors import RecipeError, TextError
from ..files import content_sha256
from .languages import language_tag, language_tags, named
from .sources import Corpus, Segment, fingerprint

#: Names become parts of file names.
_NAME = re.compile(r"\w[\w.+=-]{0,99}")


class CalibrationSet(BaseModel):
    """A named mix of languages, with a sample count, a sequence length and a seed; part of it may be test items.

    Attributes
    ----------
    name
        ``en``, ``en+sw`` or ``all``; up to 100 letters, digits and ``. + = _ -``.
    languages
        BCP-47 tags. The samples are split as evenly as possible; earlier languages get the remainder.
    samples
        Total number of sequences over all languages.
    length
        Tokens per sequence.
    seed
        Which draw of the text: those of consecutive seeds share no text while there is enough (:meth:`Pool.ranges`).
    items, item_share
        Category of the items, such as ``reasoning``, that this share of the samples is taken from, as text with the
        right answer (:class:`pruning.text.sources.ItemText`); without a share, no category.

    Raises
    ------
    RecipeError, LanguageError
        (wrapped in pydantic's ``ValidationError``) if the name or a tag is invalid, a language has no sample, or the
        share is none of the samples, or without a category.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    languages: tuple[str, ...]
    samples: int = Field(default=32, ge=1)
    length: int = Field(default=256, ge=8)
    seed: int = Field(default=0, ge=0)
    items: str = ""
    item_share: float = 0.0

    @field_validator("name")
    @classmethod
    def _part_of_a_file_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise RecipeError(
                f"calibration set {name[:100]!r}: its name becomes part of file names; "
                "use up to 100 letters, digits and . + = _ -"
            )
        return name

    @field_validator("languages")
    @classmethod
    def _known_languages(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return language_tags(tags)

    @model_validator(mode="after")
    def _a_sample_each(self) -> CalibrationSet:
        if not self.languages or self.samples < len(self.languages):
            raise RecipeError(
                f'calibration set "{self.name}" has {len(self.languages)} languages and {self.samples} samples; '
                "every language needs at least one sample"
            )
        return self

    @model_validator(mode="after")
    def _possible_share(self) -> CalibrationSet:
        share = self.item_share
        if not 0 <= share <= 1:
            raise RecipeError(f"item_share {share:g} is not between 0 and 1; it is the share of samples from items")
        if not share:
            object.__setattr__(self, "items", "")
            return self
        if not self.items:
            raise RecipeError(f'item_share {share:g} needs items, the category to take them from, such as "reasoning"')
        if _rounded(share * self.samples) in {0, self.samples} and share < 1:
            all_or_none = "all" if _rounded(share * self.samples) else "none"
            raise RecipeError(
                f"item_share {share:g} of {self.samples} samples is {all_or_none} of them; raise samples, or choose "
                "another share"
            )
        return self

    @classmethod
    def named(
        cls,
        name: str,
        *,
        all_languages: tuple[str, ...] = (),
        samples: int = 32,
        length: int = 256,
        seed: int = 0,
        items: str = "",
        item_share: float = 0.0,
    ) -> CalibrationSet:
        """Build the set that a name describes: a language, languages joined by ``+``, or ``all``.

        >>> CalibrationSet.named("en+sw", samples=5).shares()
        {'en': 3, 'sw': 2}
        """
        if name == "all":
            languages = all_languages
        else:
            languages = tuple(language_tag(tag) for tag in name.split("+"))
            name = "+".join(languages)
        sizes = {"samples": samples, "length": length, "seed": seed}
        return cls(name=name, languages=languages, **sizes, items=items, item_share=item_share)

    def shares(self) -> dict[str, int]:
        """Return the number of samples of each language."""
        each, rest = divmod(self.samples, len(self.languages))
        return {lang: each + (i < rest) for i, lang in enumerate(self.languages)}

    def parts(self) -> dict[tuple[str, str], int]:
        """Return the number of samples from each pool: language, and category of items (empty for ordinary text).

        The share of items is exact over all languages together, up to rounding to whole samples, and as even between
        them as the samples are.

        >>> CalibrationSet.named("en+sw", samples=6, items="reasoning", item_share=0.5).parts()
        {('en', 'reasoning'): 2, ('en', ''): 1, ('sw', 'reasoning'): 1, ('sw', ''): 2}
        """
        parts: dict[tuple[str, str], int] = {}
        samples = of_items = 0
        for language, share in self.shares().items():
            samples += share
            taken = _rounded(self.item_share * samples) - of_items
            of_items += taken
            parts[language, self.items] = taken
            parts[language, ""] = share - taken
        return {part: number for part, number in parts.items() if number}

    @property
    def title(self) -> str:
        """Its name and seed, and its share of items if it has any, in words."""
        share = f", {100 * self.item_share:.3g}% {self.items} items" if self.item_share else ""
        return f"{self.name} (seed {self.seed}{share})"


class Drawn(BaseModel):
    """What a calibration set takes of one language's calibration text, or of its items.

    Attributes
    ----------
    language
        Tag.
    pool
        SHA-256 (hex) of the text that it is taken from.
    tokens
        Ranges ``(start, stop)`` of that text's tokens.
    items
        Category of the items that this text consists of; empty for ordinary text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    language: str
    pool: str
    tokens: tuple[tuple[int, int], ...]
    items: str = ""


def shared_text(one: Sequence[Drawn], other: Sequence[Drawn]) -> float:
    """Return the share of their tokens that two draws have in common; of the smaller one's, if they differ in size.

    >>> one = [Drawn(language="en", pool="a", tokens=((0, 100),))]
    >>> shared_text(one, [Drawn(language="en", pool="a", tokens=((0, 10), (70, 160)))])
    0.4
    """
    common = sum(
        max(min(stop, end) - max(start, begin), 0)
        for part in one
        for also in other
        if (part.language, part.pool) == (also.language, also.pool)
        for start, stop in part.tokens
        for begin, end in also.tokens
    )
    sizes = [sum(stop - start for part in draw for start, stop in part.tokens) for draw in (one, other)]
    return common / min(sizes)


#: Share of the distance between two draws by which each further lap is shifted: its multiples are far from each other.
_GOLDEN = (5**0.5 - 1) / 2


class Pool:
    """The calibration text of one language as sequences of equal length, tokenized as far as it is needed.

    Each sequence starts with the BOS token if the tokenizer adds one.

    Parameters
    ----------
    tokenizer
        A ``transformers`` tokenizer.
    segments
        The text, in an order that does not depend on any seed.
    language
        Its tag, for messages.
    length
        Tokens of a sequence.
    items
        Category of the items that the text consists of, for messages; empty for ordinary text.

    Attributes
    ----------
    step
        Tokens of a sequence without BOS.
    read
        How many segments were tokenized.
    """

    def __init__(
        self, tokenizer: Any, segments: Sequence[Segment], language: str, length: int, items: str = ""
    ) -> None:
        start = tokenizer("a")["input_ids"][:1]
        if start != [tokenizer.bos_token_id]:  # some tokenizers have a BOS token but do not add it
            start = []
        self.step = length - len(start)
        self._start = start
        self._language = language
        self._length = length
        self._items = items
        self._tokenizer = tokenizer
        self._left = iter(segments)
        self._tokens = array("i")
        self.read = 0

    def ranges(self, samples: int, seed: int) -> tuple[tuple[int, int], ...]:
        """Return the sequences that a draw takes, as ranges ``(start, stop)``; they depend on no other draw.

        Draws of the same size with the seeds 0, 1, 2, … lie one behind the other, so they are disjoint while the text
        lasts. After that they begin again, lap by lap, those of a lap disjoint, and each lap shifted against all before
        it; draws that reach the end of the text read on at its beginning.

        Raises
        ------
        TextError
            If there is too little text for one draw.
        """
        there = self._tokenized((seed + 1) * samples)
        if there < samples:
            raise TextError(
                f"{samples} samples of {self._length} tokens requested for {named(self._language)}, but its "
                f"{f'{self._items} items have' if self._items else 'calibration text has'} {len(self._tokens)} tokens, "
                f"enough for {there}; lower samples{', item_share' if self._items else ''} or length, or add "
                f"{'items' if self._items else 'text'}"
            )
        in_a_lap = there // samples
        lap, place = divmod(seed, in_a_lap)
        start = (place * samples + int(lap * _GOLDEN % 1 * (there // in_a_lap))) % there
        stop = start + samples
        return ((start, stop),) if stop <= there else ((0, stop - there), (start, there))

    def sequences(self, start: int, stop: int) -> Int[Tensor, "samples length"]:
        """Return some sequences, int64 ``[samples, length]``."""
        rows = (self._tokens[i * self.step : (i + 1) * self.step] for i in range(start, stop))
        return torch.tensor([[*self._start, *row] for row in rows])

    def _tokenized(self, wanted: int) -> int:
        """Tokenize up to as many sequences, and return how many there are."""
        while len(self._tokens) < wanted * self.step and (segment := next(self._left, None)) is not None:
            self._tokens.extend(self._tokenizer(segment.text + "\n", add_special_tokens=False)["input_ids"])
            self.read += 1
        return len(self._tokens) // self.step


@dataclass(frozen=True)
class Piece:
    """Consecutive sequences of one language, and one category of items if there is one: what calibration sets share."""

    language: str
    length: int
    start: int
    stop: int
    items: str = ""


class CalibrationText:
    """The text of several calibration sets, cut so that every set consists of whole pieces.

    Sets that draw the same sequences of a language share their pieces. Statistics of a piece are therefore computed
    once for all sets, and those of a set are the sum over its pieces.

    Attributes
    ----------
    tokens
        Piece to its token ids, int64 ``[sequences, length]``.
    pieces
        Calibration set to its pieces, in the order of its languages.
    drawn
        Calibration set to what it takes of each language's text.
    read
        Language, category of items (empty for text) and length of sequences to the number of segments that all draws
        are taken from, the first ones.
    """

    def __init__(
        self,
        tokens: Mapping[Piece, Tensor],
        pieces: Mapping[CalibrationSet, Sequence[Piece]],
        drawn: Mapping[CalibrationSet, tuple[Drawn, ...]] | None = None,
        read: Mapping[tuple[str, str, int], int] | None = None,
    ) -> None:
        self.tokens = dict(tokens)
        self.pieces = {calibration: tuple(parts) for calibration, parts in pieces.items()}
        self.drawn = dict(drawn or {})
        self.read = dict(read or {})

    @classmethod
    def draw(cls, tokenizer: Any, corpus: Corpus, sets: Iterable[CalibrationSet]) -> CalibrationText:
        """Draw the text of all calibration sets.

        Raises
        ------
        TextError
            If a language has too little text, or too few items.
        """
        pools: dict[tuple[str, str, int], Pool] = {}
        ranges: dict[CalibrationSet, dict[tuple[str, str], tuple[tuple[int, int], ...]]] = {}
        for calibration in dict.fromkeys(sets):
            for (language, items), share in calibration.parts().items():
                place = language, items, calibration.length
                if place not in pools:
                    segments = corpus.pool(language, items)
                    pools[place] = Pool(tokenizer, segments, language, calibration.length, items)
                ranges.setdefault(calibration, {})[language, items] = pools[place].ranges(share, calibration.seed)
        tokens = {}
        for (language, items, length), pool in pools.items():
            taken = {
                bounds for c, of in ranges.items() if c.length == length for bounds in of.get((language, items), ())
            }
            for start, stop in pairwise(sorted({bound for bounds in taken for bound in bounds})):
                if _within(start, stop, taken):
                    tokens[Piece(language, length, start, stop, items)] = pool.sequences(start, stop)
        pieces = {
            calibration: [
                piece
                for (language, items), own in of.items()
                for piece in tokens
                if (piece.language, piece.items, piece.length) == (language, items, calibration.length)
                and _within(piece.start, piece.stop, own)
            ]
            for calibration, of in ranges.items()
        }
        texts = {(lang, items): fingerprint(corpus.pool(lang, items)) for lang, items, _ in pools}
        drawn = {
            calibration: tuple(
                Drawn(
                    language=language,
                    pool=texts[language, items],
                    tokens=tuple((start * step, stop * step) for start, stop in own),
                    items=items,
                )
                for (language, items), own in of.items()
                for step in [pools[language, items, calibration.length].step]
            )
            for calibration, of in ranges.items()
        }
        return cls(tokens, pieces, drawn, {place: pool.read for place, pool in pools.items()})

    def size(self, calibration: CalibrationSet) -> int:
        """Return the number of tokens of a calibration set."""
        return calibration.samples * calibration.length


def calibration_fingerprint(corpus: Corpus, calibration: CalibrationSet) -> str:
    """Return the SHA-256 (hex) of the text that a calibration set draws from."""
    return set_fingerprint(calibration, lambda language, items: fingerprint(corpus.pool(language, items)))


def set_fingerprint(calibration: CalibrationSet, pool: Callable[[str, str], str]) -> str:
    """Return the same, given the SHA-256 of each language's text, and of its items of a category."""
    return content_sha256({"/".join(filter(None, part)): pool(*part) for part in calibration.parts()})


def _rounded(number: float) -> int:
    """Round to the nearest whole number, halves up."""
    return int(number + 0.5)


def _within(start: int, stop: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(begin <= start and stop <= end for begin, end in ranges)
