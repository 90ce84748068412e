"""A multiple-choice item, and samples of items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pruning.files import content_sha256

#: Categories of the bundled items, from the least to the most demanding.
CATEGORIES = ("fluency", "knowledge", "commonsense", "reasoning")
#: What a sample of a category is spread over.
_VARIED = ("kind", "grade", "domain", "template")


class Item(BaseModel):
    """A multiple-choice item.

    Attributes
    ----------
    id
        Unique in its language.
    category
        What it tests, such as ``reasoning``.
    prompt
        What the model reads, without trailing space: the space before a choice is part of the choice. It may be empty
        only for tokenizers that prepend a token.
    choices
        The continuations that are scored, at least two.
    answer
        Index of the right choice, from 0.
    twin
        Shared by the two items of a minimal pair, which have the same choices but different answers: a model that
        ignores the prompt gets at most one of them right. The item's own id if it is in no pair.
    kind
        Of the question within its category, such as ``comparison``.
    template
        Shared by all items that were made after one pattern: such items are not independent. Its twin by default.
    grade
        Number of steps that the answer takes, if that is known.
    domain
        Field of knowledge, such as ``science``.
    question
        The end of the prompt, if that is a question of its own and what comes before it are its premises.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    category: str = Field(default="all", min_length=1)
    prompt: str
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    twin: str = ""
    kind: str = ""
    template: str = ""
    grade: int | None = Field(default=None, ge=1)
    domain: str = ""
    question: str = ""

    @model_validator(mode="before")
    @classmethod
    def _number_as_id(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return given | {name: str(given[name]) for name in ("id", "twin") if isinstance(given.get(name), int)}

    @model_validator(mode="after")
    def _answerable(self) -> Item:
        if self.answer >= len(self.choices):
            raise ValueError(
                f'no choice is correct: "answer" is {self.answer}, but there are only {len(self.choices)} choices, '
                "counted from 0"
            )
        if len(set(self.choices)) < len(self.choices) or not all(choice.strip() for choice in self.choices):
            raise ValueError("two choices are the same, or one is empty")
        if not self.twin:
            object.__setattr__(self, "twin", self.id)
        if not self.template:
            object.__setattr__(self, "template", self.twin)
        return self


def some_twins(items: Sequence[Item], count: int | Mapping[str, int] | None) -> list[Item]:
    """Return about `count` items of every category, never splitting a minimal pair; all if it is None.

    They are spread over kinds, and within a kind over grades, domains and templates.

    Parameters
    ----------
    items
        In any order.
    count
        One number for every category, or one for each; of a category without a number all are taken.
    """
    counts = count if isinstance(count, Mapping) else {} if count is None else dict.fromkeys(_categories(items), count)
    chosen: set[str] = {item.twin for item in items if item.category not in counts}
    for category, number in counts.items():
        twins: dict[str, list[Item]] = {}
        for item in items:
            if item.category == category:
                twins.setdefault(item.twin, []).append(item)
        taken = 0
        for twin in _spread({twin: members[0] for twin, members in twins.items()}):
            if taken >= number:
                break
            chosen.add(twin)
            taken += len(twins[twin])
    return [item for item in items if item.twin in chosen]


def _categories(items: Iterable[Item]) -> list[str]:
    return list(dict.fromkeys(item.category for item in items))


def _spread(twins: Mapping[str, Item], by: Sequence[str] = _VARIED, first: int = 0) -> list[str]:
    """Order twins so that the values of a field take turns, beginning with the one in place `first`."""
    if not by:
        return list(twins)
    groups: dict[object, dict[str, Item]] = {}
    for twin, item in twins.items():
        groups.setdefault(getattr(item, by[0]), {})[twin] = item
    # each group begins with another value of the next field, so that a few twins have different ones
    ordered = [_spread(group, by[1:], number) for number, group in enumerate(groups.values())]
    first %= len(ordered)
    turns = zip_longest(*ordered[first:], *ordered[:first])
    return [twin for turn in turns for twin in turn if twin is not None]


def without_premises(items: Iterable[Item]) -> list[Item]:
    """Return the items that have premises, asked without them: who answers those does not reason from the premises.

    The two items of a bundled pair then ask the same, so that half of them are answered correctly whatever the model.
    """
    return [
        item.model_copy(update={"prompt": item.question})
        for item in items
        if item.question and item.question != item.prompt
    ]


def items_fingerprint(items: Sequence[Item]) -> str:
    """Return the SHA-256 of items, in hexadecimal."""
    return content_sha256([item.model_dump(mode="json") for item in items])
