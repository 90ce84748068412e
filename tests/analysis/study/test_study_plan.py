"""What a study will cost: what is counted, by which arithmetic, and that nothing is written to find out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from checkpoints import checkpoint, saved, shards
from command_line import expect_one_line, prunescope
from conftest import tiny_model, tiny_tokenizer
from transformers import AutoConfig

from analysis import load_study
from analysis.study import figures
from analysis.study.context import Context
from analysis.study.planning import Figures, plan_study
from analysis.study.planning.estimates import by_stage
from analysis.study.planning.tables import duration
from analysis.study.prune import Prune
from analysis.study.read import Read
from pruning.engine.plan import _Needs
from pruning.methods import known_methods, method_named

#: So much bandwidth that nothing but computing takes time, and the other way round.
COMPUTING, MOVING = Figures(1e-6, 1e15), Figures(1e15, 1e-3)
SMALL = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = ["en"]
samples = 6
length = 32
[[recipes]]
method = "wanda"
[evaluation]
segments = 8
fit_segments = 6
max_length = 40
[tasks]
items = "none"
"""


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(figures, "study_figures", lambda *_: iter(()))


def small(folder: Path, text: str = SMALL, **settings: object) -> Path:
    saved(tiny_model(**settings), folder / "model")
    (folder / "study.toml").write_text(text)
    return folder


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def rows(output: str) -> dict[str, list[str]]:
    """Return the cells of a printed table's rows, by the first one."""
    lines = [re.split(r" {2,}", line.strip()) for line in output.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 2}


def test_a_plan_counts_every_stage_and_writes_nothing(place):
    before = files(place)
    result = prunescope("plan", place / "study.toml", "--out", place / "none")
    assert result.returncode == 0, result.stderr
    assert files(place) == before
    assert not (place / "none").exists()
    table = rows(result.stdout)
    assert list(table) == ["Stage", "prune", "read", "frames", "figures", "tables", "report", "total"]
    assert table["prune"][:2] == ["2", "5 variants"]  # magnitude needs no text: a wave of its own
    assert table["read"][1] == "6 models in 3 languages: text, questions, subspaces"
    assert table["frames"][1] == "19 frames"
    assert table["figures"][1] == "listed once there are frames"
    for stage in ("frames", "figures", "tables", "report"):
        assert table[stage][-1].endswith("*")
    assert f"Next: prunescope run {place / 'study.toml'} --out {place / 'none'}\n" in result.stdout


def test_what_is_finished_is_not_counted(place):
    study, out = place / "study.toml", place / "out"
    assert prunescope("prune", study, "--out", out).returncode == 0
    before = files(out)
    table = rows(prunescope("plan", study, "--out", out).stdout)
    assert files(out) == before
    assert "prune" not in table
    assert table["read"][1] == "6 models in 3 languages: text, questions, subspaces"
    shutil.rmtree(out / "variants" / "magnitude-0.3-matrix")
    assert rows(prunescope("plan", study, "--out", out).stdout)["prune"][:2] == ["1", "1 variant"]
    assert prunescope("run", study, "--out", out).returncode == 0
    before = files(out)
    finished = prunescope("plan", study, "--out", out, "--workers", "2")
    assert f"Nothing is left to do: {out / 'report.html'} is up to date" in finished.stdout
    assert files(out) == before
    (out / "frames" / "accuracy.parquet").unlink()
    table = rows(prunescope("plan", study, "--out", out).stdout)
    assert table["frames"][:2] == ["1", "2 frames"]  # items and accuracy, from one analysis
    assert "read" not in table


def test_computing_is_counted_as_written_down_by_hand(tmp_path):
    study = load_study(small(tmp_path) / "study.toml")
    found = by_stage(plan_study(study, tmp_path / "out", figures=COMPUTING).estimates)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
    # Six sequences pass the first block twice, before and after it is pruned, so the second; the last one once.
    passes = 6 * 32 * (2 + 2 + 1) * 1.2
    (wave,) = found["prune"]
    assert wave.seconds == pytest.approx(2 * passes * block / 1e6, rel=1e-6)
    corpus, tokenizer = study.text.corpus(), tiny_tokenizer()

    def tokens(segments):
        return sum(len(tokenizer(s.text, truncation=True, max_length=40)["input_ids"]) for s in segments)

    heldout = sum(tokens(corpus.take("heldout", language, 8)) for language in ("en", "sw"))
    fitting = sum(map(tokens, corpus.aligned("parallel", ("en", "sw"), 6).values()))
    products = 2 * heldout * (3 * block + 300 * 32) + fitting * 3 * block
    assert sum(one.seconds for one in found["read"]) == pytest.approx(2 * 1.15 * products / 1e6, rel=1e-6)
    faster = plan_study(study, tmp_path / "out", figures=Figures(2e-6, 1e15))
    slower = plan_study(study, tmp_path / "out", figures=COMPUTING)
    assert faster.seconds == pytest.approx(slower.seconds / 2)


def test_moving_weights_is_counted_as_written_down_by_hand(tmp_path):
    study = load_study(small(tmp_path) / "study.toml")
    model = tiny_model()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    masks = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) / 8
    plan = plan_study(study, tmp_path / "out", figures=MOVING)
    found = by_stage(plan.estimates)
    assert plan.loading == pytest.approx(weights / 1e6)
    assert found["prune"][0].seconds == pytest.approx(masks / 1e6, rel=1e-3)
    assert found["read"][0].seconds == pytest.approx(masks / 1e6, rel=1e-3)


def test_an_8b_model_is_planned_from_its_configuration(tmp_path):
    """Llama-3-8B has 8,030,261,248 parameters."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128_256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16"}
    AutoConfig.for_model("llama", **shape, **heads).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "study.toml").write_text(SMALL)
    study = load_study(tmp_path / "study.toml")
    on_gpu = plan_study(study, tmp_path / "out", figures=MOVING, device_memory=80 << 30)
    assert on_gpu.loading == pytest.approx(2 * 8_030_261_248 / 1e6)
    weights = [one.device_memory for one in on_gpu.estimates if one.stage in ("prune", "read")]
    assert all(2 * 8_030_261_248 < memory < 80 << 30 for memory in weights)
    streamed = plan_study(study, tmp_path / "out", figures=MOVING, memory=20 << 30)  # on a CPU, in float32
    assert streamed.loading == 0
    for one in streamed.estimates:
        if one.stage in ("prune", "read"):  # each unit reads all weights
            assert one.seconds > 4 * 8_030_261_248 / 1e6
            assert one.memory < 20 << 30


def test_with_figures_neither_weights_nor_a_gpu_need_be_there(tmp_path):
    study = small(tmp_path) / "study.toml"
    given = ("--tflops", "100", "--bandwidth", "2")
    whole = prunescope("plan", study, "--out", tmp_path / "out", *given)
    for path in shards(tmp_path / "model"):
        path.unlink()
    without = prunescope("plan", study, "--out", tmp_path / "out", *given)
    assert without.returncode == 0, without.stderr
    assert without.stdout == whole.stdout
    expect_one_line(prunescope("plan", study, "--out", tmp_path / "out"), "shard")
    on_gpu = prunescope("plan", study, "--out", tmp_path / "out", *given, "--device-memory", "10GiB")
    assert "On the device" in on_gpu.stdout
    assert "On the device" not in without.stdout
    assert on_gpu.stdout.rstrip().endswith("--device-memory 10GiB")
    too_little = prunescope("plan", study, "--out", tmp_path / "out", *given, "--device-memory", "100MiB")
    expect_one_line(too_little, "memory", "cannot hold")


def test_times_of_a_trial_are_those_of_the_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(_Needs, "seconds_to_load_and_choose", lambda self: (1.0, 0.0))
    monkeypatch.setattr(_Needs, "seconds_a_token", lambda self: 10.0)
    plan = plan_study(load_study(small(tmp_path) / "study.toml"), tmp_path / "out")
    found = by_stage(plan.estimates)
    assert found["prune"][0].seconds == pytest.approx(3 * (1.0 + 10 * 6 * 32 * 5 / 3 * 1.2))
    assert all(one.seconds > 0 for one in found["read"])
    assert plan.loading > 0
    measured = sum(one.seconds for one in plan.estimates if not one.share)
    assert plan.seconds - plan.loading == pytest.approx(measured / (1 - 0.04 - 0.04 - 0.003 - 0.005))


def test_disk_is_that_of_the_files(tmp_path):
    study = load_study(small(tmp_path, hidden_size=128, intermediate_size=512) / "study.toml")
    found = by_stage(plan_study(study, tmp_path / "out").estimates)
    (tmp_path / "out").mkdir()
    context = Context(study, tmp_path / "out")
    for stage, folder in ((Prune(), "variants"), (Read(), "readings")):
        for unit in stage.units(context):
            stage.run(context, unit, lambda work: None)
        taken = sum(path.stat().st_size for path in (tmp_path / "out" / folder).rglob("*") if path.is_file())
        assert sum(one.kept for one in found[stage.name]) == pytest.approx(taken, rel=0.15)


def test_readings_wait_for_their_variants_and_frames_for_readings(place):
    plan = plan_study(load_study(place / "study.toml"), place / "none", figures=Figures(1.0, 1.0))
    stages = {task.name: one.stage for task, one in zip(plan.tasks, plan.estimates, strict=True)}
    named = {stage: {name for name, own in stages.items() if own == stage} for stage in stages.values()}
    for task in plan.tasks:
        expected = {
            "prune": set(),
            "read": named["prune"],
            "frames": named["prune"] | named["read"],
            "figures": named["prune"] | named["read"] | named["frames"],
            "tables": named["prune"] | named["read"] | named["frames"],
            "report": stages.keys() - named["report"],
        }[stages[task.name]]
        assert task.after == expected


def test_a_schedule_is_shown_for_numbers_of_workers(place):
    result = prunescope(
        "plan", place / "study.toml", "--out", place / "none", "--tflops", "1e-6", "--bandwidth", "1", "--workers", "6"
    )
    table = rows(result.stdout)
    assert [count for count in table if count.isdigit()] == ["1", "2", "4", "6"]
    assert table["1"][1] == "100%"
    assert table["1"][0] == table["total"][-1]
    assert "The longest path takes" in result.stdout
    assert "Assumed:" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tflops", "100"], ["--bandwidth is missing"]),
        (["--bandwidth", "2"], ["--tflops is missing"]),
        (["--tflops", "0", "--bandwidth", "2"], ["--tflops 0 must be a number above zero"]),
        (["--tflops", "nan", "--bandwidth", "2"], ["--tflops nan must be a number above zero"]),
        (["--memory", "much"], ["--memory", "6GiB"]),
    ],
)
def test_mistakes_are_answered_in_one_line(place, options, words):
    expect_one_line(prunescope("plan", place / "study.toml", "--out", place / "none", *options), *words)


def test_a_file_in_place_of_the_folder_is_refused(place):
    expect_one_line(prunescope("plan", place / "study.toml", "--out", place / "study.toml"), "is a file", "--out")


def test_results_of_an_unknown_model_are_not_taken_for_finished(tmp_path):
    study = small(tmp_path, 'device = "cpu"\n' + SMALL) / "study.toml"
    assert prunescope("prune", study, "--out", tmp_path / "out").returncode == 0
    known = plan_study(load_study(study), tmp_path / "out", figures=Figures(1.0, 1.0))
    assert "prune" not in by_stage(known.estimates)
    assert not known.remarks
    (tmp_path / "model" / "config.json").touch()  # it may be another model now
    unknown = plan_study(load_study(study), tmp_path / "out", figures=Figures(1.0, 1.0))
    assert "prune" in by_stage(unknown.estimates)
    assert "all units are counted" in unknown.remarks[0]


@pytest.mark.parametrize("kind", ["qwen2_moe", "mt5", "bloom"])
def test_other_architectures_can_be_planned_for_without_weights(tmp_path, kind):
    checkpoint(tmp_path / "model", kind)
    (tmp_path / "study.toml").write_text(SMALL)
    study = load_study(tmp_path / "study.toml")
    of_trial = plan_study(study, tmp_path / "out")
    of_figures = plan_study(study, tmp_path / "out", figures=COMPUTING)
    for one, other in zip(of_trial.estimates, of_figures.estimates, strict=True):
        assert (one.stage, one.results, one.kept) == (other.stage, other.results, other.kept)
        assert one.memory == other.memory


def test_every_method_and_allocation_can_be_planned_for_without_weights(tmp_path):
    quantizing = [name for name in known_methods() if method_named(name).quantize]
    pruning = [name for name in known_methods() if name not in quantizing]
    more = f"""
[[recipes]]
method = {pruning}
sparsity = 0.5
[[recipes]]
method = "wanda"
sparsity = 0.5
allocation = ["owl", "alpha", "cross-lingual"]
[[recipes]]
method = "wanda"
sparsity = 0.5
recover = ["lora", "fine-tune"]
[[recipes]]
method = {quantizing}
bits = 4
group = 8
"""
    study = small(tmp_path, SMALL.replace('[[recipes]]\nmethod = "wanda"\n', more)) / "study.toml"
    for path in shards(tmp_path / "model"):
        path.unlink()
    plan = plan_study(load_study(study), tmp_path / "out", figures=COMPUTING)
    made = [name for one in plan.estimates if one.stage == "prune" for name in one.results]
    assert len(made) == len(pruning) + 3 + 2 + len(quantizing)


def test_times_are_said_in_words():
    assert [duration(seconds) for seconds in (0.0, 59.7, 89.0, 3600.0, 7260.0, 500_000.0)] == [
        "under 1 s",
        "60 s",
        "89 s",
        "60 min",
        "2 h 01 min",
        "5 d 18 h",
    ]
