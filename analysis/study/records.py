"""Which results of a study are finished: a small file for each, written when the result's own files are whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pruning.errors import StudyError
from pruning.files import file_sha256, write_text

RECORDS = "records"
PROVENANCE = "provenance.json"


class RecordedFile(BaseModel):
    """A file as it was when it was written. Size and time stand for the content while they are unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, sha256: str | None = None) -> RecordedFile:
        """Record a file; its content is read unless its SHA-256 is given."""
        stat = path.stat()
        return cls(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256 or file_sha256(path))


class Record(BaseModel):
    """What is on record of one finished result.

    Attributes
    ----------
    key
        Hash of everything that it depends on.
    seconds
        That it took.
    files
        Path below the study's folder to the file.
    facts
        What the study needs to know of it without opening it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    seconds: float
    files: dict[str, RecordedFile]
    facts: dict[str, Any] = {}


class Records:
    """The records in a study's folder, ``DIR/records/NAME.json``.

    Results that a changed study no longer asks for stay on record: asked for again, they are there.

    Parameters
    ----------
    folder
        The study's folder.

    Raises
    ------
    StudyError
        If the folder is of an older layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Record | None] = {}
        if not (folder / RECORDS).is_dir() and _is_older(folder / PROVENANCE):
            raise StudyError(
                f"{folder} holds a study of an older version of prunescope, whose records are kept differently; "
                "choose another folder (--out), or go on with the version that wrote it"
            )

    def find(self, name: str) -> Record | None:
        """Return a record; ``None`` if there is none.

        Raises
        ------
        StudyError
            If it is damaged.
        """
        if name not in self._found:
            path = self._path(name)
            try:
                self._found[name] = Record.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                self._found[name] = None
            except ValidationError as error:
                raise StudyError(f"{path} is damaged; delete it to have that result made again") from error
        return self._found[name]

    def facts(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the facts on record under a name, if they depend on what they depended on."""
        record = self.find(name)
        return record.facts if record is not None and record.key == key else None

    def finished(self, name: str, key: str) -> bool:
        """Whether a result was finished with this key and all its files are there, unaltered.

        Raises
        ------
        StudyError
            If a file of the result was altered or cut short since.
        """
        record = self.find(name)
        if record is None or record.key != key:
            return False
        now: dict[str, RecordedFile] = {}
        for file, was in record.files.items():
            path = self.folder / file
            try:
                stat = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            now[file] = was
            if (stat.st_size, stat.st_mtime_ns) == (was.size, was.mtime_ns):
                continue
            if stat.st_size != was.size or file_sha256(path) != was.sha256:
                raise StudyError(
                    f"{path} was altered or cut short after it was written; delete it to have it made again"
                )
            now[file] = RecordedFile.of(path, was.sha256)  # copied or moved: its content need not be read again
        if now != record.files:
            self._write(name, record.model_copy(update={"files": now}))
        return True

    def finish(
        self, name: str, key: str, files: Iterable[Path], seconds: float, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record a finished result, whose files are whole."""
        found = {path.relative_to(self.folder).as_posix(): RecordedFile.of(path) for path in files}
        self._write(name, Record(key=key, seconds=round(seconds, 2), files=found, facts=dict(facts or {})))

    def everything(self) -> dict[str, Record]:
        """Return all records, by name."""
        root = self.folder / RECORDS
        names = sorted(path.relative_to(root).as_posix().removesuffix(".json") for path in root.rglob("*.json"))
        found = {name: self.find(name) for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def _write(self, name: str, record: Record) -> None:
        write_text(self._path(name), record.model_dump_json(indent=2) + "\n")
        self._found[name] = record

    def _path(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.json"


def _is_older(provenance: Path) -> bool:
    """Tell whether a folder without records has a record of stages, as it was kept once, whole or damaged."""
    try:
        return "stages" in json.loads(provenance.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
