"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import DiskError

#: Ours alone: what a run clears away is never a file of somebody else, whatever folder it is given.
PARTIAL = ".prunescope-partial"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into one clear line.

    Raises
    ------
    DiskError
        If the disk is full or the place cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in _DISK_FULL:
            raise DiskError(
                f"no space left while writing {path}; nothing half-written was kept. "
                "Free some space, or choose another folder (--out), and run again: finished stages are skipped"
            ) from error
        if number in _NOT_WRITABLE:
            raise DiskError(f"cannot write {path}: {os.strerror(number)}; choose another folder (--out)") from error
        raise


def _errno(error: OSError | SafetensorError) -> int:
    """Return the operating system's error number; safetensors gives it in its message only."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes the place of `path`, else it is removed."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to fill; on success it takes the place of `path`, else it is removed."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            shutil.rmtree(path, ignore_errors=True)
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def remove_partials(folder: Path) -> None:
    """Remove what a killed run left half-written anywhere below `folder`."""
    for partial in sorted(folder.rglob("*" + PARTIAL), reverse=True):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(content: Any) -> str:
    """Return the SHA-256 of JSON-able `content`, independent of the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
