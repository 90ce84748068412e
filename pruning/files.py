"""Files that are either whole or not there: write beside, fsync, rename."""

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
def whole_folder(path: Path, ours: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Give a folder beside `path` to fill; on success it takes the place of `path`, else it is removed.

    Parameters
    ----------
    path
        What is there already is replaced if it is an empty folder, or one that prunescope wrote.
    ours
        Tells whether prunescope wrote a folder; none that has something in it by default.

    Raises
    ------
    DiskError
        If something else is at `path`.
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
    """Rename `folder` to `path`; what was there goes only once the new one is in its place.

    If it cannot be removed, what is left of it is beside `path`, for :func:`remove_partials`.
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
        raise DiskError(f"{path} is no folder; choose another place, or move it away")
    if path.is_dir() and any(path.iterdir()) and (ours is None or not ours(path)):
        raise DiskError(f"{path} has something in it that prunescope did not write; choose another folder")


def _remove(path: Path) -> None:
    """Remove a file or folder as far as it can be removed; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; ``False`` also for what cannot be a path at all, such as 5,000 letters."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; ``False`` also for what cannot be a path at all."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def cache_folder() -> Path:
    """Return the folder for what is made once and used by every study; ``PRUNESCOPE_CACHE`` chooses another one."""
    return Path(os.environ.get("PRUNESCOPE_CACHE") or user_cache_path("prunescope"))


@contextmanager
def only_one_makes(path: Path) -> Iterator[None]:
    """Have other processes wait inside a ``with`` block, so that they find `path` made when it is their turn."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
        _remove(partial)


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
