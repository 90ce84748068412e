from __future__ import annotations

import json
import os
import shutil

import pytest

from analysis.study import records as module
from analysis.study.records import Records
from pruning.errors import StudyError


@pytest.fixture
def folder(tmp_path):
    """Return a study's folder with one finished result of two files."""
    folder = tmp_path / "study"
    for name in ("one", "two"):
        (folder / "readings" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "readings" / name).write_text(f"{name} of two")
    files = [folder / "readings" / name for name in ("one", "two")]
    Records(folder).finish("readings/dense/en", "key", files, 1.234, {"tokens": 3})
    return folder


def finished(folder, key="key"):
    return Records(folder).finished("readings/dense/en", key)


@pytest.fixture
def hashed(monkeypatch):
    """List the files whose content is read."""
    read = []
    real = module.file_sha256

    def noted(path):
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(module, "file_sha256", noted)
    return read


def test_a_result_is_finished_with_its_key_and_its_files(folder):
    assert finished(folder)
    assert not finished(folder, "other key")
    assert not Records(folder).finished("readings/dense/sw", "key")
    (folder / "readings" / "two").unlink()
    assert not finished(folder)


def test_what_is_on_record_can_be_read_without_the_files(folder):
    assert Records(folder).facts("readings/dense/en", "key") == {"tokens": 3}
    assert Records(folder).facts("readings/dense/en", "other key") is None
    assert Records(folder).facts("readings/dense/sw", "key") is None
    (record,) = Records(folder).everything().values()
    assert (record.seconds, set(record.files)) == (1.23, {"readings/one", "readings/two"})


def test_files_that_are_as_they_were_are_not_read(folder, hashed):
    assert finished(folder)
    assert hashed == []


def test_files_of_another_time_are_read_once(folder, hashed):
    os.utime(folder / "readings" / "one", ns=(1, 1))
    assert finished(folder)
    assert finished(folder)
    assert hashed == ["one"]


def test_a_copied_folder_is_trusted_when_its_files_are_the_same(folder, tmp_path, hashed):
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy" / "readings").iterdir():
        os.utime(path, ns=(1, 1))
    assert finished(tmp_path / "copy")
    assert sorted(hashed) == ["one", "two"]
    assert finished(tmp_path / "copy")
    assert len(hashed) == 2


@pytest.mark.parametrize("content", ["one of 2", "one of twO", ""])
def test_a_file_that_was_altered_is_set_aside_and_its_result_made_again(folder, content):
    path = folder / "readings" / "one"
    for number in ("", ".2", ".3"):  # whatever was set aside before is kept
        path.write_text(content)
        os.utime(path, ns=(1, 1))  # whatever the clock says
        told = []
        assert not Records(folder, tell=told.append).finished("readings/dense/en", "key")
        aside = folder / "altered" / "readings" / f"one{number}"
        assert aside.read_text() == content
        assert not path.exists()
        said = f"{path} was modified or truncated after it was written; it is now {aside}, and is made again"
        assert told == [said]
        assert not finished(folder)


def test_a_plan_moves_nothing(folder):
    path = folder / "readings" / "one"
    path.write_text("altered")
    assert not Records(folder, written=False).finished("readings/dense/en", "key")
    assert path.read_text() == "altered"
    assert not (folder / "altered").exists()


def test_a_result_of_another_key_is_made_again_whatever_its_files_are(folder):
    (folder / "readings" / "one").write_text("other")
    assert not finished(folder, "other key")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}', '{"key": "a", "seconds": 1, "files": {"x": "y"}}'])
def test_a_damaged_record_is_set_aside(folder, content):
    path = folder / "records" / "readings" / "dense" / "en.json"
    path.write_text(content)
    told = []
    assert not Records(folder, tell=told.append).finished("readings/dense/en", "key")
    aside = folder / "altered" / "records" / "readings" / "dense" / "en.json"
    assert aside.read_text() == content
    assert told == [f"{path} is damaged; it is now {aside}, and is made again"]
    assert not finished(folder)
    assert list(Records(folder).everything()) == []


@pytest.mark.parametrize("content", [json.dumps({"stages": {}, "seeds": [0]}), '{"stages": {"variant'])
def test_a_folder_of_an_older_layout_says_what_to_do(tmp_path, content):
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(StudyError, match=r"older version of prunescope.*choose another folder \(--out\)"):
        Records(tmp_path)


def test_a_new_folder_has_no_records(tmp_path):
    assert Records(tmp_path / "nowhere").everything() == {}
    assert not Records(tmp_path).finished("frames/signal", "key")


@pytest.fixture
def drawn(tmp_path):
    """Return a study's folder with figures of two names, and one that nobody has on record."""
    folder = tmp_path / "study"
    (folder / "figures").mkdir(parents=True)
    for name in ("old", "new"):
        files = [folder / "figures" / f"{name}.{kind}" for kind in ("pdf", "png")]
        for file in files:
            file.write_text(file.name)
        Records(folder).finish(f"figures/{name}", "key", files, 1.0)
    (folder / "figures" / "mine.pdf").write_text("precious")
    return folder


def test_files_of_results_that_a_study_no_longer_has_are_removed_and_no_others(drawn):
    records = Records(drawn)
    assert records.retire("tables", set()) == []
    assert records.retire("figures", {"figures/new"}) == ["figures/old.pdf", "figures/old.png"]
    assert {path.name for path in (drawn / "figures").iterdir()} == {"new.pdf", "new.png", "mine.pdf"}
    assert set(Records(drawn).everything()) == set(records.everything()) == {"figures/new"}
    assert records.retire("figures", {"figures/new"}) == []


def test_files_that_were_altered_or_are_somewhere_else_are_not_removed(drawn):
    (drawn / "figures" / "old.png").write_text("altered")
    (drawn / "results.csv").write_text("mine")
    content = json.loads((drawn / "records" / "figures" / "old.json").read_text())
    for place in ("results.csv", "figures/../results.csv", "figures/new.pdf"):
        content["files"][place] = content["files"]["figures/old.pdf"] | {
            "size": (drawn / place).stat().st_size,
            "sha256": module.file_sha256(drawn / place),
        }
    (drawn / "records" / "figures" / "old.json").write_text(json.dumps(content))
    assert Records(drawn).retire("figures", {"figures/new"}) == ["figures/old.pdf"]
    assert (drawn / "results.csv").read_text() == "mine"
    names = {path.name for path in (drawn / "figures").iterdir()}
    assert names == {"old.png", "new.pdf", "new.png", "mine.pdf"}
