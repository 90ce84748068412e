"""Commands without a study file: prune a model, look at variants, write a new study file."""

from __future__ import annotations

import io
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
from checkpoints import saved
from command_line import expect_one_line, nothing_was_made, prunescope
from conftest import tiny_model

from analysis import Study, load_study
from analysis.cli import app
from analysis.study import figures
from pruning import CalibrationSet, Corpus, Recipe, Variant, load_model, prune

SMALL = ["--samples", 4, "--length", 32]
FEW = ["--languages", "en,sw", "--segments", 6, "--items", "none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    saved(tiny_model(max_position_embeddings=1024), folder / "model", shard="1GB")
    saved(tiny_model(seed=1, max_position_embeddings=1024), folder / "other", shard="1GB")
    return folder


@pytest.fixture(scope="module")
def pruned(place):
    """Two variants, made by a command."""
    out = place / "pruned"
    words = ["--method", "wanda,rtn", "--sparsity", 0.4, "--bits", 3, "--group", 16, "--calibration", "sw", *SMALL]
    result = prunescope("prune", place / "model", *words, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"variants: {out / 'variants'}",
        f"Next: prunescope look {place / 'model'} {out}",
    ]
    return out


@pytest.fixture
def _no_figures(monkeypatch):
    """They take most of the time."""
    monkeypatch.setattr(figures, "study_figures", lambda *_: iter(()))


# -- prune ------------------------------------------------------------------------------------------------------------


def test_a_model_is_pruned_without_a_study_file(place, pruned):
    model, tokenizer = load_model(str(place / "model"), device="cpu")
    swahili = CalibrationSet.named("sw", samples=4, length=32)
    recipes = [Recipe(method="wanda", sparsity=0.4), Recipe(method="rtn", sparsity=0, bits=3, group=16)]
    wanda, rtn = prune(model, tokenizer, recipes, Corpus.of("bundled"), swahili)
    made = {path.name: Variant.open(path) for path in (pruned / "variants").iterdir()}
    assert set(made) == {wanda.id, rtn.id}
    assert made[wanda.id].masks == wanda.masks
    for key in rtn.codes:
        dense = model.get_parameter(
            f"model.layers.{key[0]}.{'self_attn' if key[1] in 'qkvo' else 'mlp'}.{key[1]}_proj.weight"
        )
        np.testing.assert_array_equal(made[rtn.id].weight(key, dense), rtn.weight(key, dense))


def test_pruning_again_resumes_and_another_pruning_needs_another_folder(place, pruned):
    times = {path: path.stat().st_mtime_ns for path in (pruned / "variants").rglob("*.safetensors")}
    words = ["--method", "wanda,rtn", "--sparsity", 0.4, "--bits", 3, "--group", 16, "--calibration", "sw", *SMALL]
    assert prunescope("prune", place / "model", *words, "--out", pruned).returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in (pruned / "variants").rglob("*.safetensors")}
    before = (pruned / "study.toml").read_bytes()
    words[1] = "magnitude"
    expect_one_line(prunescope("prune", place / "model", *words, "--out", pruned), "has another study", "--out")
    assert (pruned / "study.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "wandas"], ['unknown method "wandas"; did you mean "wanda"']),
        (["--method", "wanda", "--calibration", "klingonish"], ['unknown language tag "klingonish"']),
        (["--method", "wanda", "--languages", "en,klingonish"], ["klingonish"]),
        (["--method", "wanda", "--sparsity", "1.5"], ["sparsity 1.5 is not between 0 and 1"]),
        (["--method", "wanda", "--pattern", "rows"], ['unknown pattern "rows"']),
        (["--method", "rtn", "--bits", "5"], ["bits"]),
        (["--method", "wanda", "--text", "bundles"], ['unknown text source "bundles"']),
        (["--method", "wanda", "--text", "file:none/{lang}.txt"], ["--languages"]),
        (["--method", "wanda", "--memory", "much"], ["is not an amount of memory"]),
        ([], ["is a model, not a study; say how to prune it: prunescope prune", "--method wanda"]),
    ],
)
def test_mistakes_in_pruning_are_one_line(place, tmp_path, words, said):
    expect_one_line(prunescope("prune", place / "model", *words, "--out", tmp_path / "out"), *said)
    assert nothing_was_made(tmp_path / "out")


def test_a_folder_with_other_files_is_left_alone(place, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    result = prunescope("prune", place / "model", "--method", "magnitude", "--out", tmp_path)
    expect_one_line(result, "exists and has no study in it", "--out")
    expect_one_line(prunescope("look", place / "model", place / "model", "--out", tmp_path), "exists and has no study")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_hub_id_without_a_method_is_not_taken_for_a_study_file():
    expect_one_line(prunescope("prune", "owner/model"), "owner/model is a model", "--method wanda")
    expect_one_line(prunescope("prune", "nowhere/study.toml"), "no study file")


# -- look ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_figures")
def test_variants_made_by_a_command_are_looked_at_as_they_are(place, pruned, tmp_path):
    result = prunescope("look", place / "model", pruned, *FEW, "--out", tmp_path / "seen")
    assert result.returncode == 0, result.stderr
    report, following = result.stdout.splitlines()
    assert report == f"report: {tmp_path / 'seen' / 'report.html'}"
    assert following.startswith(f"Next: prunescope diagnose {tmp_path / 'seen'} --variant ")
    seen, made = Study.open(tmp_path / "seen"), Study.open(pruned)
    assert [v.id for v in seen.variants()] == sorted(v.id for v in made.variants())
    pd.testing.assert_frame_equal(seen.models.sort_index(), made.models.sort_index())
    wanda = seen.variant(method="wanda", calibration="sw")
    assert wanda.masks == made.variant(method="wanda").masks
    assert set(seen.frame("signal", method="rtn")["pattern"]) == {"3bit-g16"}
    shares = seen.frame("sparsity", method="wanda").merge(pd.DataFrame({"layer": range(3)}), on="layer")
    assert shares["value"].between(0.35, 0.45).all()


@pytest.mark.usefixtures("_no_figures")
def test_a_look_is_the_study_that_made_the_variants(place, pruned, tmp_path):
    """What is read of variants that were made before is what a study that makes them reads."""
    study = (pruned / "study.toml").read_text()
    study = study.replace("segments = 128", "segments = 6").replace("[tasks]", '[tasks]\nitems = "none"')
    content = tomllib.loads(study) | {"languages": ["en", "sw"]}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(content))
    assert prunescope("run", tmp_path / "study.toml", "--out", tmp_path / "whole").returncode == 0
    one = pruned / "variants" / "wanda-0.4-row-pruned-sw-s0"
    assert prunescope("look", place / "model", one, *FEW, "--out", tmp_path / "one").returncode == 0
    whole, seen = Study.open(tmp_path / "whole"), Study.open(tmp_path / "one")
    for name in ("perplexity", "signal", "subspaces", "sparsity"):
        pd.testing.assert_frame_equal(
            seen.frame(name, method="wanda").reset_index(drop=True),
            whole.frame(name, method="wanda").reset_index(drop=True),
            check_categorical=False,
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "nowhere"], ["nowhere"]),
        (["other", "pruned"], ["belongs to another model"]),
        (["model", "pruned", "--languages", "en"], ["languages"]),
        (["model", "pruned", "--languages", "en,klingonish"], ["klingonish"]),
        (["model", "pruned", "pruned"], ["two variants are called"]),
        (["model", "pruned", "--items", "riddles"], ["riddles"]),
    ],
)
def test_mistakes_in_a_look_are_one_line(place, pruned, tmp_path, words, said):
    places = [str(place / word) if (place / word).is_dir() else word for word in words]
    expect_one_line(prunescope("look", *places, "--segments", 6, "--out", tmp_path / "out"), *said)
    assert nothing_was_made(tmp_path / "out")


def test_a_look_does_not_replace_a_study_that_makes_variants(place, pruned):
    before = (pruned / "study.toml").read_bytes()
    result = prunescope("look", place / "model", pruned, *FEW, "--out", pruned)
    expect_one_line(result, "has a study that makes variants", "--out")
    assert (pruned / "study.toml").read_bytes() == before


# -- new ----------------------------------------------------------------------------------------------------------------


def test_a_new_study_file_is_what_was_asked_for(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    file = tmp_path / "deep" / "mine.toml"
    words = [
        "--model",
        "model",
        "--languages",
        "en,sw,zh",
        "--methods",
        "wanda,rtn,sparsegpt",
        "--sparsity",
        "0.3, 0.5",
    ]
    result = prunescope("new", file, *words, "--calibration", "en,en+sw")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"study: {file}",
        f"Next: prunescope plan {file}",
        f"Next: prunescope run {file}",
    ]
    study = load_study(file)
    assert Path(study.model) == place / "model"
    assert study.languages == ("en", "sw", "zh")
    assert {(job.recipe.method, job.recipe.sparsity, job.recipe.bits) for job in study.jobs()} == {
        *((method, sparsity, 0) for method in ("wanda", "sparsegpt") for sparsity in (0.3, 0.5)),
        ("rtn", 0.0, 4),
    }
    assert {job.calibration.name for job in study.jobs() if job.calibration} == {"en", "en+sw"}
    assert "# lists make a grid" in file.read_text()


def test_an_existing_study_file_is_never_overwritten(tmp_path):
    (tmp_path / "study.toml").write_text("mine")
    expect_one_line(prunescope("new", tmp_path / "study.toml", "--model", "demo"), "exists, and is not overwritten")
    assert (tmp_path / "study.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["which model? Give --model"]),
        (["--model", "demo", "--languages", "en"], ["languages"]),
        (["--model", "demo", "--languages", "en,klingonish"], ['unknown language tag "klingonish"']),
        (["--model", "demo", "--methods", "wandas"], ['did you mean "wanda"']),
        (["--model", "demo", "--sparsity", "half"], ['sparsity "half" is no number']),
        (["--model", "demo", "--text", "hub:mc5"], ['unknown hub preset "mc5"']),
        (["--model", ""], ["cannot be a model"]),
    ],
)
def test_mistakes_in_a_new_study_are_one_line(tmp_path, words, said):
    expect_one_line(prunescope("new", tmp_path / "study.toml", *words), *said)
    assert not list(tmp_path.iterdir())


def test_what_no_option_says_is_asked_for(tmp_path, monkeypatch):
    class Person(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Person("demo\nde,sw\n\nria\n"))
    result = prunescope("new", tmp_path / "study.toml", "--sparsity", "0.2", "--text", "bundled")
    assert result.returncode == 0, result.stderr
    study = load_study(tmp_path / "study.toml")
    assert (study.model, study.languages, study.calibration.sets) == ("demo", ("de", "sw"), ("de", "sw", "all"))
    assert next(job.recipe.method for job in study.jobs()) == "ria"
    assert "Sparsities" not in result.stdout


# -- help ---------------------------------------------------------------------------------------------------------------


def test_every_command_has_an_example_in_its_help():
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    of_studies = {"new", "run", "prune", "plan", "studies", "diagnose", "power", "figures", "combine"}
    of_studies |= {"subspaces", "export"}
    assert of_studies | {"look", "compare"} == set(names)
    for name in names:
        result = prunescope(name, "--help")
        assert result.returncode == 0
        assert f"prunescope {name}" in result.stdout.partition("Example")[2], result.stdout


def test_the_shell_completes_commands_and_values(monkeypatch):
    monkeypatch.setenv("_PRUNESCOPE_COMPLETE", "complete_bash")
    for words, expected in (
        ("prunescope loo", "look"),
        ("prunescope run dem", "demo"),
        ("prunescope prune m --method sparse", "sparsegpt"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert expected in prunescope().stdout.split(), words


def test_the_version_is_that_of_the_package():
    assert prunescope("--version").stdout == f"prunescope {version('prunescope')}\n"
