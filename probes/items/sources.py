"""Multiple-choice items, which test what a model knows and how it reasons.

An item source is

- ``"bundled"``: the set that comes with prunescope;
- ``"file:PATH"``: one ``.jsonl`` file per language, with ``{lang}`` in place of its tag, and one item per line:
  ``{"id": "1a", "category": "reasoning", "prompt": "...", "choices": [" yes", " no"], "answer": 0}``. The two items
  of a minimal pair, with the same choices but different answers, share a ``"twin"``, such as ``"twin": "1"``.

  Lines of XWinograd, XCOPA and BLiMP, as they are published in JSON Lines, are read as items too
  (:mod:`probes.items.benchmarks`).

- ``"KIND:REST"``: what another package adds (docs/extending.md).

Items with the same id or template in different languages are taken for translations of each other: where languages are
pooled, they are not independent. Items that were written for one language need names that no other language uses, such
as ``fluency-de-agreement-01``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pruning.errors import PrunescopeError, TextError, first_line, shortened
from pruning.extensions import Extension, extensions
from pruning.files import is_file
from pruning.text.languages import named
from pruning.text.segments import whole_characters
from pruning.text.sources import BUNDLED_LANGUAGES

from .benchmarks import Line, line_of
from .bundled import bundled_items
from .item import Item

BUNDLED_ITEMS = "bundled"


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
        if self.spec == BUNDLED_ITEMS or (kind == "file" and path.endswith(".jsonl") and "{lang}" in path):
            return
        if kind not in _added():
            others = "".join(f', "{name}:…"' for name in _added())
            raise TextError(
                f'unknown item source "{shortened(self.spec)}"; use "bundled"{others} or "file:FOLDER/{{lang}}.jsonl"'
            )

    @property
    def task(self) -> str:
        """The task's name in frames: ``bundled``, the name of the folder, or of another package's source."""
        kind, _, path = self.spec.partition(":")
        if kind != "file":
            return kind
        names = [part for part in Path(path).parent.parts if "{lang}" not in part]
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
            return list(bundled_items(language))
        kind, _, rest = self.spec.partition(":")
        if kind != "file":
            return _with_own_ids(_of_another_package(kind, rest, language), self.spec)
        path = Path(rest.replace("{lang}", language))
        if not is_file(path):
            raise TextError(f"no items for {named(language)}: there is no file {shortened(path, 200)}")
        items = list(_read(path, language))
        if not items:
            raise TextError(f"no items for {named(language)}: {path} is empty")
        return _with_own_ids(items, path)


def _with_own_ids(items: list[Item], where: object) -> list[Item]:
    """Return items if no two have the same id.

    Raises
    ------
    TextError
        If two have.
    """
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise TextError(f'{where}: two items have the id "{item.id}"; ids must be unique')
        seen.add(item.id)
    return items


def _of_another_package(kind: str, rest: str, language: str) -> list[Item]:
    """Return the items of a source that another package adds.

    Raises
    ------
    TextError
        If the package raises an error, or returns anything but items.
    """
    added = _added()[kind]
    what = f'no items for {named(language)}: "{shortened(f"{kind}:{rest}")}" of {added.package}'
    try:
        items = list(added.found(rest, language))
    except PrunescopeError:
        raise
    except Exception as error:
        raise TextError(f"{what} failed ({first_line(error)})") from error
    if not items or not all(isinstance(item, Item) for item in items):
        raise TextError(f"{what} should return some probes.Item")
    return items


def _added() -> dict[str, Extension]:
    return extensions("item_sources", _check_added)


def _check_added(kind: str, found: object) -> None:
    if kind in (BUNDLED_ITEMS, "file", "none") or not kind.isidentifier():
        raise TextError(f'"{shortened(kind)}" cannot be the name of a source of items')
    if not callable(found):
        raise TextError("it should be a function of what follows the colon, and a language")


def _read(path: Path, language: str) -> Iterator[Item]:
    try:
        # not splitlines(), which also splits at separators that may occur inside JSON strings
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8; save it as UTF-8") from error
    previous: Line | None = None
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        content = _content(text, f"{path}, line {number}")
        try:
            line = line_of(content, number)
            twin = previous if line.is_twin_of(previous) else None
            yield line.item(language, twin=twin.name if twin else "")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise TextError(f"{path}, line {number}: {place + ': ' if place else ''}{message}") from error
        previous = None if twin else line


def _content(text: str, place: str) -> object:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number too long
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise TextError(f"{place}: not JSON ({reason}); write one item per line") from error
    whole_characters(json.dumps(content, ensure_ascii=False), place)
    return content
