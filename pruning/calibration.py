"""Which text calibrates a pruning run, and the token blocks it is cut into."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from .errors import RecipeError, TextError
from .files import content_sha256
from .languages import language_tag, language_tags, named
from .text import Corpus, Segment, fingerprint


class CalibrationSet(BaseModel):
    """A named mix of languages with the amount of text and the seed that it is drawn with.

    Attributes
    ----------
    name
        ``en``, ``en+sw`` or ``all``.
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


@dataclass(frozen=True)
class TokenStream:
    """Calibration text of one language and seed: segments in a random order, cut into blocks of equal length.

    Each block starts with the tokenizer's BOS token where it has one, as every text does that the model was
    trained on. A mix of languages takes the first blocks of each of its streams.

    Attributes
    ----------
    tokenizer
        A ``transformers`` tokenizer.
    segments
        The calibration text.
    language
        Its tag, for messages.
    seed
        Of the order of the segments.
    """

    tokenizer: Any
    segments: Sequence[Segment]
    language: str
    seed: int

    @cached_property
    def _tokens(self) -> list[int]:
        order = list(self.segments)
        random.Random(self.seed).shuffle(order)
        text = [segment.text + "\n" for segment in order]
        encoded = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return [token for tokens in encoded for token in tokens]

    def blocks(self, samples: int, length: int) -> Int[Tensor, "samples length"]:
        """Return the first `samples` blocks of `length` tokens.

        Raises
        ------
        TextError
            If the text is too short; says how much there is.
        """
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        step = length - len(start)
        available = len(self._tokens) // step if step > 0 else 0
        if available < samples:
            raise TextError(
                f"{samples} samples of {length} tokens wanted for {named(self.language)}, but its calibration "
                f"text has {len(self._tokens)} tokens, enough for {available}; "
                "lower samples or length, or give more text"
            )
        return torch.tensor([start + self._tokens[i * step : (i + 1) * step] for i in range(samples)])


def calibration_tokens(tokenizer: Any, corpus: Corpus, calibration: CalibrationSet) -> Int[Tensor, "samples length"]:
    """Return the token blocks of a calibration set, language by language.

    Raises
    ------
    TextError
        If a language has too little text.
    """
    blocks = [
        TokenStream(tokenizer, corpus.segments("calibration", lang), lang, calibration.seed).blocks(
            samples, calibration.length
        )
        for lang, samples in calibration.shares().items()
    ]
    return torch.cat(blocks)


def calibration_fingerprint(corpus: Corpus, calibration: CalibrationSet) -> str:
    """Return a SHA-256 of the text that a calibration set draws from."""
    return content_sha256({lang: fingerprint(corpus.segments("calibration", lang)) for lang in calibration.languages})
