from __future__ import annotations

import re
import tomllib

import pytest

from analysis import demo_study, load_study
from analysis.study import parse_study
from pruning.errors import StudyError

MINIMAL = 'model = "demo"\nlanguages = ["en", "sw"]\n'


def load(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return load_study(path)


def test_model_and_languages_are_all_that_is_needed(tmp_path):
    study = load(tmp_path, MINIMAL)
    assert [recipe.method for recipe in study.all_recipes()] == ["wanda"]
    assert [s.name for s in study.calibration_sets()] == ["all"]


def test_resolved_study_writes_every_default_and_reads_back(tmp_path):
    study = load(tmp_path, MINIMAL)
    text = study.to_toml()
    assert "max_length = 256" in text
    assert parse_study(tomllib.loads(text), "again") == study


def test_lists_make_a_grid(tmp_path):
    study = load(tmp_path, MINIMAL + '[[recipes]]\nmethod = ["magnitude", "wanda"]\nsparsity = [0.3, 0.5]\n')
    assert [(r.method, r.sparsity) for r in study.all_recipes()] == [
        ("magnitude", 0.3),
        ("magnitude", 0.5),
        ("wanda", 0.3),
        ("wanda", 0.5),
    ]


def test_relative_paths_are_relative_to_the_study_file(tmp_path):
    study = load(tmp_path, MINIMAL + '[text]\ncalibration = "file:text/{lang}.txt"\n')
    assert study.text.calibration == f"file:{tmp_path}/text/{{lang}}.txt"


def test_the_demo_asks_for_what_the_readme_says():
    study = demo_study()
    assert study.languages == ("ar", "de", "en", "es", "fr", "ru", "sw", "zh")
    names = [(s.name, s.seed) for s in study.calibration_sets()]
    assert sum(len(name) == 2 for name, seed in names if seed == 0) >= 4
    assert {("all", 0), ("sw", 1), ("en+sw", 0)} <= set(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('languages = ["en", "sw"]', 'the key "model" is missing'),
        (MINIMAL + "modle = 3", 'unknown key "modle"; did you mean "model"?'),
        (
            MINIMAL + "[calibration]\nsample = 3",
            'unknown key "sample" in [calibration]; did you mean "samples"?',
        ),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\nsparsty = 0.5', 'unknown key "sparsty"'),
        ('model = "demo"\nlanguages = ["en", "xx-nope"]', 'unknown language tag "xx-nope"'),
        ('model = "demo"\nlanguages = ["en", "en"]', 'language "en" is named twice'),
        ('model = "demo"\nlanguages = ["en"]', "languages"),
        (MINIMAL + '[[recipes]]\nmethod = "wnada"', 'unknown method "wnada"; did you mean "wanda"'),
        (MINIMAL + '[[recipes]]\nmethod = "wanda"\nsparsity = 1.5', "sparsity 1.5 is not between 0 and 1"),
        (
            MINIMAL + '[[recipes]]\nmethod = "wanda"\npattern = "rows"',
            'unknown pattern "rows"; did you mean "row"',
        ),
        (MINIMAL + '[calibration]\nsets = ["en+swahili"]', 'did you mean "sw"'),
        (MINIMAL + "[calibration]\nsamples = 0", "greater than or equal to 1"),
        (MINIMAL + '[text]\nheldout = "bundeld"', 'unknown text source "bundeld"'),
        (MINIMAL + '[text]\nheldout = { datset = "x" }', "dataset"),
        (MINIMAL + "[evaluation]\nrank = 5", "rank 5 is more than 1"),
        ("model = ", "is not TOML"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, text, message):
    with pytest.raises(StudyError, match=re.escape(message)) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "study.toml" in str(caught.value)


def test_missing_study_file_points_to_the_demo(tmp_path):
    with pytest.raises(StudyError, match="prunescope run demo"):
        load_study(tmp_path / "nothing.toml")
