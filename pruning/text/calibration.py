"""Calibration sets, and their text as sequences of token ids."""

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
    """A named mix of languages, with a sample count, a sequence length and a seed.

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
        Seed of the order in which segments are drawn.

    Raises
    ------
    RecipeError, LanguageError
        (wrapped in pydantic's ``ValidationError``) if the name or a tag is invalid, or a language has no sample.
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
        """Build the set that a name describes: a language, languages joined by ``+``, or ``all``.

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
        """Return the number of samples of each language."""
        each, rest = divmod(self.samples, len(self.languages))
        return {lang: each + (i < rest) for i, lang in enumerate(self.languages)}


def token_blocks(
    tokenizer: Any, segments: Sequence[Segment], language: str, *, samples: int, length: int, seed: int
) -> Int[Tensor, "samples length"]:
    """Shuffle segments and cut them into sequences of equal length; only as much text as needed is tokenized.

    Each sequence starts with the BOS token if the tokenizer adds one. The first sequences do not depend on
    `samples`.

    Parameters
    ----------
    tokenizer
        A ``transformers`` tokenizer.
    segments
        The calibration text.
    language
        Its tag, for messages.
    samples, length
        Number of sequences, and tokens in each.
    seed
        Seed of the shuffle.

    Returns
    -------
    Tensor
        Token ids, int64 ``[samples, length]``.

    Raises
    ------
    TextError
        If there is too little text.
    """
    start = tokenizer("a")["input_ids"][:1]
    if start != [tokenizer.bos_token_id]:  # some tokenizers have a BOS token but do not add it
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
            f"{samples} samples of {length} tokens requested for {named(language)}, but its calibration text has "
            f"{len(tokens)} tokens, enough for {len(tokens) // step}; lower samples or length, or add text"
        )
    return torch.tensor([start + tokens[i * step : (i + 1) * step] for i in range(samples)])


@dataclass(frozen=True)
class Piece:
    """Consecutive sequences of one language: the unit that calibration sets share."""

    language: str
    seed: int
    length: int
    start: int
    stop: int


class CalibrationText:
    """The text of several calibration sets, cut so that every set consists of whole pieces.

    Sets that draw from the same language with the same seed share their first sequences. Statistics of a piece are
    therefore computed once for all sets, and those of a set are the sum over its pieces.

    Attributes
    ----------
    tokens
        Piece to its token ids, int64 ``[sequences, length]``.
    pieces
        Calibration set to its pieces, in the order of its languages.
    """

    def __init__(self, tokens: Mapping[Piece, Tensor], pieces: Mapping[CalibrationSet, Sequence[Piece]]) -> None:
        self.tokens = dict(tokens)
        self.pieces = {calibration: tuple(parts) for calibration, parts in pieces.items()}

    @classmethod
    def draw(cls, tokenizer: Any, corpus: Corpus, sets: Iterable[CalibrationSet]) -> CalibrationText:
        """Draw the text of all calibration sets.

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
    """Return the SHA-256 (hex) of the text that a calibration set draws from."""
    return content_sha256({lang: fingerprint(corpus.segments("calibration", lang)) for lang in calibration.languages})
