"""How long pruning and reading take, beside what was planned from trials: one worker, and two.

One thread, and processor time in trials and runs alike, so that a busy machine does not show. The time of two workers
is that of their schedule with the measured times in the places of the planned ones; nothing runs at the same time.
"""

from __future__ import annotations

import time

import torch
from checkpoints import saved
from conftest import tiny_model

from analysis import load_study
from analysis.study.context import Context
from analysis.study.planning import plan_study
from analysis.study.planning.schedule import schedule
from analysis.study.prune import Prune
from analysis.study.read import Read

STUDY = """
model = "model"
languages = ["ar", "de", "en", "es", "sw", "zh"]
[calibration]
sets = ["en", "sw"]
samples = 16
length = 128
[[recipes]]
method = ["wanda", "sparsegpt"]
[[recipes]]
method = "magnitude"
[evaluation]
segments = 14
fit_segments = 10
[tasks]
items = "none"
"""


def test_planned_and_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    saved(tiny_model(**shape, max_position_embeddings=1024), tmp_path / "model", shard="1GB")
    (tmp_path / "study.toml").write_text(STUDY)
    study, out = load_study(tmp_path / "study.toml"), tmp_path / "out"
    plan = plan_study(study, out)
    out.mkdir()
    context = Context(study, out)
    assert context.model.session
    taken = {}
    for stage in (Prune(), Read()):
        for unit in stage.units(context):
            began = time.process_time()
            stage.run(context, unit, lambda work: None)
            taken[unit.title] = time.process_time() - began
    torch.set_num_threads(threads)
    tasks = [task for task, one in zip(plan.tasks, plan.estimates, strict=True) if one.stage in ("prune", "read")]
    assert [task.name for task in tasks] == list(taken)
    with capsys.disabled():
        for task in tasks:
            print(f"\n{task.name}: planned {task.seconds:.2f} s, taken {taken[task.name]:.2f} s", end="")
        for workers in (1, 2):
            planned = schedule(tasks, workers)
            ends: dict[str, float] = {}
            free = [0.0] * workers
            for place in planned.placed:
                start = max([free[place.worker], *(ends[name] for name in place.task.after)])
                ends[place.task.name] = free[place.worker] = start + taken[place.task.name]
            ratio = planned.makespan / max(ends.values())
            print(f"\n{workers} workers: planned {planned.makespan:.1f} s, {ratio:.2f} × the time taken", end="")
            assert ratio > 0
