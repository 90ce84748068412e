"""Lines of published benchmarks as items: XWinograd, XCOPA and BLiMP, recognised by their columns.

- XWinograd (also WinoGrande), ``sentence`` with a ``_``, ``option1``, ``option2``, ``answer`` (1 or 2): the prompt ends
  before the ``_``, and a choice is an option with the rest of the sentence. The two sentences of a schema follow each
  other: two neighbouring lines with the same options and opposite answers are a minimal pair, in whose sum of margins
  the options' own likelihoods cancel.
- XCOPA, ``premise``, ``choice1``, ``choice2``, ``question`` (cause or effect), ``label`` (0 or 1): the prompt is the
  premise with a conjunction that says which of the two is asked for, in languages whose clauses stay as they are after
  it (:data:`CONJUNCTIONS`); in others, choices follow the premise as sentences of their own. There are no pairs.
- BLiMP, ``sentence_good``, ``sentence_bad``: the prompt is what both sentences begin with, up to the first word that
  differs, so that the choices are compared by the probability of the whole sentences. Where the first word differs,
  the prompt is empty, which takes a tokenizer that prepends a token (BOS). There are no pairs; a paradigm (``UID``) is
  one template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from .item import Item

#: "Because" and "so" by language.
CONJUNCTIONS = {
    "en": (" because", " so"),
    "id": (" karena", " maka"),
    "it": (" perché", " quindi"),
    "sw": (" kwa sababu", " kwa hiyo"),
    "tr": (" çünkü", " bu yüzden"),
    "vi": (" vì", " nên"),
    "zh": ("，因为", "，所以"),
}
#: A word that stays as it is in the middle of a sentence. Names at the beginning of a choice are not known as such.
_ENGLISH_I = re.compile(r"I\b")


class Line(BaseModel):
    """A line of a file of items, and its number in the file."""

    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)

    number: int

    @property
    def name(self) -> str:
        """The id of its item."""
        return str(self.number)

    def is_twin_of(self, previous: Line | None) -> bool:
        """Whether it is one of a minimal pair with the line before."""
        return False

    def item(self, language: str, twin: str) -> Item:
        """Return its item, in a pair with that of the line called `twin`, if that is not empty."""
        raise NotImplementedError


class Winograd(Line):
    """A sentence with a gap and two options for it."""

    columns: ClassVar = {"sentence", "option1", "option2"}

    sentence: str
    option1: str = Field(min_length=1)
    option2: str = Field(min_length=1)
    answer: int = Field(ge=1, le=2)
    qID: str | None = None  # noqa: N815

    @field_validator("sentence")
    @classmethod
    def _one_gap(cls, sentence: str) -> str:
        if sentence.count("_") != 1:
            raise ValueError(f'there should be one "_" for the options, not {sentence.count("_")}')
        return sentence

    @property
    def name(self) -> str:
        """The id of its item."""
        return self.qID or super().name

    def is_twin_of(self, previous: Line | None) -> bool:
        """Whether both have the same options and opposite answers."""
        if not isinstance(previous, Winograd):
            return False
        mine, theirs = ([line.option1.casefold(), line.option2.casefold()] for line in (self, previous))
        return set(mine) == set(theirs) and mine[self.answer - 1] != theirs[previous.answer - 1]

    def item(self, language: str, twin: str) -> Item:
        """Return its item."""
        before, after = self.sentence.split("_")
        prompt = before.rstrip()
        choices = tuple(before[len(prompt) :] + option + after.rstrip() for option in (self.option1, self.option2))
        return Item(
            id=self.name,
            twin=twin,
            category="coreference",
            prompt=prompt,
            choices=choices,
            answer=self.answer - 1,
        )


class Copa(Line):
    """A premise with two choices for its cause or effect."""

    columns: ClassVar = {"premise", "choice1", "choice2"}

    premise: str = Field(min_length=1)
    choice1: str = Field(min_length=1)
    choice2: str = Field(min_length=1)
    question: Literal["cause", "effect"]
    label: int = Field(ge=0, le=1)
    idx: str | None = None

    @property
    def name(self) -> str:
        """The id of its item."""
        return self.idx or super().name

    def item(self, language: str, twin: str) -> Item:
        """Return its item."""
        prompt, choices = self.premise.strip(), [self.choice1.strip(), self.choice2.strip()]
        if language in CONJUNCTIONS:
            prompt = re.sub(r"[.!?。！？]+$", "", prompt) + CONJUNCTIONS[language][self.question == "effect"]
            choices = [choice if _ENGLISH_I.match(choice) else choice[:1].lower() + choice[1:] for choice in choices]
        space = "" if language in ("zh", "ja", "th") else " "
        return Item(
            id=self.name,
            twin=twin,
            category="commonsense",
            kind=self.question,
            prompt=prompt,
            choices=tuple(space + choice for choice in choices),
            answer=self.label,
        )


class Blimp(Line):
    """A sentence and an unacceptable one that differs from it as little as possible."""

    columns: ClassVar = {"sentence_good", "sentence_bad"}

    sentence_good: str = Field(min_length=1)
    sentence_bad: str = Field(min_length=1)
    UID: str = ""
    pair_id: str | None = Field(default=None, validation_alias=AliasChoices("pair_id", "pairID"))
    linguistics_term: str = ""

    @model_validator(mode="after")
    def _differ(self) -> Blimp:
        if self.sentence_good.strip() == self.sentence_bad.strip():
            raise ValueError("the two sentences are the same")
        return self

    @property
    def name(self) -> str:
        """The id of its item."""
        return f"{self.UID}-{self.pair_id}".removeprefix("-") if self.pair_id else super().name

    def item(self, language: str, twin: str) -> Item:
        """Return its item."""
        sentences = self.sentence_good.strip(), self.sentence_bad.strip()
        # words with the space before them, or characters where there are no spaces
        parts = [re.findall(r"\s*\S+" if any(" " in s for s in sentences) else ".", sentence) for sentence in sentences]
        same = list(takewhile(lambda two: two[0] == two[1], zip(*(own[:-1] for own in parts), strict=False)))
        prompt = "".join(part for part, _ in same)
        return Item(
            id=self.name,
            twin=twin,
            category="fluency",
            kind=self.linguistics_term,
            template=self.UID,
            prompt=prompt,
            choices=tuple(sentence[len(prompt) :] for sentence in sentences),
            answer=0,
        )


class Plain(Line):
    """An item in prunescope's own format."""

    content: Any

    def item(self, language: str, twin: str) -> Item:
        """Return it."""
        return Item.model_validate(self.content)


def line_of(content: object, number: int) -> Line:
    """Return a line of a file in the shape that its columns have.

    Raises
    ------
    pydantic.ValidationError
        If it is of a benchmark, and malformed.
    """
    if isinstance(content, Mapping):
        for shape in (Winograd, Copa, Blimp):
            if shape.columns <= content.keys():
                return shape.model_validate({**content, "number": number})
    return Plain(content=content, number=number)
