"""Which stages of a study are finished: a key of all that each depends on, and the files that it left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pruning.errors import StudyError
from pruning.files import file_sha256, write_json

PROVENANCE = "provenance.json"


class Ledger:
    """The record of a study folder, kept in its ``provenance.json``.

    Stages that a changed study no longer asks for stay on record: asked for again, they are there.

    Parameters
    ----------
    folder
        The study folder.

    Raises
    ------
    StudyError
        If the record is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / PROVENANCE
        self._content: dict[str, Any] = {"stages": {}}
        if self.path.is_file():
            try:
                self._content = json.loads(self.path.read_text(encoding="utf-8"))
                self._content["stages"].items()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise StudyError(
                    f"{self.path} is damaged; delete it to have the whole study made again, or choose another --out"
                ) from error

    def finished(self, stage: str, key: str) -> bool:
        """Whether a stage was finished with this key and all its files are there, unaltered.

        Raises
        ------
        StudyError
            If a file of the stage was altered or cut short since.
        """
        record = self._content["stages"].get(stage)
        if record is None or record["key"] != key:
            return False
        for name, digest in record["files"].items():
            path = self.folder / name
            if not path.is_file():
                return False
            if file_sha256(path) != digest:
                raise StudyError(
                    f"{path} was altered or cut short after it was written; delete it to have it made again"
                )
        return True

    def finish(self, stage: str, key: str, files: Iterable[Path], seconds: float) -> None:
        """Record a finished stage."""
        digests = {str(path.relative_to(self.folder)): file_sha256(path) for path in files}
        self._content["stages"][stage] = {"key": key, "seconds": round(seconds, 2), "files": digests}
        self._write()

    def describe(self, **facts: Any) -> None:
        """Record facts of the run: versions, fingerprints, machine."""
        self._content = {**facts, "stages": self._content["stages"]}
        self._write()

    def _write(self) -> None:
        write_json(self.path, self._content)
