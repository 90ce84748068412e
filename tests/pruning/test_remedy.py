from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from pruning import Remedy
from pruning.errors import RecipeError

REMEDY = Remedy(
    model_fingerprint="4f",
    variant="wanda-0.5-row-pruned-en-s0",
    language="sw",
    category="reasoning",
    fitted_on="half of the items",
    importance={"0.q": 0.01, "10.down": -0.12, "9.down": 1e-9},
)


def test_a_remedy_reads_back_and_says_what_it_is(tmp_path):
    REMEDY.save(tmp_path / "new" / "remedy.json")
    assert Remedy.open(tmp_path / "new" / "remedy.json") == REMEDY
    content = json.loads((tmp_path / "new" / "remedy.json").read_text())
    assert content["format"] == "prunescope-remedy-1"
    assert content["importance"] == {"0.q": 0.01, "10.down": -0.12, "9.down": 1e-9}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_importance_that_cannot_be_ranked_is_refused(value):
    with pytest.raises(ValidationError, match=r'"0.q" is (nan|inf), which cannot be ranked'):
        Remedy(**REMEDY.model_dump() | {"importance": {"0.q": value}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:50], r"remedy.json is damaged \(.*prunescope diagnose"),
        (lambda text: "[1, 2]", "is not a remedy"),
        (lambda text: text.replace("remedy-1", "remedy-2"), "is not a remedy"),
        (lambda text: text.replace("0.01", '"much"'), r"is damaged \(importance.0.q: "),
        (lambda text: text.replace("0.01", "NaN"), r"is damaged \(importance: "),
        (lambda text: text.replace("category", "categry"), r"is damaged \(categ"),
        (lambda text: text.encode("utf-16"), "is damaged"),
    ],
)
def test_files_that_are_no_remedy_are_one_clear_line(tmp_path, change, words):
    path = tmp_path / "remedy.json"
    REMEDY.save(path)
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(RecipeError, match=words) as caught:
        Remedy.open(path)
    assert "\n" not in str(caught.value)


def test_a_missing_remedy_says_what_writes_one(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no file .*pass the remedy.json written by prunescope diagnose"):
        Remedy.open(tmp_path / "remedy.json")
    with pytest.raises(RecipeError, match="cannot read"):
        Remedy.open(tmp_path)
