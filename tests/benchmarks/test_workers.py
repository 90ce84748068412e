"""What two workers of one thread gain over one, pruning and reading, and what a cluster costs with a single worker.

The model is loaded before anything is timed. Wall time, so nothing else should run on the machine: two cores are needed.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved
from conftest import tiny_model
from rich.console import Console

from analysis import load_study
from analysis.study import run
from analysis.study.context import Context
from analysis.study.executors import executor_named
from analysis.study.order import levels
from analysis.study.progress import WorkProgress
from analysis.study.prune import Prune
from analysis.study.read import Read

ray = pytest.importorskip("ray")

STUDY = """
model = "model"
languages = ["ar", "de", "en", "es", "sw", "zh"]
[calibration]
sets = ["ar", "en", "sw", "zh"]
samples = 12
length = 128
[[recipes]]
method = ["wanda", "sparsegpt"]
[evaluation]
segments = 32
fit_segments = 16
[tasks]
items = "none"
"""
STAGES = [Prune(), Read()]


def seconds(place: Path, out: Path, on: str | None) -> dict[str, float]:
    """Return how long pruning and reading take once every worker has the model."""
    out.mkdir()
    taken = {}
    with (
        executor_named(on)(Context(load_study(place / "study.toml"), out)) as executor,
        WorkProgress(1.0, Console(quiet=True)) as progress,
    ):
        executor.ask(partial(run._work, stages=STAGES))
        load_all(executor)
        for level in levels(STAGES):
            began = time.perf_counter()
            for units in run._rounds(executor, level):
                executor.run(level, units, progress)
            taken[level[0].name] = time.perf_counter() - began
        assert not executor.failed
    return taken


def load_all(executor: Any) -> None:
    crew = getattr(executor, "_crew", None)
    if crew is None:
        return
    while not all(worker.ready for worker in crew.workers):
        crew.settle()
    ray.get([worker.actor.ask.remote(lambda context: bool(context.model.session)) for worker in crew.workers])


@pytest.mark.filterwarnings("ignore")
def test_two_workers_beside_one_and_one_beside_this_process(tmp_path, monkeypatch, capsys):
    for name, value in (("RAY_worker_niceness", "0"), ("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    saved(tiny_model(**shape, max_position_embeddings=1024), tmp_path / "model", shard="1GB")
    (tmp_path / "study.toml").write_text(STUDY)
    taken = {"this process": seconds(tmp_path, tmp_path / "here", None)}
    for workers in (1, 2):
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
        )
        taken[f"{workers} worker{'s' * (workers > 1)}"] = seconds(tmp_path, tmp_path / str(workers), "ray")
        ray.shutdown()
    with capsys.disabled():
        for who, of in taken.items():
            print(f"\n{who}: " + ", ".join(f"{stage} {time:.1f} s" for stage, time in of.items()), end="")
        one, two, here = (sum(taken[who].values()) for who in ("1 worker", "2 workers", "this process"))
        print(f"\ntwo workers: {one / two:.2f} × one worker (target: 1.7)", end="")
        print(f"\n--on ray with one worker: {100 * (one / here - 1):+.1f} % (target: at most +5 %)")
    assert all(time > 0 for of in taken.values() for time in of.values())
