"""Two checkpoints compared without a study file."""

from __future__ import annotations

import re

import pytest
from checkpoints import saved
from command_line import expect_one_line, nothing_was_made, prunescope
from pages import written

from analysis import read_frame
from pruning import Recipe, load_model, prune

pytestmark = pytest.mark.usefixtures("sketched")


@pytest.fixture(scope="module")
def pruned_by_somebody(place):
    model, tokenizer = load_model(str(place / "model"), dtype="float32", device="cpu")
    (variant,) = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.3)])
    variant.apply(model)
    return saved(model, place / "pruned by somebody")


def test_two_checkpoints_are_compared_without_a_study_file(place, pruned_by_somebody, tmp_path):
    out = tmp_path / "out"
    words = ["--out", out, "--languages", "en, sw, zh", "--segments", 6, "--items", "none"]
    result = prunescope("compare", place / "model", pruned_by_somebody, *words)
    assert result.returncode == 0, result.stderr
    report, following = result.stdout.splitlines()
    assert report == f"report: {out / 'report.html'}"
    assert following == f"Next: prunescope diagnose {out} --variant pruned_by_somebody --language en --category text"
    frame = read_frame(out / "frames" / "perplexity.parquet")
    assert set(frame["method"]) == {"dense", "pruned_by_somebody"}
    assert set(frame["language"]) == {"en", "sw", "zh"}
    assert len(read_frame(out / "frames" / "contrasts.parquet")) == 0
    page = written(out / "report.html")
    assert not re.search(r"\b(nan|None)\b", page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "nowhere"], ["nowhere"]),
        (["model", "model"], ["differs nowhere from this model"]),
        (["model", "nowhere", "--languages", "en"], ["languages"]),
        (["model", "nowhere", "--languages", "en,klingonish"], ["klingonish"]),
        (["model", "nowhere", "--text", "file:none/{lang}.jsonl"], ["none"]),
        (["model", "pruned by somebody", "--segments", "1000"], ["1000 heldout segments", "there are 160"]),
        (["pruned by somebody", "model", "--segments", "6"], ["were the dense and the pruned model swapped?"]),
    ],
)
def test_mistakes_in_a_comparison_are_one_line(place, pruned_by_somebody, tmp_path, arguments, words):
    places = [str(place / word) if word in ("model", pruned_by_somebody.name) else word for word in arguments]
    expect_one_line(prunescope("compare", *places, "--out", tmp_path / "out"), *words)
    assert nothing_was_made(tmp_path / "out")


def test_a_comparison_does_not_write_over_a_file(place, pruned_by_somebody, tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = prunescope("compare", place / "model", pruned_by_somebody, "--out", tmp_path / "mine")
    expect_one_line(result, "mine is a file", "--out")
    assert (tmp_path / "mine").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
