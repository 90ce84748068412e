"""Text segments and the file formats that they are read from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import TextError, first_line
from ..files import whole_file


@dataclass(frozen=True)
class Segment:
    """A piece of text in one language: a sentence, a passage or a document.

    Attributes
    ----------
    id
        Segments of different languages with the same id are translations of each other.
    text
        Never empty.
    part
        The part of a study that the source assigns it to; ``None`` if the source assigns none.
    """

    id: str
    text: str
    part: str | None = None


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TextError(
                    f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x}); "
                    f"convert it: iconv -f ISO-8859-1 -t UTF-8 {path} > NEW (or from its actual encoding)"
                ) from error
            if line.strip():
                yield number, line.strip()
    if not number:
        raise TextError(f"{path} is empty")


def read_lines(path: Path) -> Iterator[Segment]:
    """Yield a segment per non-empty line of a text file; its id is the line number.

    Raises
    ------
    TextError
        If the file is empty or not UTF-8.
    """
    for number, line in _utf8_lines(path):
        yield Segment(str(number), line)


def whole_characters(text: str, where: str) -> str:
    """Return `text` unchanged if it can be encoded; JSON escapes can spell lone surrogates, which cannot.

    Raises
    ------
    TextError
        If it contains a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TextError(
            f"{where}: {half} is one half of a surrogate pair, not a character; write both halves, or remove it"
        ) from error
    return text


def read_jsonl(path: Path) -> Iterator[Segment]:
    """Yield a segment per line of a JSONL file (``text``, and optionally ``id`` and ``part``).

    Raises
    ------
    TextError
        If the file is empty, not UTF-8, not JSON, or a line has no ``text``.
    """
    for number, line in _utf8_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number too long
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise TextError(f"{where}: not JSON ({reason}); expected one object per line") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise TextError(f'{where}: no "text"; a line looks like {{"id": "1", "text": "..."}}')
        if text := whole_characters(record["text"].strip(), where):
            yield Segment(whole_characters(str(record.get("id", number)), where), text, record.get("part"))


def write_jsonl(path: Path, segments: Iterable[Segment]) -> None:
    """Write segments atomically as JSONL, a segment per line.

    Raises
    ------
    DiskError
        If the file cannot be written.
    """
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for segment in segments:
            file.write(json.dumps({"id": segment.id, "text": segment.text}, ensure_ascii=False) + "\n")


def read_parquet(path: Path) -> Iterator[Segment]:
    """Yield a segment per row of a Parquet file (columns ``text`` and optionally ``id``).

    Raises
    ------
    TextError
        If the file is damaged, not UTF-8, or has no column ``text`` of strings.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise TextError(f"{path}: not a Parquet file, or damaged ({first_line(error)})") from error
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
