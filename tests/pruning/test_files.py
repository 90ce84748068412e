from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

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


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder, ours=lambda place: (place / "ours").exists()) as partial:
        (partial / "ours").write_text(text)


def test_a_folder_replaces_only_what_is_its_own(tmp_path):
    fill(tmp_path / "f", "one")
    fill(tmp_path / "f", "two")
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "three")
    assert content(tmp_path) == {"f/ours": "two", "empty/ours": "three"}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    before = content(tmp_path)
    for name in ("thesis", "file", "link"):
        with pytest.raises(DiskError, match=f"{name} (contains files|is not a folder)"):
            fill(tmp_path / name, "mine")
    with pytest.raises(DiskError, match="did not write"), whole_folder(tmp_path / "f"):
        pass
    assert content(tmp_path) == before


def test_what_turns_up_while_a_folder_is_filled_is_left_alone(tmp_path):
    with (
        pytest.raises(DiskError, match="did not write"),
        whole_folder(tmp_path / "f") as partial,
    ):
        (partial / "ours").write_text("new")
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "thesis.tex").write_text("precious")
    assert content(tmp_path) == {"f/thesis.tex": "precious"}


def test_an_old_folder_that_cannot_be_removed_does_not_keep_the_new_one_out(tmp_path, monkeypatch):
    fill(tmp_path / "f", "old")
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: None)
    fill(tmp_path / "f", "new")
    fill(tmp_path / "f", "newer")  # although what is left of the first is still there
    assert (tmp_path / "f" / "ours").read_text() == "newer"
    assert all(PARTIAL in name for name in content(tmp_path) if name != "f/ours")
    assert len(content(tmp_path)) == 3
    monkeypatch.setattr(shutil, "rmtree", remove)
    remove_partials(tmp_path)
    assert content(tmp_path) == {"f/ours": "newer"}


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    fill(tmp_path / "f", "old")
    rename = Path.rename

    def refuse(self, target):
        if self.name == f"f{PARTIAL}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DiskError, match="no space left"):
        fill(tmp_path / "f", "new")
    assert content(tmp_path) == {"f/ours": "old"}


def test_links_are_removed_and_not_followed(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    (tmp_path / f"f{PARTIAL}").symlink_to(tmp_path / "thesis")
    remove_partials(tmp_path)
    assert content(tmp_path) == {"thesis/chapter.tex": "precious"}
    assert not (tmp_path / f"f{PARTIAL}").is_symlink()
