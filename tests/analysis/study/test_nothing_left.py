"""A run that fails before it has any result leaves the disk as it was."""

from __future__ import annotations

import pytest

from analysis.study.run import _nothing_left_of_nothing


def failing(folder, written):
    """Write files into a folder as a run does, and fail."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    before = set() if missing else {path.name for path in folder.iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()
    with pytest.raises(OSError, match="on purpose"), _nothing_left_of_nothing(folder, before, missing):
        for name in written:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_text(name)
        raise OSError("on purpose")


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("written", [[], ["study.toml", "records/model.json"], ["scratch/", "variants/"]])
def test_a_new_folder_and_those_above_it_go(tmp_path, written):
    failing(tmp_path / "runs" / "mine", written)
    assert everything(tmp_path) == set()


def test_what_was_there_before_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    failing(tmp_path / "runs", ["study.toml", "scratch/"])
    assert everything(tmp_path) == {"runs", "runs/notes.txt"}
    (tmp_path / "empty").mkdir()
    failing(tmp_path / "empty", ["study.toml"])
    assert everything(tmp_path) == {"runs", "runs/notes.txt", "empty"}


def test_results_stay_and_so_does_the_lock_of_a_study(tmp_path):
    failing(tmp_path / "one", ["study.toml", "records/variants/a.json"])
    assert {"one/.lock", "one/study.toml", "one/records/variants/a.json"} <= everything(tmp_path)
    failing(tmp_path / "one", [])
    assert {"one/.lock", "one/study.toml", "one/records/variants/a.json"} <= everything(tmp_path)
