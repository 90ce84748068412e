"""Collections of published checkpoints: a template in the study file, variants with columns in the frames."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from checkpoints import CORPUS, saved
from command_line import expect_one_line, nothing_was_made, prunescope
from conftest import tiny_model

from analysis import load_study, read_frame
from analysis.study import run as study_run
from analysis.study.study_file import parse_study
from pruning import CalibrationSet, Recipe, Variant, load_model, prune
from pruning.errors import StudyError

MINIMAL = 'model = "demo"\nlanguages = ["en", "sw"]\nrecipes = []\n'
HUB = """[imported.kurz]
template = "somebody/pruned-{model}-{method}-{sparsity}-{pattern}-mc4-{calibration}-{seed}"
model = "tiny"
method = ["wanda", "sparsegpt"]
sparsity = 0.5
pattern = ["unstructured", "2to4"]
calibration = ["en", "sw"]
seed = [0, 42]
"""


def parsed(text: str):
    return parse_study(tomllib.loads(MINIMAL + text), "study.toml")


def stated(text: str) -> dict[str, dict[str, object]]:
    return {name: own.stated.model_dump(exclude_none=True) for name, own in parsed(text).checkpoints().items()}


# The study file


def test_values_make_a_grid_of_names_and_columns_without_looking_anything_up():
    found = parsed(HUB).checkpoints()
    assert len(found) == 2 * 2 * 2 * 2
    one = found["kurz-tiny-sparsegpt-0.5-2to4-sw-42"]
    assert one.source == "somebody/pruned-tiny-sparsegpt-0.5-2to4-mc4-sw-42"
    assert one.stated.model_dump() == {
        "method": "sparsegpt",
        "sparsity": 0.5,
        "pattern": "2:4",
        "calibration": "sw",
        "seed": 42,
    }
    patterns = {(own.stated.method, own.stated.pattern) for own in found.values()}
    assert patterns == {("wanda", "row"), ("wanda", "2:4"), ("sparsegpt", "matrix"), ("sparsegpt", "2:4")}


def test_tables_say_what_names_mean_and_columns_outside_the_template_hold_for_all():
    found = stated(
        '[imported.a]\ntemplate = "o/{calibration}-{half}"\nmethod = "theirs"\nseed = 7\nhalf = ["a", "b"]\n'
        'calibration = { english = "en", "en_sw" = "en+sw", both = "all" }\n'
    )
    assert list(found) == [f"a-{c}-{h}" for c in ("english", "en_sw", "both") for h in "ab"]
    assert found["a-en_sw-b"] == {"method": "theirs(half=b)", "calibration": "en+sw", "seed": 7}


def test_lines_and_collections_stand_side_by_side_and_read_back():
    study = parsed('[imported]\nmine = "ours"\n' + HUB + 'revision = "v2"\n')
    assert study.imported["mine"] == "ours"
    assert {own.revision for own in study.checkpoints().values()} == {None, "v2"}
    again = parse_study(tomllib.loads(study.to_toml()), "again")
    assert again == study
    assert again.checkpoints() == study.checkpoints()


def test_a_template_is_of_folders_where_its_beginning_is_one(tmp_path):
    (tmp_path / "here").mkdir()
    for template, folder in [
        ("here/{method}", "here/wanda"),
        ("elsewhere/{method}", None),
        ("./{method}", "wanda"),
        ("deep/er/{method}/x", "deep/er/wanda/x"),
        ("x-{method}", "x-wanda"),
        (f"{tmp_path}/q/{{method}}", "q/wanda"),
    ]:
        path = tmp_path / "study.toml"
        path.write_text(MINIMAL + f'[imported.a]\ntemplate = "{template}"\nmethod = "wanda"\n')
        (one,) = load_study(path).checkpoints().values()
        assert one.source == (str(tmp_path / folder) if folder else "elsewhere/wanda")
        assert one.local == bool(folder)


TABLE = '[imported.a]\ntemplate = "o/{method}-{seed}"\nmethod = "wanda"\nseed = [0, 1]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TABLE.replace("{method}-{seed}", "x"), 'template "o/x" needs fields in braces, such as'),
        (TABLE.replace("{seed}", "{seed"), "needs fields in braces"),
        (TABLE.replace("seed = [0, 1]", ""), 'has a field {seed} without values; write seed = ["…"]'),
        (TABLE.replace("seed = [0, 1]", "seed = []"), "seed is empty"),
        (TABLE + "sed = 3", '"sed" is no field of the template; did you mean "seed"?'),
        (TABLE.replace("{seed}", "x"), "seed has 2 values, but the template has no field {seed}"),
        (TABLE.replace("{method}", "x").replace('method = "wanda"', ""), 'or method = "wanda"'),
        (TABLE.replace("[0, 1]", '["x"]'), 'seed "x" is not a number; write what it means, such as seed = { "x" = 0 }'),
        (TABLE.replace("[0, 1]", "true"), "imported.a.seed"),
        (TABLE + "sparsity = 50", 'sparsity "50" is not a share below 1'),
        (TABLE.replace('"wanda"', '"dense"'), 'method "dense" is not the name of a method'),
        (TABLE + 'pattern = "rows"', 'unknown pattern "rows"; did you mean "row"'),
        (TABLE + 'pattern = "4to2"', "0 < n < m"),
        (TABLE + 'calibration = "swahili"', 'did you mean "sw"'),
        (TABLE.replace("{seed}", "{revision}"), "cannot have a field {revision}"),
        (TABLE.replace("o/", "./") + 'revision = "v2"', "revision is for Hub models"),
        (TABLE.replace("template", "tempate"), "imported.a.template"),
        (TABLE + '[imported]\nb = 3', "imported.b: should be text in quotes"),
        (TABLE + '[imported]\n"a-wanda-0" = "x"', 'two checkpoints would be called "a-wanda-0"'),
        (TABLE.replace("imported.a", f"imported.{'a' * 95}"), "is not a valid name"),
        (TABLE.replace("o/", "o" * 5000), "cannot be a model"),
    ],
)  # fmt: skip
def test_mistakes_in_a_collection_are_one_clear_line(text, words):
    if "[imported]" in text:
        table, _, line = text.partition("[imported]")
        text = "[imported]" + line + "\n" + table
    with pytest.raises(StudyError, match=re.escape(words)) as caught:
        parsed(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# Importing


@pytest.fixture(scope="module")
def collection(place) -> Path:
    """Beside the model: checkpoints of two methods, one of them wrongly named, and two that cannot be read."""
    folder = place / "collection"
    dense = str(place / "model")
    for method, pattern in (("wanda", "unstructured"), ("sparsegpt", "2to4")):
        for language in ("en", "sw"):
            model, tokenizer = load_model(dense, device="cpu")
            text = CalibrationSet.named(language, samples=4, length=32)
            kind = {"pattern": "2:4", "sparsity": None} if pattern == "2to4" else {"sparsity": 0.25}
            prune(model, tokenizer, Recipe(method=method, **kind), CORPUS, text)[0].apply(model)
            name = f"tiny-{method}-0.5-{pattern}-{language}-0"
            model.save_pretrained(folder / name, max_shard_size="1GB")  # without a tokenizer, as some are published
    shutil.copytree(folder / "tiny-wanda-0.5-unstructured-en-0", folder / "tiny-wanda-0.25-2to4-de-0")
    (folder / "tiny-sparsegpt-0.5-unstructured-en-0").mkdir()
    pickled = folder / "tiny-sparsegpt-0.5-unstructured-sw-0"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    return folder


COLLECTION = """
[imported.theirs]
template = "{place}/tiny-{{method}}-{{sparsity}}-{{pattern}}-{{calibration}}-0"
method = ["wanda", "sparsegpt"]
sparsity = 0.5
pattern = ["unstructured", "2to4"]
calibration = ["en", "sw"]
"""
READ = '[evaluation]\nsegments = 4\nfit_segments = 4\nmax_length = 32\n[tasks]\nitems = "none"\n'


def importing(place: Path, path: Path, text: str) -> Path:
    path.write_text(f'model = "{place / "model"}"\nlanguages = ["en", "sw"]\nrecipes = []\n' + READ + text)
    return path


def test_a_collection_is_measured_with_the_columns_that_its_names_state(place, collection, tmp_path, monkeypatch):
    monkeypatch.setattr(study_run, "_REPORTING", ())  # figures and page would take most of the time
    path = importing(place, tmp_path / "study.toml", COLLECTION.format(place=collection))
    out = tmp_path / "out"
    result = prunescope("run", path, "--out", out)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    (missing,) = (line for line in lines if "not there" in line)
    assert missing.startswith("imported.theirs: left out 2 of 8 checkpoints not there: theirs-wanda-0.5-2to4-en, ")
    (pickled,) = (line for line in lines if "pickled" in line)
    assert pickled.startswith("imported.theirs: left out 1 of 8 checkpoints with pickled weights only")
    assert pickled.endswith(": theirs-sparsegpt-0.5-unstructured-sw")
    (empty,) = (line for line in lines if "without weights" in line)
    assert empty.endswith(": theirs-sparsegpt-0.5-unstructured-en")
    wrong = [line.split(": ")[0] for line in lines if "contradicted: 25.0% of its weights were removed, not 50" in line]
    assert wrong == ["theirs-wanda-0.5-unstructured-en", "theirs-wanda-0.5-unstructured-sw"]

    frame = read_frame(out / "frames" / "perplexity.parquet").drop_duplicates(["method", "pattern", "calibration"])
    columns = ["method", "sparsity", "pattern", "calibration", "seed", "propagation"]
    assert {tuple(row) for row in frame[frame["method"] != "dense"][columns].astype(object).to_numpy()} == {
        ("wanda", 0.25, "row", "en", 0, "unknown"),
        ("wanda", 0.25, "row", "sw", 0, "unknown"),
        ("sparsegpt", 0.5, "2:4", "en", 0, "unknown"),
        ("sparsegpt", 0.5, "2:4", "sw", 0, "unknown"),
    }
    contrasts = read_frame(out / "frames" / "contrasts.parquet")
    assert set(contrasts["pattern"]) == {"row", "2:4"}  # calibration languages of one recipe are compared
    aside = json.loads((out / "provenance.json").read_text())["set_aside"]
    assert len(aside) == 4
    assert aside["theirs-wanda-0.5-2to4-sw"] == f"there is none ({collection}/tiny-wanda-0.5-2to4-sw-0)"

    again = prunescope("run", path, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "importing" not in again.stderr


def test_a_pattern_that_the_masks_do_not_have_is_said_and_not_believed(place, collection, tmp_path):
    text = COLLECTION.format(place=collection).replace("0.5", "0.25").replace('["en", "sw"]', '"de"')
    result = prunescope("prune", importing(place, tmp_path / "study.toml", text), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    (said,) = (line for line in result.stderr.splitlines() if "its name is contradicted" in line)
    assert said.startswith("theirs-wanda-0.25-2to4-de: pruned: 25")
    assert "its pattern is not 2:4: 21 of 21 matrices keep more than 2 of some 4 consecutive inputs" in said
    columns = Variant.open(tmp_path / "out" / "variants" / "theirs-wanda-0.25-2to4-de").columns()
    assert (columns["method"], columns["pattern"], columns["calibration"]) == ("wanda", "unknown", "de")


def test_what_a_name_states_never_changes_the_masks(place, collection, tmp_path):
    path = importing(place, tmp_path / "study.toml", COLLECTION.format(place=collection))
    text = '[imported]\nplain = "' + str(collection / "tiny-sparsegpt-0.5-2to4-en-0") + '"\n'
    assert prunescope("prune", path, "--out", tmp_path / "a").returncode == 0
    assert prunescope("prune", importing(place, path, text), "--out", tmp_path / "b").returncode == 0
    one = Variant.open(tmp_path / "a" / "variants" / "theirs-sparsegpt-0.5-2to4-en")
    other = Variant.open(tmp_path / "b" / "variants" / "plain")
    assert one.masks == other.masks
    assert all(torch.equal(one.values[key], other.values[key]) for key in other.values)
    assert one.columns()["bits"] < other.columns()["bits"]  # a mask that is known to be 2:4 is smaller


def test_one_checkpoint_of_another_model_is_set_aside_but_not_a_whole_collection(place, collection, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(collection / "tiny-wanda-0.5-unstructured-en-0", folder / "wanda-en")
    saved(tiny_model(intermediate_size=40), folder / "wanda-sw")
    text = '[imported.x]\ntemplate = "some/{method}-{calibration}"\nmethod = "wanda"\ncalibration = '
    result = prunescope("prune", importing(place, tmp_path / "a.toml", text + '["en", "sw"]'), "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    assert 'set aside: x-wanda-sw: "x-wanda-sw" was not made from this model' in result.stderr
    assert [path.name for path in (tmp_path / "a" / "variants").iterdir()] == ["x-wanda-en"]
    result = prunescope("prune", importing(place, tmp_path / "b.toml", text + '["sw"]'), "--out", tmp_path / "b")
    expect_one_line(result, "wanda-sw", "was not made from this model")


def test_a_recipe_beside_a_checkpoint_has_the_last_word(place, tmp_path):
    model, tokenizer = load_model(str(place / "model"), device="cpu")
    text = CalibrationSet.named("sw", samples=4, length=32)
    made = prune(model, tokenizer, Recipe(method="ria", sparsity=0.25), CORPUS, text)[0]
    made.export(model, tokenizer, tmp_path / "some" / "wanda-sw")
    lines = '[imported.x]\ntemplate = "some/{method}-{calibration}"\nmethod = "wanda"\ncalibration = "sw"\n'
    result = prunescope("prune", importing(place, tmp_path / "a.toml", lines), "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    assert "x-wanda-sw: its name is contradicted: its recipe has method ria, not wanda" in result.stderr
    assert Variant.open(tmp_path / "a" / "variants" / "x-wanda-sw").columns() == made.columns()


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (
            '["zh", "ar"]',
            ("fits nothing", "none of its 2 combinations is a folder", "has tiny-wanda-0.5-unstructured-"),
        ),
        ('"en"', ("no checkpoint can be imported", "it has no weights")),
    ],
)
def test_a_template_that_fits_nothing_is_one_line_that_says_what_to_type(
    place, collection, tmp_path, calibration, words
):
    method = "sparsegpt" if calibration == '"en"' else "wanda"
    text = (
        f'[imported.x]\ntemplate = "{collection}/tiny-{{method}}-0.5-unstructured-{{calibration}}-0"\n'
        f'method = "{method}"\ncalibration = {calibration}\n'
    )
    result = prunescope("prune", importing(place, tmp_path / "a.toml", text), "--out", tmp_path / "out")
    expect_one_line(result, *words)
    assert nothing_was_made(tmp_path / "out")


# The Hub, as its client keeps it


def cached(cache: Path, name: str, checkpoint: Path | None, revision: str = "main", commit: str = "a" * 40) -> Path:
    place = cache / ("models--" + name.replace("/", "--"))
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    snapshot = place / "snapshots" / commit
    if checkpoint is None:
        snapshot.mkdir(parents=True)
    else:
        shutil.copytree(checkpoint, snapshot)
    return snapshot


ON_HUB = (
    '[imported.x]\ntemplate = "somebody/{method}-{calibration}"\nmethod = "wanda"\ncalibration = ["en", "sw", "zh"]\n'
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_offline_the_cache_is_all_there_is(place, collection, tmp_path, cache):
    cached(cache, "somebody/wanda-en", collection / "tiny-wanda-0.5-unstructured-en-0")
    cached(cache, "somebody/wanda-zh", None)
    path = importing(place, tmp_path / "study.toml", ON_HUB)
    result = prunescope("prune", path, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "left out 1 of 3 checkpoints not there: x-wanda-sw" in result.stderr
    assert "left out 1 of 3 checkpoints without weights: x-wanda-zh" in result.stderr
    assert [path.name for path in (tmp_path / "out" / "variants").iterdir()] == ["x-wanda-en"]

    weights = next(cache.rglob("model.safetensors"))
    weights.unlink()  # once imported, a download is not needed again
    weights.with_name("model.safetensors.index.json").write_text("{}")
    assert prunescope("prune", path, "--out", tmp_path / "out").returncode == 0


def test_a_collection_is_read_at_its_revision(place, collection, tmp_path, cache):
    one, other = (collection / f"tiny-{name}-0" for name in ("wanda-0.5-unstructured-en", "sparsegpt-0.5-2to4-en"))
    cached(cache, "somebody/wanda-en", one)
    cached(cache, "somebody/wanda-en", other, "v2", "b" * 40)
    found = {}
    for revision in ("main", "v2"):
        path = importing(place, tmp_path / "study.toml", ON_HUB + f'revision = "{revision}"\n')
        assert prunescope("prune", path, "--out", tmp_path / revision).returncode == 0
        found[revision] = Variant.open(tmp_path / revision / "variants" / "x-wanda-en").masks.sparsity()
    assert found == {"main": pytest.approx(0.25, abs=0.01), "v2": pytest.approx(0.5, abs=0.01)}
    result = prunescope("prune", importing(place, path, ON_HUB + 'revision = "v3"\n'), "--out", tmp_path / "v3")
    expect_one_line(result, 'none of its 3 combinations is a Hub model (revision "v3")', "HF_TOKEN", "HF_HUB_OFFLINE")


def test_on_the_hub_files_are_looked_up_before_any_is_downloaded(place, collection, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import ModelInfo

    files = {"somebody/wanda-en": ["config.json", "model.safetensors"], "somebody/wanda-zh": ["pytorch_model.bin"]}
    asked, downloads = [], []

    def model_info(name, *, revision):
        asked.append((name, revision))
        if name not in files:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        return ModelInfo(id=name, sha="c" * 40, siblings=[{"rfilename": file} for file in files[name]])

    def snapshot_download(name, *, revision, allow_patterns):
        downloads.append((name, revision))
        return str(collection / "tiny-wanda-0.5-unstructured-en-0")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    path = importing(place, tmp_path / "study.toml", ON_HUB + 'revision = "v2"\n')
    result = prunescope("prune", path, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert sorted(asked) == [(f"somebody/wanda-{tag}", "v2") for tag in ("en", "sw", "zh")]
    assert downloads[0] == ("somebody/wanda-en", "c" * 40)  # the very commit that was looked up
    assert "not there: x-wanda-sw" in result.stderr
    assert "pickled weights only, which are never read (convert them to safetensors): x-wanda-zh" in result.stderr
