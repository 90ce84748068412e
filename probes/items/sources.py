"""Multiple-choice items, which test what a model knows and how it reasons.

An item source is

- ``"bundled"``: the set that comes with prunescope;
- ``"file:PATH"``: one ``.jsonl`` file per language, with ``{lang}`` in place of its tag, and one item per line:
  ``{"id": "1a", "category": "reasoning", "prompt": "...", "choices": [" yes", " no"], "answer": 0}``. The two items
  of a minimal pair, with the same choices but different answers, share a ``"twin"``, such as ``"twin": "1"``.

Items with the same id in different languages are translations, except where they test the language itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pruning.errors import TextError, first_line, shortened
from pruning.files import content_sha256, is_file
from pruning.text.languages import named
from pruning.text.segments import whole_characters
from pruning.text.sources import BUNDLED_LANGUAGES

BUNDLED_ITEMS = "bundled"
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
        What the model reads, without trailing space: the space before a choice is part of the choice.
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
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    category: str = Field(default="all", min_length=1)
    prompt: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    twin: str = ""
    kind: str = ""
    template: str = ""
    grade: int | None = Field(default=None, ge=1)
    domain: str = ""

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


@dataclass(frozen=True)
class ItemSource:
    """Where items come from; see the module's docstring for `spec`.

    Raises
    ------
    TextError
        If `spec` names no source.
    """

    spec: str = BUNDLED_ITEMS

    def __post_init__(self) -> None:
        kind, _, path = self.spec.partition(":")
        if self.spec != BUNDLED_ITEMS and not (kind == "file" and path.endswith(".jsonl") and "{lang}" in path):
            raise TextError(
                f'unknown item source "{shortened(self.spec)}"; use "bundled" or "file:FOLDER/{{lang}}.jsonl"'
            )

    @property
    def task(self) -> str:
        """The task's name in frames: ``bundled``, or the name of the folder."""
        if self.spec == BUNDLED_ITEMS:
            return self.spec
        names = [part for part in Path(self.spec.partition(":")[2]).parent.parts if "{lang}" not in part]
        return names[-1].strip("/") or "items" if names else "items"

    def items(self, language: str) -> list[Item]:
        """Return the items of one language, in the order of the file.

        Raises
        ------
        TextError
            If there are none, or one of them is malformed.
        """
        if self.spec == BUNDLED_ITEMS:
            if language not in BUNDLED_LANGUAGES:
                raise TextError(
                    f"no items for {named(language)}: the bundled set has {', '.join(BUNDLED_LANGUAGES)}; "
                    'use your own with items = "file:FOLDER/{lang}.jsonl"'
                )
            path = Path(str(package_files("probes.items"))) / "bundled" / f"{language}.jsonl"
        else:
            path = Path(self.spec.partition(":")[2].replace("{lang}", language))
            if not is_file(path):
                raise TextError(f"no items for {named(language)}: there is no file {shortened(path, 200)}")
        items = list(_read(path))
        if not items:
            raise TextError(f"no items for {named(language)}: {path} is empty")
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise TextError(f'{path}: two items have the id "{item.id}"; ids must be unique')
            seen.add(item.id)
        return items


def some_twins(items: Sequence[Item], count: int | None) -> list[Item]:
    """Return about `count` items of every category, never splitting a minimal pair; all if it is None.

    They are spread over kinds, and within a kind over grades, domains and templates.
    """
    if count is None:
        return list(items)
    chosen: set[str] = set()
    for category in dict.fromkeys(item.category for item in items):
        twins: dict[str, list[Item]] = {}
        for item in items:
            if item.category == category:
                twins.setdefault(item.twin, []).append(item)
        taken = 0
        for twin in _spread({twin: members[0] for twin, members in twins.items()}):
            if taken >= count:
                break
            chosen.add(twin)
            taken += len(twins[twin])
    return [item for item in items if item.twin in chosen]


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


def items_fingerprint(items: Sequence[Item]) -> str:
    """Return the SHA-256 of items, in hexadecimal."""
    return content_sha256([item.model_dump(mode="json") for item in items])


def _read(path: Path) -> Iterator[Item]:
    try:
        # not splitlines(), which also splits at separators that may occur inside JSON strings
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8; save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            whole_characters(json.dumps(content, ensure_ascii=False), f"{path}, line {number}")
            yield Item.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise TextError(f"{path}, line {number}: {place + ': ' if place else ''}{message}") from error
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number too long
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise TextError(f"{path}, line {number}: not JSON ({reason}); write one item per line") from error
