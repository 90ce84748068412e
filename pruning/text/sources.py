"""Text by language, from three kinds of source.

A *source* is named in a study file by

- ``"bundled"``: the parallel corpus that comes with prunescope;
- ``"file:PATH"``: one file a language, ``{lang}`` standing for its tag; ``.jsonl`` (``text`` and, if aligned
  with other languages, ``id``), ``.txt`` (a segment a line) or ``.parquet`` (columns ``text`` and ``id``);
- ``"hub:PRESET"`` or a table: a dataset of the ``datasets`` library, streamed.

Segments with the same id in two languages are translations of each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..errors import TextError, first_line, shortened, unknown
from ..files import content_sha256, is_file
from .languages import alpha3_script, named

Part = Literal["calibration", "parallel", "heldout"]
#: What the three parts of a study's text are for, and their shares when one source has to serve several.
PART_SHARES: dict[Part, int] = {"calibration": 2, "parallel": 1, "heldout": 1}

BUNDLED_LANGUAGES = ("ar", "de", "en", "es", "fr", "ru", "sw", "zh")
#: Documents read from a streamed dataset, a language and part.
STREAM_LIMIT = 20_000


@dataclass(frozen=True)
class Segment:
    """A piece of text in one language: a sentence, a passage or a document.

    Attributes
    ----------
    id
        Segments of different languages with one id say the same.
    text
        Never empty.
    part
        The part of a study that the source reserves it for; ``None`` where the source does not say.
    """

    id: str
    text: str
    part: str | None = None


class HubDataset(BaseModel):
    """A dataset of the ``datasets`` library and where in it a language's text is.

    ``{lang}`` in `config`, `split` and `data_files` stands for the BCP-47 tag, ``{code}`` for the dataset's own
    code: an entry of `codes`, else the three-letter code with the script (``eng_Latn``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    config: str | None = None
    split: str = "train"
    text: str = "text"
    id: str | None = None
    data_files: str | None = None
    codes: dict[str, str] = {}

    def segments(self, language: str) -> Iterator[Segment]:
        """Stream the segments of one language.

        Raises
        ------
        TextError
            If the ``datasets`` library is missing, or the dataset, its language or its columns are.
        """
        try:
            import datasets
        except ImportError as error:
            raise TextError("hub text needs the datasets library: pip install 'prunescope[hub]'") from error
        code = self.codes.get(language, alpha3_script(language))

        def filled(pattern: str | None) -> str | None:
            return pattern and pattern.replace("{lang}", language).replace("{code}", code)

        where = f'dataset "{shortened(self.dataset)}"'
        where += f', config "{shortened(filled(self.config))}"' if self.config else ""
        try:
            rows = datasets.load_dataset(
                self.dataset,
                filled(self.config),
                data_files=filled(self.data_files),
                split=filled(self.split),
                streaming=True,
                trust_remote_code=False,
            )
            seen: set[str] = set()
            for number, row in enumerate(rows):
                missing = {self.text, self.id or self.text} - row.keys()
                if missing:
                    raise TextError(f"{where} has no column {sorted(missing)}; its columns: {sorted(row)}")
                id = str(row[self.id]) if self.id else str(number)
                text = _whole_characters((row[self.text] or "").strip(), f"{where}, row {number + 1}")
                if text and id not in seen:  # Belebele repeats a passage for each of its questions
                    seen.add(id)
                    yield Segment(id, text)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            if "trust_remote_code" in str(error) or "scripts are no longer supported" in str(error):
                raise TextError(
                    f"{where} needs code of its own to be read, which prunescope never runs; "
                    "choose a dataset of plain files, or save its text and use text = 'file:FOLDER/{lang}.jsonl'"
                ) from error
            raise TextError(
                f"no text for {named(language)}: {where} cannot be read ({first_line(error)}); "
                "check the name, the network, or use text = 'file:FOLDER/{lang}.jsonl'"
            ) from error


# Member languages that the parallel datasets hold where BCP-47 users write the macrolanguage.
_MEMBERS = {
    "ar": "arb_Arab",
    "fa": "pes_Arab",
    "lv": "lvs_Latn",
    "ms": "zsm_Latn",
    "ne": "npi_Deva",
    "sw": "swh_Latn",
}
HUB_PRESETS: dict[str, HubDataset] = {
    "mc4": HubDataset(dataset="allenai/c4", data_files="multilingual/c4-{lang}.*.json.gz", id="url"),
    "flores": HubDataset(
        dataset="openlanguagedata/flores_plus",
        config="{code}",
        split="dev",
        id="id",
        codes={**_MEMBERS, "zh": "cmn_Hans"},
    ),
    "belebele": HubDataset(
        dataset="facebook/belebele",
        config="{code}",
        split="test",
        text="flores_passage",
        id="link",
        codes={**_MEMBERS, "zh": "zho_Hans"},
    ),
}


class FileText(BaseModel):
    """One file a language; ``{lang}`` in the path stands for the tag."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str

    def segments(self, language: str) -> Iterator[Segment]:
        """Read the segments of one language.

        Raises
        ------
        TextError
            If the file is missing, of an unknown kind, not UTF-8, or lacks the text.
        """
        path = Path(self.path.replace("{lang}", language))
        readers = {".jsonl": _read_jsonl, ".txt": _read_lines, ".parquet": _read_parquet}
        if path.suffix not in readers:
            kind = shortened(path.suffix)
            raise TextError(f'{shortened(path, 200)}: unknown kind of text file "{kind}"; use .jsonl, .txt or .parquet')
        if not is_file(path):
            raise TextError(f"no text for {named(language)}: there is no file {shortened(path, 200)}")
        yield from readers[path.suffix](path)


class BundledText(BaseModel):
    """The parallel corpus that comes with prunescope: original sentences in eight languages, eight domains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def segments(self, language: str) -> Iterator[Segment]:
        """Read the segments of one language.

        Raises
        ------
        TextError
            If the language is not among the eight.
        """
        if language not in BUNDLED_LANGUAGES:
            raise TextError(
                f"no text for {named(language)}: the bundled corpus has {', '.join(BUNDLED_LANGUAGES)}; "
                "give your own with text = 'file:FOLDER/{lang}.jsonl'"
            )
        yield from _read_jsonl(Path(str(package_files("pruning.text"))) / "corpus" / f"{language}.jsonl")


TextSource = BundledText | FileText | HubDataset


def text_source(spec: str | dict[str, Any]) -> TextSource:
    """Return the source that a study file names.

    Raises
    ------
    TextError
        If `spec` names none.
    """
    if isinstance(spec, dict):
        return HubDataset(**spec)
    kind, _, rest = spec.partition(":")
    if kind == "bundled" and not rest:
        return BundledText()
    if kind == "file" and rest:
        if "{lang}" not in rest:
            raise TextError(f'"{shortened(spec)}" names one file for all languages; put {{lang}} where the tag belongs')
        return FileText(path=rest)
    if kind == "hub" and rest:
        if rest not in HUB_PRESETS:
            raise TextError(unknown("hub preset", rest, HUB_PRESETS))
        return HUB_PRESETS[rest]
    raise TextError(
        f'unknown text source "{shortened(spec)}"; use "bundled", "file:FOLDER/{{lang}}.jsonl" or "hub:PRESET"'
    )


@dataclass
class Corpus:
    """The three parts of a study's text: never the same text in two of them.

    Where one source serves several parts, its segments are dealt out by a hash of their id, so that translations
    of a sentence stay together (2 : 1 : 1); a source that reserves its segments itself is taken at its word. Text
    that still occurs in two parts, compared without case and spacing, is taken out of calibration first.

    Parameters
    ----------
    calibration, parallel, heldout
        The source of each part.
    """

    calibration: TextSource
    parallel: TextSource
    heldout: TextSource
    _parts: dict[tuple[Part, str], list[Segment]] = field(default_factory=dict, init=False, repr=False)
    _read: dict[tuple[str, str], list[Segment]] = field(default_factory=dict, init=False, repr=False)

    def segments(self, part: Part, language: str) -> list[Segment]:
        """Return the segments of one part in one language, in an order that is the same for all languages.

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
                f"{count} {part} segments wanted for {named(language)}, but there are {len(segments)}; "
                "lower the number or give more text"
            )
        return segments[:count]

    def aligned(self, part: Part, languages: Sequence[str], count: int) -> dict[str, list[Segment]]:
        """Return `count` segments a language, the same ids in every language.

        Raises
        ------
        TextError
            If fewer ids than that are common to all languages.
        """
        by_id = {lang: {s.id: s for s in self.segments(part, lang)} for lang in languages}
        common = set.intersection(*(set(ids) for ids in by_id.values()))
        ids = sorted(common, key=lambda id: (_hash(id), id))[:count]
        if len(ids) < count:
            raise TextError(
                f"{count} {part} segments wanted that exist in all of {', '.join(languages)}, "
                f"but only {len(ids)} ids are common to them; lower the number or give more parallel text"
            )
        return {lang: [by_id[lang][id] for id in ids] for lang in languages}

    def _source(self, part: Part) -> TextSource:
        source: TextSource = getattr(self, part)
        return source

    def _dealt(self, part: Part, language: str) -> list[Segment]:
        source = self._source(part)
        key = (repr(source), language)
        if key not in self._read:
            limit = STREAM_LIMIT if isinstance(source, HubDataset) else None
            self._read[key] = list(islice(source.segments(language), limit))
        sharing = [name for name in PART_SHARES if self._source(name) == source]
        return [s for s in self._read[key] if (s.part or _dealt_to(s.id, sharing)) == part]


def fingerprint(segments: Iterable[Segment]) -> str:
    """Return the SHA-256 of segments, ids and text, in hexadecimal."""
    return content_sha256([[s.id, s.text] for s in segments])


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode("utf-8")).digest()[:8], "big")


def _dealt_to(id: str, parts: Sequence[Part]) -> Part:
    lots = [part for part in parts for _ in range(PART_SHARES[part])]
    return lots[_hash("part " + id) % len(lots)]


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TextError(
                    f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x}); "
                    f"convert it: iconv -f ISO-8859-1 -t UTF-8 {path} > NEW (or the encoding that it has)"
                ) from error
            if line.strip():
                yield number, line.strip()
    if not number:
        raise TextError(f"{path} is empty")


def _read_lines(path: Path) -> Iterator[Segment]:
    for number, line in _utf8_lines(path):
        yield Segment(str(number), line)


def _whole_characters(text: str, where: str) -> str:
    """Return `text` if it can be encoded; JSON's escapes can write half of a surrogate pair, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TextError(
            f"{where}: {half} is one half of a surrogate pair, not a character; write both halves, or take it out"
        ) from error
    return text


def _read_jsonl(path: Path) -> Iterator[Segment]:
    for number, line in _utf8_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number too long
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise TextError(f"{where}: not JSON ({reason}); one object a line is expected") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise TextError(f'{where}: no "text"; a line looks like {{"id": "1", "text": "..."}}')
        if text := _whole_characters(record["text"].strip(), where):
            yield Segment(_whole_characters(str(record.get("id", number)), where), text, record.get("part"))


def _read_parquet(path: Path) -> Iterator[Segment]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise TextError(f"{path}: not a Parquet file, or a damaged one ({first_line(error)})") from error
    if "text" not in table.column_names:
        raise TextError(f'{path}: no column "text"; its columns: {", ".join(table.column_names)}')
    try:
        texts = table["text"].to_pylist()
        ids = table["id"].to_pylist() if "id" in table.column_names else range(1, table.num_rows + 1)
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8") from error
    for number, (id, text) in enumerate(zip(ids, texts, strict=True), start=1):
        if text is not None and not isinstance(text, str):
            raise TextError(f'{path}, row {number}: "text" is not text but {type(text).__name__}')
        if text and text.strip():
            yield Segment(str(id), text.strip())
