"""Atomic writes: write to a temporary path, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError

from .errors import DiskError

#: Suffix of partial files. It is specific to prunescope, so that cleaning up never removes other people's files.
PARTIAL = ".prunescope-partial"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Report failed writes to `path` as a one-line ``DiskError``.

    Raises
    ------
    DiskError
        If the disk is full or the path is not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in _DISK_FULL:
            raise DiskError(
                f"no space left while writing {path}; no partial file was kept. "
                "Free some space, or choose another folder (--out), and run again: finished stages are skipped"
            ) from error
        if number in _NOT_WRITABLE:
            raise DiskError(f"cannot write {path}: {os.strerror(number)}; choose another folder (--out)") from error
        raise


def _errno(error: OSError | SafetensorError) -> int:
    """Return the errno of an error; safetensors reports it only in its message."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success it replaces `path`, otherwise it is removed.

    Raises
    ------
    DiskError
        If the disk is full or the path is not writable.
    """
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
def whole_folder(path: Path, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; on success it replaces `path`, otherwise it is removed.

    Parameters
    ----------
    path
        Final location. An existing folder is replaced if it is empty or prunescope wrote it.
    ours
        Tells whether prunescope wrote a folder; by default no non-empty folder is replaced.

    Raises
    ------
    DiskError
        If `path` exists and may not be replaced, or cannot be written.
    """
    _check_replaceable(path, ours)
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        _remove(partial)
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            _check_replaceable(path, ours)
            put_in_place(partial, path)
        finally:
            _remove(partial)


def put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; an existing folder is removed only once the new one is in place.

    Whatever cannot be removed stays next to `path`, for :func:`remove_partials`.

    Raises
    ------
    DiskError
        If the path is not writable.
    """
    with disk_errors(path):
        old = next(
            place
            for number in count()
            if not os.path.lexists(place := path.with_name(f"{path.name}.{number}{PARTIAL}"))
        )
        replaces = os.path.lexists(path)
        if replaces:
            path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            if replaces:
                old.rename(path)
            raise
        _sync_folder(path.parent)
        _remove(old)


def _check_replaceable(path: Path, ours: Callable[[Path], bool] | None) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise DiskError(f"{path} is not a folder; choose another path, or move it away")
    if path.is_dir() and any(path.iterdir()) and (ours is None or not ours(path)):
        raise DiskError(f"{path} contains files that prunescope did not write; choose another folder")


def _remove(path: Path) -> None:
    """Remove a file or folder, ignoring errors; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a folder; ``False`` for an invalid path, such as one of 5,000 letters."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: str | Path) -> bool:
    """Whether `path` is a file; ``False`` for an invalid path."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def cache_folder() -> Path:
    """Return the cache folder shared by all studies; the variable ``PRUNESCOPE_CACHE`` overrides the default."""
    return Path(os.environ.get("PRUNESCOPE_CACHE") or user_cache_path("prunescope"))


@contextmanager
def only_one_makes(path: Path) -> Iterator[None]:
    """Hold a lock on `path` inside a ``with`` block, so that only one process creates it.

    Raises
    ------
    DiskError
        If the folder is not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` atomically as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def remove_partials(folder: Path) -> None:
    """Remove the partial files that an interrupted run left anywhere below `folder`."""
    for partial in sorted(folder.rglob("*" + PARTIAL), reverse=True):
        _remove(partial)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as a hex string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(content: Any) -> str:
    """Return the SHA-256 (hex) of JSON-serializable `content`; the order of keys does not matter."""
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
