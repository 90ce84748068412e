"""The variants of a study: made in waves, gone on with after a kill, and refused in one clear line."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import CORPUS, checkpoint, saved, shards
from command_line import COMMAND, expect_one_line, nothing_was_made, prunescope
from conftest import tiny_model

from analysis import load_study
from analysis.study import model as study_model
from analysis.study.context import Context
from analysis.study.prune import Prune
from pruning import Anatomy, CalibrationSet, Recipe, Remedy, Variant, load_model, prune, runner
from pruning.engine import Workspace
from pruning.files import PARTIAL, file_sha256
from pruning.models.arithmetic import multiplies_with_onednn

STUDY = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = ["en", "sw"]
samples = 6
length = 32
[[recipes]]
method = "wanda"
sparsity = [0.4, 0.5]
[[recipes]]
method = "magnitude"
"""


def study(folder: Path, text: str = STUDY) -> Path:
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def variants(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "variants").rglob("*") if path.is_file()}


def times(out: Path) -> dict[Path, int]:
    """Return when each file of a finished variant was written."""
    files = [path for path in (out / "variants").rglob("*") if path.is_file() and PARTIAL not in str(path)]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    checkpoint(folder / "model")
    study(folder)
    return folder


@pytest.fixture(scope="module")
def finished(place):
    result = prunescope("prune", place / "study.toml", "--out", place / "out")
    assert result.returncode == 0, result.stderr
    return place / "out"


def test_prune_makes_the_variants_and_nothing_else(finished):
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        "provenance.json",
        "records",
        "study.toml",
        "variants",
    }
    names = [f"wanda-{s}-row-pruned-{lang}-s0" for s in ("0.4", "0.5") for lang in ("en", "sw")]
    assert {path.name for path in (finished / "variants").iterdir()} == {"magnitude-0.5-matrix", *names}


def test_how_the_variants_were_made_is_on_record(finished, place):
    record = json.loads((finished / "provenance.json").read_text())
    model, _ = load_model(str(place / "model"), device="cpu")
    assert record["model"] == {"name": str(place / "model"), "fingerprint": Anatomy(model).fingerprint()}
    assert set(record["text"]["calibration"]) == {"en", "sw"}
    assert record["seeds"] == [0]
    assert record["versions"]["prunescope"]
    assert record["machine"]["reading_uses_onednn"] == multiplies_with_onednn(torch.device("cpu"))
    made = {f"variants/{path.name}" for path in (finished / "variants").iterdir()}
    assert set(record["results"]) == {"model"} | made
    for name in made:
        files = record["results"][name]["files"]
        assert set(files) == {str(path.relative_to(finished)) for path in (finished / name).iterdir()}
        assert all(files[file] == file_sha256(finished / file) for file in files)


def test_variants_are_those_that_python_makes(finished, place, tmp_path):
    model, tokenizer = load_model(str(place / "model"), device="cpu")
    sets = [CalibrationSet.named(lang, samples=6, length=32) for lang in ("en", "sw")]
    recipes = [Recipe(method="wanda", sparsity=s) for s in (0.4, 0.5)] + [Recipe(method="magnitude", sparsity=0.5)]
    for variant in prune(model, tokenizer, recipes, CORPUS, sets):
        variant.save(tmp_path / "variants" / variant.id)
    assert variants(tmp_path) == variants(finished)


def test_a_streamed_model_makes_the_same_bytes(finished, place, tmp_path, monkeypatch):
    monkeypatch.setattr(study_model, "_ROOM", 1 << 40)
    result = prunescope("prune", place / "study.toml", "--out", tmp_path, "--memory", "2GiB")
    assert result.returncode == 0, result.stderr
    assert ", one block at a time" in result.stderr
    assert variants(tmp_path) == variants(finished)


def test_a_second_run_does_nothing(finished, place):
    before = times(finished)
    result = prunescope("prune", place / "study.toml", "--out", finished)
    assert result.returncode == 0, result.stderr
    assert "plan" not in result.stderr
    assert times(finished) == before


def test_a_changed_study_makes_only_what_is_new(finished, place, tmp_path):
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    before = times(tmp_path / "out")
    (place / "more.toml").write_text(STUDY.replace("[0.4, 0.5]", "[0.4, 0.6]"))
    result = prunescope("prune", place / "more.toml", "--out", tmp_path / "out")
    assert "plan: 2 variants" in result.stderr
    assert before.items() <= times(tmp_path / "out").items()


def test_an_encoder_decoder_is_pruned_and_exported(tmp_path):
    checkpoint(tmp_path / "model", "mt5")
    result = prunescope("prune", study(tmp_path), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out" / "variants").iterdir())) == 5
    target = tmp_path / "exported"
    result = prunescope("export", tmp_path / "out", target, "--variant", "magnitude-0.5-matrix", "--stream")
    assert result.returncode == 0, result.stderr
    model, _ = load_model(str(target))
    assert Anatomy(model).encoder_decoder
    assert int((Anatomy(model).weight(3, "cross_q") == 0).sum()) == 32 * 32 // 2


# Kills


def cap_for_waves(path: Path, count: int) -> int:
    """Return a memory cap under which a study takes so many waves or more."""
    content, cap = load_study(path), None
    while True:
        plan = Context(content, path.parent / "nothing", cap).variants.pruning.plan
        assert plan is not None
        if len(plan.waves) >= count:
            return plan.memory
        cap = plan.memory - 1


def wave_under_way(out: Path) -> list[str] | None:
    """Return the variants of a wave that has got past a block, once another wave is finished."""
    done = {
        path.parent.name for path in out.glob("variants/sparsegpt-*/recipe.json") if PARTIAL not in path.parent.name
    }
    for position in out.glob("scratch/*/position.json"):
        try:
            wave = json.loads((position.parent / "work.json").read_text())["jobs"]
        except FileNotFoundError:  # finished at this very moment
            continue
        if done and wave[0].startswith("sparsegpt") and done.isdisjoint(wave):
            return wave
    return None


def test_a_run_that_is_killed_in_a_wave_goes_on_from_there(tmp_path):
    text = STUDY.replace("samples = 6", "samples = 48").replace("[0.4, 0.5]", "[0.3, 0.4, 0.5, 0.6]")
    text = text.replace('method = "wanda"', 'method = "sparsegpt"')
    checkpoint(tmp_path / "model", num_hidden_layers=8)
    path = study(tmp_path, text)
    cap = cap_for_waves(path, 3)  # one of them for magnitude, and one for each language
    assert prunescope("prune", path, "--out", tmp_path / "whole").returncode == 0

    out = tmp_path / "killed"
    command = [*COMMAND, "prune", str(path), "--out", str(out), "--memory", str(cap)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        begun = None
        try:
            while process.poll() is None and begun is None:
                begun = wave_under_way(out)
                time.sleep(0.002)
        finally:
            process.kill()
        _, errors = process.communicate()
    assert begun is not None, errors.decode()
    before = times(out)
    assert 0 < len(before) < len(variants(tmp_path / "whole"))

    resumed, swept = [], []
    resume, sweep = Workspace.resumed, runner.sweep

    def noted_resume(self):
        found = resume(self)
        resumed.append(found and found[0])
        return found

    def noted_sweep(anatomy, wave, *arguments, **named):
        swept.append([job.id for job in wave])
        return sweep(anatomy, wave, *arguments, **named)

    with patch.object(Workspace, "resumed", noted_resume), patch.object(runner, "sweep", noted_sweep):
        result = prunescope("prune", path, "--out", out, "--memory", cap)
    assert result.returncode == 0, result.stderr
    assert swept[0] == begun
    assert resumed[0] is not None
    assert resumed[0] > 0
    assert not any(resumed[1:])
    assert before.items() <= times(out).items()
    assert variants(out) == variants(tmp_path / "whole")
    assert not (out / "scratch").exists()


def test_a_run_that_is_killed_while_it_saves_goes_on_from_there(place, finished, tmp_path, monkeypatch):
    from pruning.engine import workspace

    monkeypatch.setattr(workspace, "CHECKPOINT_SECONDS", 0)
    put, placed = runner.put_in_place, []

    def killed(folder, place):
        if len(placed) == 3:
            raise KeyboardInterrupt
        placed.append(place)
        put(folder, place)

    with patch.object(runner, "put_in_place", killed):
        result = prunescope("prune", place / "study.toml", "--out", tmp_path)
    assert result.returncode == 130
    assert "run the same command again" in result.stderr
    before = times(tmp_path)
    work = []
    carry_out = Prune.run

    def noted(self, context, unit, advance):
        carry_out(self, context, unit, lambda amount: (work.append(amount), advance(amount)))

    with patch.object(Prune, "run", noted):
        assert prunescope("prune", place / "study.toml", "--out", tmp_path).returncode == 0
    assert len(work) == 1  # the killed run had done it all
    assert before.items() <= times(tmp_path).items()
    assert variants(tmp_path) == variants(finished)


def test_what_other_waves_left_is_tidied_away(place, tmp_path):
    scratch = tmp_path / "scratch"
    for name, content in {
        "0123456789abcdef": '{"format": "prunescope-workspace-1", "jobs": ["wanda-0.4-row-pruned-en-s0"]}',
        "a": '{"format": "prunescope-workspace-1", "jobs": ["of another study"]}',
        "b": "{",
        "c": "[[1]]",
        "d": '{"format": "prunescope-workspace-1", "jobs": [1]}',
        "mine": "{}",
    }.items():
        (scratch / name).mkdir(parents=True)
        (scratch / name / "work.json").write_text(content)
    (scratch / "mine" / "thesis.tex").write_text("precious")
    result = prunescope("prune", place / "study.toml", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path for path in scratch.rglob("*") if path.is_file()] == [scratch / "mine" / "thesis.tex"]


# Models that were pruned elsewhere


@pytest.fixture(scope="module")
def elsewhere(place):
    """Beside the model: an export of ours, another tool's checkpoint, and those that must be refused."""
    model, tokenizer = load_model(str(place / "model"), device="cpu")
    recipe = Recipe(method="sparsegpt", sparsity=0.25)
    made = prune(model, tokenizer, recipe, CORPUS, CalibrationSet.named("sw", samples=6, length=32))[0]
    made.export(model, tokenizer, place / "ours")
    Variant.open(place / "out" / "variants" / "wanda-0.4-row-pruned-en-s0").export(model, tokenizer, place / "clash")
    saved(tiny_model(intermediate_size=40), place / "other")
    theirs = tiny_model()
    prune(theirs, tokenizer, Recipe(method="wanda", sparsity=0.25), CORPUS, CalibrationSet.named("sw", samples=4))[
        0
    ].apply(theirs)
    saved(theirs, place / "theirs")
    return place


def importing(folder: Path, *lines: str) -> Path:
    path = folder / "importing.toml"
    path.write_text(STUDY + "[imported]\n" + "\n".join(lines))
    return path


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_models_pruned_elsewhere_join_the_variants(finished, elsewhere, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(study_model, "_ROOM", 1 << 40 if stream else 0)
    path = importing(elsewhere, 'mine = "ours"', '"theirs-0.25" = "theirs"')
    result = prunescope("prune", path, "--out", tmp_path, "--memory", "2GiB")
    assert result.returncode == 0, result.stderr
    columns = {name: Variant.open(tmp_path / "variants" / name).columns() for name in ("mine", "theirs-0.25")}
    assert columns["mine"]["method"] == "sparsegpt"
    assert columns["mine"]["calibration"] == "sw"
    assert columns["theirs-0.25"]["method"] == "theirs-0.25"
    assert columns["theirs-0.25"]["pattern"] == "unknown"
    assert {c["model"] for c in columns.values()} == {str(elsewhere / "model")}
    before = times(tmp_path)
    assert prunescope("prune", path, "--out", tmp_path).returncode == 0
    assert times(tmp_path) == before


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['a = "clash"'], ('"a" has the same recipe as "wanda-0.4-row-pruned-en-s0"', "leave one of them out")),
        (['a = "ours"', 'b = "ours"'], ("have the same recipe",)),
        (['a = "model"'], ("is not pruned",)),
        (['a = "other"'], ("was not made from this model",)),
        (['a = "nowhere"'], ('cannot load model "nowhere"',)),
        (['dense = "theirs"'], ('"dense" is already the name of a method or another model',)),
        (['wanda = "theirs"'], ('"wanda" is already the name of a method',)),
        (['"wanda-0.4-row-pruned-en-s0" = "theirs"'], ("rename it",)),
        (['".." = "theirs"'], ('".." is not a valid name',)),
        (['"a/b" = "theirs"'], ('"a/b" is not a valid name',)),
    ],
)
def test_models_that_cannot_be_taken_over_are_one_line(finished, elsewhere, tmp_path, lines, words):
    result = prunescope("prune", importing(elsewhere, *lines), "--out", tmp_path / "out")
    expect_one_line(result, *words)
    assert not list(tmp_path.rglob("wanda-*"))  # refused before anything expensive


# Mistakes


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('method = "wanda"\npattern = "2:4"', ('pattern "2:4"', "groups of 4", "role down", "50")),
        ('method = "wanda"\nroles = ["shared_up"]', ('no projection "shared_up"', "q k v o gate up down")),
        ('method = "wanda"\nroles = ["gates"]', ('unknown role "gates"', 'did you mean "gate"')),
        ('method = "wanda"\nblocks = "3:"', ('"3:"', "0 to 2")),
        ('method = "wanda"\nblocks = "first"', ('invalid blocks "first"; write "0:4"',)),
        ('method = "ria"\nparameters = { powr = 0.7 }', ('no parameter "powr"', 'did you mean "power"')),
        ('method = "ria"\nparameters = { power = 9 }', ("power = 9 is not between 0 and 4",)),
        ('method = "ria"\nparameters = { power = "strong" }', ("parameters.power", "valid number")),
        (
            'method = "wanda"\npattern = "2:4"\nallocation = "owl"',
            ('pattern "2:4" fixes the sparsity', 'allocation "owl"'),
        ),
        ('method = "wanda"\npattern = "4:2"', ('pattern "4:2"', "0 < n < m")),
        ('method = "wanda"\npattern = "2:4"\nsparsity = 0.3', ("removes 0.5", "omit sparsity")),
        ('method = "wanda"\nsparsity = 0.01\nallocation = "owl"', ("lower the spread",)),
    ],
)
def test_recipes_that_do_not_fit_are_one_line(tmp_path, recipe, words):
    checkpoint(tmp_path / "model", intermediate_size=50)
    text = STUDY.split("[[recipes]]")[0] + "[[recipes]]\n" + recipe
    expect_one_line(prunescope("prune", study(tmp_path, text), "--out", tmp_path / "out"), *words)
    assert nothing_was_made(tmp_path / "out")


def test_a_diagnosis_is_followed_if_it_is_of_this_model(tmp_path):
    model, _ = load_model(str(checkpoint(tmp_path / "model")), device="cpu")
    anatomy = Anatomy(model)
    remedy = Remedy(
        model_fingerprint=anatomy.fingerprint(),
        variant="wanda-0.5-row-pruned-en-s0",
        language="sw",
        category="reasoning",
        fitted_on="half of the items",
        importance={f"{layer}.{role}": float(role == "down") for layer, role in anatomy},
    )
    text = STUDY.split("[[recipes]]")[0] + (
        '[[recipes]]\nmethod = "magnitude"\nallocation = ["uniform", "diagnosis"]\ndiagnosis = "remedy.json"\n'
    )
    remedy.save(tmp_path / "remedy.json")
    result = prunescope("prune", study(tmp_path, text), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    even, spared = (Variant.open(path) for path in sorted((tmp_path / "out" / "variants").iterdir()))
    assert spared.id.startswith("magnitude-0.5-matrix-diagnosis=")
    assert spared.masks.kept() == even.masks.kept()
    assert all((spared.masks.kept(key) > even.masks.kept(key)) == (key[1] == "down") for key in anatomy)
    assert load_study(tmp_path / "out" / "study.toml").jobs() == load_study(tmp_path / "study.toml").jobs()

    remedy.model_copy(update={"model_fingerprint": "4f"}).save(tmp_path / "remedy.json")
    result = prunescope("prune", study(tmp_path, text), "--out", tmp_path / "other")
    expect_one_line(result, str(tmp_path / "remedy.json"), "a diagnosis of a model other than")
    assert nothing_was_made(tmp_path / "other")

    remedy.model_copy(update={"importance": {"0.q": 1.0, "0.k": 2.0}}).save(tmp_path / "remedy.json")
    result = prunescope("prune", study(tmp_path, text), "--out", tmp_path / "other")
    expect_one_line(result, 'importance lacks "0.v" and 18 more')
    assert nothing_was_made(tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "where", "words"),
    [
        ("gpt2", 'roles = ["gate"]', 'this gpt2 model has no projection "gate"; it has q k v o up down'),
        (
            "qwen2_moe",
            'roles = ["shared_up"]\nblocks = "0"',
            'blocks "0" of this model have no projection shared_up',
        ),
    ],
    ids=["a model without gates", "a block without experts"],
)
def test_roles_that_a_model_or_its_blocks_lack_are_one_line(tmp_path, kind, where, words):
    checkpoint(tmp_path / "model", kind)
    text = STUDY.replace('method = "magnitude"', 'method = "magnitude"\n' + where)
    expect_one_line(prunescope("prune", study(tmp_path, text), "--out", tmp_path / "out"), words)
    assert nothing_was_made(tmp_path / "out")


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ("lots", ('--memory "lots"', "6GiB")),
        ("6 GiBs", ("is not an amount of memory",)),
        ("-1", ("is not an amount of memory",)),
        ("", ("is not an amount of memory",)),
        ("100MB", ("0.09 GiB cannot hold one block", "0.69 GiB")),
        ("0", ("0.00 GiB cannot hold one block",)),
    ],
)
def test_memory_caps_that_cannot_be_are_one_line(place, tmp_path, memory, words):
    result = prunescope("prune", place / "study.toml", "--out", tmp_path / "out", "--memory", memory)
    expect_one_line(result, *words)
    assert nothing_was_made(tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("samples = 6", "samples = 0", ("calibration.samples", "greater than or equal to 1")),
        ("length = 32", "length = 1000000", ("1000000 tokens", "lower samples or length")),
        ('"en", "sw"]\nsamples', '"en", "ko"]\nsamples', ("Korean",)),
    ],
)
def test_text_that_cannot_be_is_one_line(place, tmp_path, old, new, words):
    path = tmp_path / "study.toml"
    path.write_text(STUDY.replace(old, new, 1).replace('"model"', f'"{place / "model"}"', 1))
    expect_one_line(prunescope("prune", path, "--out", tmp_path / "out"), *words)
    assert nothing_was_made(tmp_path / "out")


def test_fine_tuning_on_held_out_text_is_one_line(place, tmp_path):
    for language in ("en", "sw"):
        lines = [f"Sentence number {number} in {language}, which is long enough." for number in range(40)]
        (tmp_path / f"{language}.txt").write_text("\n".join(lines))
        (tmp_path / f"held-{language}.txt").write_text(f"Held out.\n{lines[7] if language == 'sw' else 'This too.'}")
    text = STUDY.replace('"model"', f'"{place / "model"}"', 1)
    text += 'recover = "lora"\nparameters = { steps = 2 }\n[text]\ncalibration = "file:{lang}.txt"\n'
    path = study(tmp_path, text + 'heldout = "file:held-{lang}.txt"')
    result = prunescope("prune", path, "--out", tmp_path / "out")
    expect_one_line(result, "held-out text in Swahili", 'segment "8" holds held-out segment "2"', "leave such segments")
    assert nothing_was_made(tmp_path / "out")


@pytest.mark.parametrize("memory", [(), ("--memory", "2GiB")], ids=["whole", "capped"])
def test_missing_shards_are_one_line(tmp_path, memory):
    checkpoint(tmp_path / "model")
    shards(tmp_path / "model")[3].unlink()
    result = prunescope("prune", study(tmp_path), "--out", tmp_path / "out", *memory)
    expect_one_line(result, "lacks 1 of its 7 shards (model-00004-of-00007.safetensors)", "download")
    assert nothing_was_made(tmp_path / "out")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_nan_weights_are_one_line_that_says_where(tmp_path, monkeypatch, method, stream):
    monkeypatch.setattr(study_model, "_ROOM", 1 << 40 if stream else 0)
    model = tiny_model()
    with torch.no_grad():
        Anatomy(model).weight(1, "up")[3, 4] = torch.nan
    saved(model, tmp_path / "model")
    text = STUDY.split("[[recipes]]")[0] + f'[[recipes]]\nmethod = "{method}"'
    result = prunescope("prune", study(tmp_path, text), "--out", tmp_path / "out", "--memory", "2GiB")
    expect_one_line(result, "block 1, role", "NaN or infinite")
    assert nothing_was_made(tmp_path / "out")


def test_a_variant_that_cannot_be_made_is_named_and_the_others_are_made(place, finished, tmp_path):
    text = STUDY.replace('"model"', f'"{place / "model"}"', 1)
    text += '[[recipes]]\nmethod = "wanda"\nsparsity = 0.01\nallocation = "owl"'
    for _ in range(2):
        result = prunescope("prune", study(tmp_path, text), "--out", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        for language in ("en", "sw"):
            assert f"set aside: wanda-0.01-row-owl-pruned-{language}-s0: sparsity 0.01 with a spread" in result.stderr
        assert variants(tmp_path / "out") == variants(finished)
        record = json.loads((tmp_path / "out" / "provenance.json").read_text())
        assert len(record["set_aside"]) == 2
    assert "plan" not in result.stderr  # what would end so again is not tried again


def test_derivatives_take_the_whole_model_into_memory(tmp_path):
    checkpoint(tmp_path / "model")
    text = STUDY.replace('method = "magnitude"', 'method = "snip"')
    path = study(tmp_path, text)
    result = prunescope("prune", path, "--out", tmp_path / "out", "--memory", "2GiB")
    assert result.returncode == 0, result.stderr
    assert "a block at a time" not in result.stderr
    assert len(list((tmp_path / "out" / "variants").glob("snip-*"))) == 2
