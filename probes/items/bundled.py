"""The items that come with prunescope: written ones, and reasoning generated from templates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from .item import Item
from .reasoning import reasoning_items

#: Written items: of each language on its own, and translated from English.
_WRITTEN = ("fluency", "pivot")


@cache
def bundled_items(language: str) -> tuple[Item, ...]:
    """Return the items of one of :data:`pruning.text.sources.BUNDLED_LANGUAGES`, category by category."""
    return tuple(_items(language))


def _items(language: str) -> Iterator[Item]:
    folder = files("probes.items")
    for name in _WRITTEN:
        # of lines, not of splitlines(), which also splits at separators inside JSON strings
        lines = (folder / "written" / f"{language}-{name}.jsonl").read_text(encoding="utf-8").split("\n")
        yield from (Item.model_validate_json(line) for line in lines if line)
    yield from reasoning_items((folder / "templates" / f"{language}.toml").read_text(encoding="utf-8"))
