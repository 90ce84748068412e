"""Text by language, from several kinds of source.

A study file names a *source* as

- ``"bundled"``: the parallel corpus that ships with prunescope;
- ``"file:PATH"``: one file per language, with ``{lang}`` in place of the tag: ``.jsonl`` (``text`` and, if aligned
  with other languages, ``id``), ``.txt`` (one segment per line) or ``.parquet`` (columns ``text`` and ``id``);
- ``"hub:PRESET"`` or a table: a dataset of the ``datasets`` library, streamed;
- ``"KIND:REST"``: what another package adds (docs/extending.md).

Segments with the same id in two languages are translations of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from ..errors import PrunescopeError, TextError, first_line, shortened, unknown
from ..extensions import Extension, extensions
from ..files import content_sha256, is_file
from .hub import HUB_PRESETS, STREAM_LIMIT, HubDataset
from .languages import named
from .segments import Segment, read_jsonl, read_lines, read_parquet

Part = Literal["calibration", "parallel", "heldout"]
#: The three parts of a study's text, and their shares when several are drawn from the same source.
PART_SHARES: dict[Part, int] = {"calibration": 2, "parallel": 1, "heldout": 1}

_KINDS = ("bundled", "file", "hub")
#: Characters of a segment that does not occur inside of another text by chance.
_NOT_BY_CHANCE = 20

BUNDLED_LANGUAGES = ("ar", "de", "en", "es", "fr", "ru", "sw", "zh")


class FileText(BaseModel):
    """One file per language; ``{lang}`` in the path stands for the tag."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str

    def segments(self, language: str) -> Iterator[Segment]:
        """Read the segments of one language.

        Raises
        ------
        TextError
            If the file is missing, has an unknown extension, is not UTF-8, or has no text.
        """
        path = Path(self.path.replace("{lang}", language))
        readers = {".jsonl": read_jsonl, ".txt": read_lines, ".parquet": read_parquet}
        if path.suffix not in readers:
            kind = shortened(path.suffix)
            raise TextError(f'{shortened(path, 200)}: unknown file type "{kind}"; use .jsonl, .txt or .parquet')
        if not is_file(path):
            raise TextError(f"no text for {named(language)}: there is no file {shortened(path, 200)}")
        yield from readers[path.suffix](path)


class BundledText(BaseModel):
    """The parallel corpus that ships with prunescope: original sentences from eight domains in eight languages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def segments(self, language: str) -> Iterator[Segment]:
        """Read the segments of one language.

        Raises
        ------
        TextError
            If the language is not one of the eight.
        """
        if language not in BUNDLED_LANGUAGES:
            raise TextError(
                f"no text for {named(language)}: the bundled corpus has {', '.join(BUNDLED_LANGUAGES)}; "
                "use your own with text = 'file:FOLDER/{lang}.jsonl'"
            )
        yield from read_jsonl(Path(str(package_files("pruning.text"))) / "corpus" / f"{language}.jsonl")


class AddedText(BaseModel):
    """Text from a source that another package adds.

    Attributes
    ----------
    kind, rest
        What a study file says, ``"KIND:REST"``: the name of an entry point, and what is passed on to it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    rest: str

    def segments(self, language: str) -> Iterator[Segment]:
        """Return the segments of one language.

        Raises
        ------
        TextError
            If the package raises an error, or returns anything but segments with text.
        """
        added = _added()[self.kind]
        what = f'no text for {named(language)}: "{shortened(f"{self.kind}:{self.rest}")}" of {added.package}'
        try:
            found = list(added.found(self.rest, language))
        except PrunescopeError:
            raise
        except Exception as error:
            raise TextError(f"{what} failed ({first_line(error)})") from error
        if not found or not all(isinstance(segment, Segment) and segment.text for segment in found):
            raise TextError(f"{what} should return some pruning.Segment, each with text")
        yield from found


TextSource = BundledText | FileText | HubDataset | AddedText


def _added() -> dict[str, Extension]:
    return extensions("text_sources", _check_added)


def _check_added(kind: str, found: object) -> None:
    if kind in _KINDS or not kind.isidentifier():
        raise TextError(f'"{shortened(kind)}" cannot be the name of a source of text')
    if not callable(found):
        raise TextError("it should be a function of what follows the colon, and a language")


@runtime_checkable
class ItemText(Protocol):
    """Test items as text to calibrate on: what each item says, with the right answer."""

    def segments(self, category: str, language: str) -> Sequence[Segment]:
        """Return the items of a category in one language, a segment each.

        Raises
        ------
        PrunescopeError
            If there are none.
        """


def text_source(spec: str | dict[str, Any]) -> TextSource:
    """Parse a text source as written in a study file.

    Raises
    ------
    TextError
        If `spec` is not a known source.
    """
    if isinstance(spec, dict):
        return HubDataset(**spec)
    kind, _, rest = spec.partition(":")
    if kind == "bundled" and not rest:
        return BundledText()
    if kind == "file" and rest:
        if "{lang}" not in rest:
            raise TextError(f'"{shortened(spec)}" names one file for all languages; put {{lang}} in place of the tag')
        return FileText(path=rest)
    if kind == "hub" and rest:
        if rest not in HUB_PRESETS:
            raise TextError(unknown("hub preset", rest, HUB_PRESETS))
        return HUB_PRESETS[rest]
    if kind in _added():
        return AddedText(kind=kind, rest=rest)
    others = "".join(f', "{name}:…"' for name in _added())
    raise TextError(
        f'unknown text source "{shortened(spec)}"; use "bundled", "file:FOLDER/{{lang}}.jsonl"{others} or "hub:PRESET"'
    )


@dataclass
class Corpus:
    """The three disjoint parts of a study's text.

    If several parts share a source, its segments are split 2 : 1 : 1 by a hash of their id, so that translations of a
    sentence stay together; parts that the source itself assigns are kept. Text that still occurs in two parts (ignoring
    case and spacing) is removed from the calibration part first, then from the parallel part.

    Parameters
    ----------
    calibration, parallel, heldout
        The source of each part.
    items
        Items to calibrate on, for calibration sets with a share of them.
    """

    calibration: TextSource
    parallel: TextSource
    heldout: TextSource
    items: ItemText | None = None
    _parts: dict[tuple[Part, str], list[Segment]] = field(default_factory=dict, init=False, repr=False)
    _read: dict[tuple[str, str], list[Segment]] = field(default_factory=dict, init=False, repr=False)
    _items: dict[tuple[str, str], list[Segment]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, spec: str) -> Corpus:
        """Return the corpus whose three parts are drawn from one source, named as for :func:`text_source`.

        Raises
        ------
        TextError
            If `spec` is not a known source.
        """
        source = text_source(spec)
        return cls(calibration=source, parallel=source, heldout=source)

    def segments(self, part: Part, language: str) -> list[Segment]:
        """Return the segments of one part in one language, in the same order for all languages.

        Raises
        ------
        TextError
            If the part has no text in this language.
        """
        if (part, language) not in self._parts:
            segments = self._dealt(part, language)
            for kept in ("heldout", "parallel"):  # the parts that take precedence over this one
                if kept == part:
                    break
                taken = {_normalised(s.text) for s in self.segments(kept, language)}
                segments = [s for s in segments if _normalised(s.text) not in taken]
            if not segments:
                raise TextError(f"no {part} text for {named(language)} in {self._source(part)!r}")
            self._parts[part, language] = sorted(segments, key=lambda s: (_hash(s.id), s.id))
        return self._parts[part, language]

    def pool(self, language: str, items: str = "") -> list[Segment]:
        """Return what calibration draws from: the calibration part or, given a category, items, in the same order.

        Raises
        ------
        TextError
            If there are none in this language.
        """
        if not items:
            return self.segments("calibration", language)
        if self.items is None:
            raise TextError(f'calibration on "{shortened(items)}" items needs items; give the corpus some (items=...)')
        if (items, language) not in self._items:
            segments = self.items.segments(items, language)
            self._items[items, language] = sorted(segments, key=lambda s: (_hash(s.id), s.id))
        return self._items[items, language]

    def take(self, part: Part, language: str, count: int) -> list[Segment]:
        """Return the first `count` segments of one part.

        Raises
        ------
        TextError
            If there are fewer.
        """
        segments = self.segments(part, language)
        if len(segments) < count:
            raise TextError(
                f"{count} {part} segments requested for {named(language)}, but there are {len(segments)}; "
                "lower the number or add text"
            )
        return segments[:count]

    def aligned(self, part: Part, languages: Sequence[str], count: int) -> dict[str, list[Segment]]:
        """Return `count` segments per language, with the same ids in every language.

        Raises
        ------
        TextError
            If the languages share fewer ids.
        """
        by_id = {lang: {s.id: s for s in self.segments(part, lang)} for lang in languages}
        common = set.intersection(*(set(ids) for ids in by_id.values()))
        ids = sorted(common, key=lambda id: (_hash(id), id))[:count]
        if len(ids) < count:
            raise TextError(
                f"{count} {part} segments requested in all of {', '.join(languages)}, "
                f"but they share only {len(ids)} ids; lower the number or add parallel text"
            )
        return {lang: [by_id[lang][id] for id in ids] for lang in languages}

    def check_apart(self, language: str, count: int, items: str = "") -> None:
        """Check that the first `count` calibration segments of a language (or its items of a category), on which a
        model is to be trained, hold no held-out text, as far as whole segments go (ignoring case and spacing).

        A held-out segment that is a calibration segment itself would be left out of calibration, but is refused if the
        two parts have different sources: then this is a mistake. One of at least 20 characters may not be inside of a
        longer calibration segment either; shorter ones may well be there by chance.

        Raises
        ------
        TextError
            If they do.
        """
        held = {_normalised(s.text): s.id for s in self.segments("heldout", language)}
        found = []
        if not items and self._source("calibration") != self._source("heldout"):
            same = ((s.id, _normalised(s.text)) for s in self._dealt("calibration", language))
            found = [(id, held[text]) for id, text in same if text in held]
        long = [text for text in held if len(text) >= _NOT_BY_CHANCE]
        for segment in self.pool(language, items)[:count]:
            around = _normalised(segment.text)
            found += [(segment.id, held[text]) for text in long if text in around]
        if found:
            (one, other), more = found[0], f" ({len(found) - 1} more)" if len(found) > 1 else ""
            raise TextError(
                f"text to fine-tune on overlaps held-out text in {named(language)}: calibration segment "
                f'"{shortened(one)}" holds held-out segment "{shortened(other)}"{more}; leave such segments out of one '
                "of them, or use the same source for both, which is then split"
            )

    def _source(self, part: Part) -> TextSource:
        source: TextSource = getattr(self, part)
        return source

    def _dealt(self, part: Part, language: str) -> list[Segment]:
        source = self._source(part)
        key = (repr(source), language)
        if key not in self._read:
            self._read[key] = (
                source.drawn(language, STREAM_LIMIT)
                if isinstance(source, HubDataset)
                else list(source.segments(language))
            )
        sharing = [name for name in PART_SHARES if self._source(name) == source]
        return [s for s in self._read[key] if (s.part or _dealt_to(s.id, sharing)) == part]


def fingerprint(segments: Iterable[Segment]) -> str:
    """Return the SHA-256 (hex) of the ids and text of segments."""
    return content_sha256([[s.id, s.text] for s in segments])


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode("utf-8")).digest()[:8], "big")


def _dealt_to(id: str, parts: Sequence[Part]) -> Part:
    lots = [part for part in parts for _ in range(PART_SHARES[part])]
    return lots[_hash("part " + id) % len(lots)]
