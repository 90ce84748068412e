from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError

from pruning.errors import DiskError
from pruning.files import PARTIAL, remove_partials, whole_file, whole_folder, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="midway"), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("midway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="midway"), whole_folder(tmp_path / "f") as partial:
        (partial / "one").write_text("1")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="no space left while writing"):
        write_text(tmp_path / "a.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_understood_when_safetensors_reports_it(tmp_path):
    with pytest.raises(DiskError, match="no space left while writing"), whole_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "x" / f"v{PARTIAL}").mkdir(parents=True)
    (tmp_path / "x" / f"v{PARTIAL}" / "masks").write_text("half")
    (tmp_path / f"frame.parquet{PARTIAL}").write_text("half")
    (tmp_path / "frame.parquet").write_text("whole")
    (tmp_path / "film.mp4.partial").write_text("somebody else's download")
    remove_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["film.mp4.partial", "frame.parquet", "x"]
