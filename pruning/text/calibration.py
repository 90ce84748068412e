"""Which text calibrates a pruning run, and the token blocks it is cut into."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
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
    """A named mix of languages with the amount of text and the seed that it is drawn with.

    Attributes
    ----------
    name
        ``en``, ``en+sw`` or ``all``; up to 100 letters, digits and ``. + = _ -``.
    languages
        BCP-47 tags; they share the samples as evenly as possible, earlier ones get the remainder.
    samples
        Blocks of text in total, whatever the number of languages.
    length
        Tokens a block.
    seed
        Of the order in which the text is drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    languages: tuple[str, ...]
    samples: int = Field(default=32, ge=1)
    length: int = Field(default=256, ge=8)
    seed: int = Field(default=0, ge=0)

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

    @classmethod
    def named(
        cls,
        name: str,
        *,
        all_languages: tuple[str, ...] = (),
        samples: int = 32,
        length: int = 256,
        seed: int = 0,
    ) -> CalibrationSet:
        """Build the set that a name stands for: a language, languages joined by ``+``, or ``all``.

        >>> CalibrationSet.named("en+sw", samples=5).shares()
        {'en': 3, 'sw': 2}
        """
        if name == "all":
            languages = all_languages
        else:
            languages = tuple(language_tag(tag) for tag in name.split("+"))
            name = "+".join(languages)
        return cls(name=name, languages=languages, samples=samples, length=length, seed=seed)

    def shares(self) -> dict[str, int]:
        """Return how many of the samples each language gives."""
        each, rest = divmod(self.samples, len(self.languages))
        return {lang: each + (i < rest) for i, lang in enumerate(self.languages)}


def token_blocks(
    tokenizer: Any, segments: Sequence[Segment], language: str, *, samples: int, length: int, seed: int
) -> Int[Tensor, "samples length"]:
    """Put segments in a random order and cut them into blocks; no more text is tokenized than these need.

    Each block starts with the BOS token where the tokenizer puts one before a text, as the model expects
    it. The first blocks do not depend on how many are asked for.

    Parameters
    ----------
    tokenizer
        A ``transformers`` tokenizer.
    segments
        The calibration text.
    language
        Its tag, for messages.
    samples, length
        Number of blocks, and tokens of each.
    seed
        Of the order of the segments.

    Raises
    ------
    TextError
        If the text is too short; says how much there is.
    """
    start = tokenizer("a")["input_ids"][:1]
    if start != [tokenizer.bos_token_id]:  # not every tokenizer that has a BOS token puts it before a text
        start = []
    step = length - len(start)
    order = list(segments)
    random.Random(seed).shuffle(order)
    tokens: list[int] = []
    for segment in order:
        if len(tokens) >= samples * step:
            break
        tokens += tokenizer(segment.text + "\n", add_special_tokens=False)["input_ids"]
    if len(tokens) < samples * step:
        raise TextError(
            f"{samples} samples of {length} tokens wanted for {named(language)}, but its calibration text has "
            f"{len(tokens)} tokens, enough for {len(tokens) // step}; lower samples or length, or give more text"
        )
    return torch.tensor([start + tokens[i * step : (i + 1) * step] for i in range(samples)])


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks of one language's text: the smallest part that calibration sets share."""

    language: str
    seed: int
    length: int
    start: int
    stop: int


class CalibrationText:
    """Token blocks of any number of calibration sets, cut so that each set is a number of whole pieces.

    Sets that draw from the same language with the same seed use the same first blocks, so what is worked out for a
    piece of text serves all of them, and what is worked out for several pieces adds up to that of a set, exactly.

    Attributes
    ----------
    tokens
        Piece to its token blocks, int64 ``[blocks, length]``.
    pieces
        Calibration set to its pieces, in the order of its languages.
    """

    def __init__(self, tokens: Mapping[Piece, Tensor], pieces: Mapping[CalibrationSet, Sequence[Piece]]) -> None:
        self.tokens = dict(tokens)
        self.pieces = {calibration: tuple(parts) for calibration, parts in pieces.items()}

    @classmethod
    def draw(cls, tokenizer: Any, corpus: Corpus, sets: Iterable[CalibrationSet]) -> CalibrationText:
        """Draw the text of calibration sets.

        Raises
        ------
        TextError
            If a language has too little text.
        """
        wanted = list(dict.fromkeys(sets))
        cuts: dict[tuple[str, int, int], set[int]] = {}
        for calibration in wanted:
            for language, share in calibration.shares().items():
                cuts.setdefault((language, calibration.seed, calibration.length), {0}).add(share)
        tokens: dict[Piece, Tensor] = {}
        for (language, seed, length), bounds in cuts.items():
            blocks = token_blocks(
                tokenizer,
                corpus.segments("calibration", language),
                language,
                samples=max(bounds),
                length=length,
                seed=seed,
            )
            for start, stop in pairwise(sorted(bounds)):
                tokens[Piece(language, seed, length, start, stop)] = blocks[start:stop]
        pieces = {
            calibration: [
                piece
                for language, share in calibration.shares().items()
                for piece in tokens
                if (piece.language, piece.seed, piece.length) == (language, calibration.seed, calibration.length)
                and piece.stop <= share
            ]
            for calibration in wanted
        }
        return cls(tokens, pieces)

    def size(self, calibration: CalibrationSet) -> int:
        """Return the number of tokens of a calibration set."""
        return calibration.samples * calibration.length


def calibration_fingerprint(corpus: Corpus, calibration: CalibrationSet) -> str:
    """Return a SHA-256 of the text that a calibration set draws from."""
    return content_sha256({lang: fingerprint(corpus.segments("calibration", lang)) for lang in calibration.languages})
