"""Tasks of the evaluation harness in a study: each model and task is a unit of its own."""

from __future__ import annotations

import pytest
from checkpoints import checkpoint
from command_line import expect_one_line, prunescope
from harness_tasks import sums

from analysis import read_frame
from analysis.study import benchmark, figures
from analysis.study.benchmark import Benchmark

pytest.importorskip("lm_eval")

STUDY = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = []
[[recipes]]
method = "magnitude"
sparsity = [0.5]
[evaluation]
segments = 4
fit_segments = 4
max_length = 40
[tasks]
items = "none"
harness = ["sums_sw", "more_sums_sw"]
folders = ["tasks"]
"""
MODELS = ["dense", "magnitude-0.5-matrix"]
TASKS = ["sums_sw", "more_sums_sw"]


@pytest.fixture(scope="module", autouse=True)
def _quick(tmp_path_factory):
    """No figures, which are drawn elsewhere, and a cache of datasets of our own."""
    import datasets

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "study_figures", lambda *_: iter(()))
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def place(tmp_path):
    checkpoint(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    sums(sums(tmp_path / "tasks"), "more_sums_sw", items=3)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """List the model and the task of every call of the harness."""
    seen = []
    real = benchmark.harness.ask

    def ask(model, tokenizer, tasks, columns, **settings):
        seen.append((columns["method"], columns["sparsity"], *tasks))
        return real(model, tokenizer, tasks, columns, **settings)

    monkeypatch.setattr(benchmark.harness, "ask", ask)
    return seen


def run(place):
    return prunescope("run", place / "study.toml", "--out", place / "out")


def change(place, old, new):
    text = (place / "study.toml").read_text()
    assert old in text
    (place / "study.toml").write_text(text.replace(old, new))


def test_every_model_is_asked_every_task_once(place, asked):
    for _ in range(2):
        result = run(place)
        assert result.returncode == 0, result.stderr
    assert sorted(asked) == sorted(
        (method, sparsity, task) for method, sparsity in (("dense", 0.0), ("magnitude", 0.5)) for task in TASKS
    )
    items = read_frame(place / "out" / "frames" / "items.parquet")
    counts = items[items["metric"] == "correct"].groupby(["method", "task"], observed=True).size()
    assert dict(counts) == {(m, t): n for m in ("dense", "magnitude") for t, n in zip(TASKS, (5, 3), strict=True)}
    assert set(read_frame(place / "out" / "frames" / "accuracy.parquet")["task"]) == set(TASKS)


def test_another_variant_or_task_is_asked_alone(place, asked):
    assert run(place).returncode == 0
    asked.clear()
    change(place, "sparsity = [0.5]", "sparsity = [0.5, 0.3]")
    assert run(place).returncode == 0
    assert sorted(asked) == [("magnitude", 0.3, task) for task in sorted(TASKS)]
    asked.clear()
    sums(place / "tasks", "few_sums_sw", items=2)
    assert run(place).returncode == 0
    assert len(asked) == 6  # what is in the folder may be of use to any task in it
    asked.clear()
    change(place, '"more_sums_sw"]', '"more_sums_sw", "few_sums_sw"]')
    assert run(place).returncode == 0
    assert {task for _, _, task in asked} == {"few_sums_sw"}
    assert len(asked) == 3


def test_a_killed_run_goes_on_with_what_was_not_asked(place, asked, monkeypatch):
    go_on = Benchmark.run

    def killed(self, context, unit, advance):
        if len(asked) == 3:
            raise KeyboardInterrupt
        go_on(self, context, unit, advance)

    with monkeypatch.context() as patching:
        patching.setattr(Benchmark, "run", killed)
        assert run(place).returncode == 130
    assert run(place).returncode == 0
    assert len(asked) == len(set(asked)) == 4


def test_a_task_in_two_groups_counts_once(place):
    for name in ("one", "two"):
        (place / "tasks" / f"{name}.yaml").write_text(f'{{"group": "{name}", "task": ["sums_sw"]}}')
    change(place, '["sums_sw", "more_sums_sw"]', '["one", "two"]')
    assert run(place).returncode == 0
    items = read_frame(place / "out" / "frames" / "items.parquet")
    assert len(items[(items["metric"] == "correct") & (items["method"] == "dense")]) == 5


def test_a_model_larger_than_memory_cannot_be_asked(place):
    result = prunescope("run", place / "study.toml", "--out", place / "out", "--memory", "700MiB")
    expect_one_line(result, "tasks of the evaluation harness need the whole model", "only 700.0 MiB of memory")
    assert not (place / "out" / "variants").exists()
