"""Records of a study's finished results: one small file each, written once the result's own files are complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pruning.errors import StudyError
from pruning.files import disk_errors, file_sha256, write_text

RECORDS = "records"
PROVENANCE = "provenance.json"
#: Folder of files that were altered after they were written.
ALTERED = "altered"


class RecordedFile(BaseModel):
    """A file as it was written; while size and modification time are unchanged, the content is assumed to be, too."""

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
    """The record of one finished result.

    Attributes
    ----------
    key
        Hash of everything that it depends on.
    seconds
        Time that it took.
    files
        Its files, by path relative to the study's folder.
    facts
        What the study needs to know about it without opening its files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    seconds: float
    files: dict[str, RecordedFile]
    facts: dict[str, Any] = {}


class Records:
    """The records in a study's folder, ``DIR/records/NAME.json``.

    Results that a changed study no longer needs stay on record, and are reused if it needs them again; but for figures
    and tables (:meth:`retire`), which would be taken for its own.

    Parameters
    ----------
    folder
        The study's folder.
    written
        Whether records are written to the folder; if not, new ones are only remembered.
    tell
        Called with what was found wrong in the folder.

    Raises
    ------
    StudyError
        If the folder has an older layout.
    """

    def __init__(self, folder: Path, *, written: bool = True, tell: Callable[[str], None] = lambda words: None) -> None:
        self.folder = folder
        self._written = written
        self._tell = tell
        self._found: dict[str, Record | None] = {}
        if not (folder / RECORDS).is_dir() and _is_older(folder / PROVENANCE):
            raise StudyError(
                f"{folder} holds a study from an older version of prunescope with another record format; "
                "choose another folder (--out), or continue with the version that wrote it"
            )

    def find(self, name: str) -> Record | None:
        """Return a record; ``None`` if there is none, or it is damaged, and then it is set aside."""
        if name not in self._found:
            path = self._path(name)
            try:
                self._found[name] = Record.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                self._found[name] = None
            except ValidationError:
                self._set_aside(path, "is damaged")
                self._found[name] = None
        return self._found[name]

    def forget(self) -> None:
        """Read records again when they are needed: others have written some meanwhile."""
        if self._written:
            self._found.clear()

    def facts(self, name: str, key: str) -> dict[str, Any] | None:
        """Return the recorded facts of a result, if its key is unchanged."""
        record = self.find(name)
        return record.facts if record is not None and record.key == key else None

    def finished(self, name: str, key: str) -> bool:
        """Whether a result was finished with this key and all its files are intact; others are set aside.

        A result with a file that was modified or truncated since is made again, as if the file were missing. The file
        as it was found is moved to ``DIR/altered``: it may have been changed on purpose.
        """
        record = self.find(name)
        if record is None or record.key != key:
            return False
        now: dict[str, RecordedFile] = {}
        intact = True
        for file, was in record.files.items():
            path = self.folder / file
            try:
                stat = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                intact = False
                continue
            now[file] = was
            if (stat.st_size, stat.st_mtime_ns) == (was.size, was.mtime_ns):
                continue
            if stat.st_size != was.size or file_sha256(path) != was.sha256:
                self._set_aside(path, "was modified or truncated after it was written")
                intact = False
                continue
            now[file] = RecordedFile.of(path, was.sha256)  # copied or moved: its content need not be read again
        if intact and now != record.files:
            self._write(name, record.model_copy(update={"files": now}))
        return intact

    def finish(
        self, name: str, key: str, files: Iterable[Path], seconds: float, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record a finished result, whose files are complete."""
        found = {path.relative_to(self.folder).as_posix(): RecordedFile.of(path) for path in files}
        self._write(name, Record(key=key, seconds=round(seconds, 2), files=found, facts=dict(facts or {})))

    def retire(self, kind: str, names: Collection[str]) -> list[str]:
        """Remove results of a kind that a study no longer has, and return the names of their files.

        Only files on record are removed, and only if they are as they were written: what was altered since, or is on
        the record of another result too, is left alone.

        Parameters
        ----------
        kind
            First part of the results' names, such as ``figures``; only files in the folder of this name are removed.
        names
            Names of the results that the study has.
        """
        found = {name: record for name, record in self.everything().items() if name.startswith(f"{kind}/")}
        kept = {file for name, record in found.items() if name in names for file in record.files}
        gone: list[str] = []
        for name, record in found.items():
            if name in names:
                continue
            for file, was in record.files.items():
                path = self.folder / file
                inside = path.parent == self.folder / kind and path.name not in ("", ".", "..")
                if inside and file not in kept and _as_written(path, was):
                    path.unlink()
                    gone.append(file)
            self._path(name).unlink()
            self._found[name] = None
        return gone

    def everything(self) -> dict[str, Record]:
        """Return all records, by name."""
        root = self.folder / RECORDS
        names = sorted(path.relative_to(root).as_posix().removesuffix(".json") for path in root.rglob("*.json"))
        found = {name: self.find(name) for name in names}
        return {name: record for name, record in found.items() if record is not None}

    def _set_aside(self, path: Path, what: str) -> None:
        if not self._written:
            return
        place = self.folder / ALTERED / path.relative_to(self.folder)
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{path.name}.{number}")
        with disk_errors(place), suppress(FileNotFoundError):  # another worker may have moved it
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        self._tell(f"{path} {what}; it is now {place}, and is made again")

    def _write(self, name: str, record: Record) -> None:
        if self._written:
            write_text(self._path(name), record.model_dump_json(indent=2) + "\n")
        self._found[name] = record

    def _path(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name}.json"


def _as_written(path: Path, was: RecordedFile) -> bool:
    """Whether a file is there with the content on record."""
    return path.is_file() and path.stat().st_size == was.size and file_sha256(path) == was.sha256


def _is_older(provenance: Path) -> bool:
    """Return whether a provenance file, intact or damaged, is in the older format."""
    try:
        return "stages" in json.loads(provenance.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
