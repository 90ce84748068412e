"""A study on the workers of a Ray cluster: two nodes of one core each, on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import saved
from command_line import expect_one_line, nothing_was_made, prunescope
from conftest import tiny_model

from analysis.study import executors
from analysis.study import run as study_run
from analysis.study.executors import slots
from analysis.study.executors.slots import Node, places
from pruning.files import PARTIAL

ray = pytest.importorskip("ray")
# Ray itself leaves files open and warns of its future.
pytestmark = pytest.mark.filterwarnings("ignore")

GIB = 1 << 30
SMALL = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = ["en", "sw"]
samples = 6
length = 32
[[recipes]]
method = ["wanda", "sparsegpt"]
[evaluation]
segments = 8
fit_segments = 6
max_length = 40
[tasks]
items = "none"
"""
RESULTS = ("variants", "readings", "frames")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a study and, in ``one``, its results from one process of one thread."""
    folder = tmp_path_factory.mktemp("cluster")
    saved(tiny_model(max_position_embeddings=1024), folder / "model", shard="1GB")
    (folder / "study.toml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_run, "_REPORTING", ())
        assert prunescope("run", folder / "study.toml", "--out", folder / "one").returncode == 0
    return folder


@pytest.fixture(scope="module")
def cluster() -> Any:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_worker_niceness", "0"), ("OMP_NUM_THREADS", "1")):
            patch.setenv(name, value)
        started = Cluster(initialize_head=True, head_node_args=_node(include_dashboard=False))
        started.add_node(**_node())
        yield started
        started.shutdown()


@pytest.fixture(autouse=True)
def _measuring_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out figures and page, which would take most of the time, and give workers one thread each."""
    monkeypatch.setattr(study_run, "_REPORTING", ())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _node(**more: Any) -> dict[str, Any]:
    return {"num_cpus": 1, "memory": 2 * GIB, "object_store_memory": 80 << 20, **more}


def results(folder: Path) -> dict[str, bytes]:
    files = [path for part in RESULTS for path in sorted((folder / part).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wrapped(stage: Any, before: Any = None, advancing: Any = None) -> Any:
    """Return a stage that calls something before each unit, and whenever a unit advances.

    Its class is local, so that it is sent to workers as code: they cannot import this file.
    """

    class Wrapped:
        name = stage.name

        def units(self, context: Any) -> Any:
            return stage.units(context)

        def run(self, context: Any, unit: Any, advance: Any) -> None:
            if before is not None:
                before(unit)

            def advanced(work: float) -> None:
                advance(work)
                if advancing is not None:
                    advancing(unit)

            stage.run(context, unit, advanced)

    return Wrapped()


def measuring(monkeypatch: pytest.MonkeyPatch, **instead: Any) -> None:
    """Replace some of the stages, by name."""
    stages = tuple(instead.get(stage.name, stage) for stage in study_run._MEASURING)
    monkeypatch.setattr(study_run, "_MEASURING", stages)


def stage_named(name: str) -> Any:
    return next(stage for stage in study_run._MEASURING if stage.name == name)


def meeting(folder: Path, nodes: int) -> Any:
    """Return what waits until units run on so many nodes."""
    folder.mkdir()

    def meet(unit: Any) -> None:
        import time

        import ray

        (folder / ray.get_runtime_context().get_node_id()).touch()
        until = time.monotonic() + 120
        while len(list(folder.iterdir())) < nodes:
            assert time.monotonic() < until, "the others did not come"
            time.sleep(0.05)

    return meet


def killing(marker: Path) -> Any:
    """Return what kills its own process the second time that any unit advances, once."""
    calls: list[int] = []

    def kill(unit: Any) -> None:
        calls.append(1)
        if len(calls) == 2 and not marker.exists():
            marker.write_text(unit.title)
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def test_two_nodes_make_the_results_of_one_process(place, cluster, monkeypatch, tmp_path):
    measuring(monkeypatch, prune=wrapped(stage_named("prune"), before=meeting(tmp_path / "met", 2)))
    out = tmp_path / "out"
    result = prunescope("run", place / "study.toml", "--out", out, "--on", f"ray:{cluster.address}")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "met").iterdir())) == 2
    assert results(out) == results(place / "one")
    assert not list(out.rglob("*" + PARTIAL))
    record = json.loads((out / "provenance.json").read_text())
    assert record["results"].keys() == json.loads((place / "one" / "provenance.json").read_text())["results"].keys()
    assert len({worker["node"] for worker in record["workers"]}) == 2
    assert {worker["threads"] for worker in record["workers"]} == {1}
    assert "pruning" in result.stderr
    assert result.stderr.count("pruning plan:") == 1
    lines = result.stderr.splitlines()
    assert sum("] pruning 2 variants" in line for line in lines) == 2, "one wave for each node"


@pytest.mark.full
def test_workers_killed_while_they_prune_and_read_cost_their_units_only(place, cluster, monkeypatch, tmp_path):
    markers = [tmp_path / "pruning", tmp_path / "reading"]
    measuring(
        monkeypatch,
        prune=wrapped(stage_named("prune"), advancing=killing(markers[0])),
        read=wrapped(stage_named("read"), advancing=killing(markers[1])),
    )
    out = tmp_path / "out"
    result = prunescope("run", place / "study.toml", "--out", out, "--on", f"ray:{cluster.address}")
    assert result.returncode == 0, result.stderr
    assert [marker.read_text().split()[0] for marker in markers] == ["pruning", "reading"]
    assert results(out) == results(place / "one")
    assert not (out / "scratch").exists()
    assert not list((out / "logs").glob("*"))


@pytest.mark.full
def test_a_lost_node_costs_its_unit_only(place, cluster, monkeypatch, tmp_path):
    (node,), marker = cluster.worker_nodes, tmp_path / "lost"
    doomed = node.node_id

    def linger(unit: Any) -> None:
        import time

        import ray

        until = time.monotonic() + 120
        if ray.get_runtime_context().get_node_id() == doomed:
            marker.touch()
            time.sleep(600)  # the node is lost meanwhile
        while not marker.exists():  # so that it does get a unit
            assert time.monotonic() < until
            time.sleep(0.05)

    def lose() -> None:
        while not marker.exists():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    measuring(monkeypatch, read=wrapped(stage_named("read"), advancing=linger))
    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    out = tmp_path / "out"
    result = prunescope("run", place / "study.toml", "--out", out, "--on", f"ray:{cluster.address}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^reading .* is started again, since it failed on .*: the worker was lost", result.stderr, re.M)
    assert results(out) == results(place / "one")
    cluster.add_node(**_node())


@pytest.mark.full
def test_a_unit_that_fails_three_times_is_reported_and_the_rest_goes_on(place, cluster, monkeypatch, tmp_path):
    tries = tmp_path / "tries"
    tries.mkdir()

    def fail(unit: Any) -> None:
        import uuid

        if "reading sw" in unit.title:
            (tries / uuid.uuid4().hex).touch()
            raise RuntimeError("a planted failure")

    measuring(monkeypatch, read=wrapped(stage_named("read"), before=fail))
    study, out, on = place / "study.toml", tmp_path / "out", f"ray:{cluster.address}"
    result = prunescope("run", study, "--out", out, "--on", on)
    expect_one_line(result, "reading sw with 5 models", "RuntimeError: a planted failure (3 times)", "run again")
    assert len(list(tries.iterdir())) == 3
    (log,) = (out / "logs").iterdir()
    assert str(log) in result.stderr
    assert log.read_text().count("Traceback") == 3
    done = results(out)
    assert {name: done[name] for name in done} == {k: v for k, v in results(place / "one").items() if k in done}
    assert sum(name.endswith("en.safetensors") for name in done) == 5
    assert not (out / "frames").exists()
    monkeypatch.undo()
    monkeypatch.setattr(study_run, "_REPORTING", ())
    assert prunescope("run", study, "--out", out).returncode == 0, "and goes on in one process"
    assert results(out) == results(place / "one")


def test_what_a_node_lacks_is_one_line_each(place, cluster, monkeypatch, tmp_path):
    from analysis.study.executors import ray_cluster

    study, out, on = place / "study.toml", tmp_path / "out", f"ray:{cluster.address}"
    ray.init(address=cluster.address, log_to_driver=False)  # once for all of them
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ray_cluster, "_versions", lambda: {"prunescope": "0.0.1", "torch": "1", "transformers": "1"})
            expect_one_line(prunescope("run", study, "--out", out, "--on", on), "node ", "but this process has 0.0.1")
        with monkeypatch.context() as patch:
            patch.setattr(ray_cluster, "_versions", lambda: {"torch": "1.0"})
            expect_one_line(prunescope("run", study, "--out", out, "--on", on), "has torch", "this process has 1.0")
        with monkeypatch.context() as patch:
            patch.setattr(ray_cluster, "_touch", lambda marker: None)  # as if it lay on a disk of this machine only
            expect_one_line(
                prunescope("run", study, "--out", out, "--on", on), "node ", "does not see the folder", "--out"
            )
        (place / "model").rename(place / "gone")
        with monkeypatch.context() as patch:
            patch.setattr(ray_cluster, "is_folder", lambda name: True)  # as it may be on this machine
            expect_one_line(prunescope("run", study, "--out", out, "--on", on), "node ", "does not have the model")
    finally:
        if (place / "gone").exists():
            (place / "gone").rename(place / "model")
        ray.shutdown()
    assert nothing_was_made(out)


@pytest.mark.full
def test_an_interrupted_run_leaves_a_study_that_goes_on(place, cluster, monkeypatch, tmp_path):
    from analysis.study.executors.ray_workers import RayWorkers

    follow, study, out = RayWorkers._follow, place / "study.toml", tmp_path / "out"

    def interrupted(self: RayWorkers, progress: Any, running: Any) -> None:
        if progress is not None and any(unit.stage == "read" for unit in (w.unit for w in self._crew.workers) if unit):
            raise KeyboardInterrupt
        follow(self, progress, running)

    monkeypatch.setattr(RayWorkers, "_follow", interrupted)
    result = prunescope("run", study, "--out", out, "--on", f"ray:{cluster.address}")
    assert result.returncode == 130
    assert "run the same command again to resume" in result.stderr
    assert not ray.is_initialized()
    done = {path: path.stat().st_mtime_ns for path in (out / "variants").rglob("*.*")}
    assert len(done) > 4
    monkeypatch.setattr(RayWorkers, "_follow", follow)
    assert prunescope("run", study, "--out", out).returncode == 0
    assert results(out) == results(place / "one")
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.mark.full
def test_another_version_of_the_code_on_a_node_is_one_line(place, cluster, monkeypatch, tmp_path):
    from analysis.study.executors import ray_crew

    monkeypatch.setattr(ray_crew, "own_code", lambda: "another")
    on = f"ray:{cluster.address}"
    result = prunescope("run", place / "study.toml", "--out", tmp_path / "out", "--on", on)
    expect_one_line(result, "node ", "another version of prunescope's code")
    assert nothing_was_made(tmp_path / "out")


def test_no_cluster_no_ray_and_no_such_place_are_one_line_each(place, monkeypatch, tmp_path):
    study, out = place / "study.toml", tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nothing = prunescope("run", study, "--out", out, "--on", f"ray:127.0.0.1:{port}")
    expect_one_line(nothing, f"no Ray cluster at 127.0.0.1:{port}", "ray start --head", "--on ray")
    expect_one_line(prunescope("run", study, "--out", out, "--on", "ray:ray://head:10001"), "HOST:PORT")
    expect_one_line(prunescope("run", study, "--out", out, "--on", "dask"), '"dask"', "--on ray")
    for name in ("ray_workers", "ray_crew", "ray_cluster"):
        monkeypatch.delitem(sys.modules, f"{executors.__name__}.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    expect_one_line(prunescope("run", study, "--out", out, "--on", "ray"), "pip install 'prunescope[cluster]'")
    assert nothing_was_made(out)


def node(cpus: int, gpus: int = 0, memory: int = 64 * GIB) -> Node:
    return Node("id", "name", float(cpus), float(gpus), memory)


def test_a_node_has_as_many_workers_as_cpus_gpus_and_memory_allow():
    def counted(*nodes: Node, **settings: Any) -> list[int]:
        kept = {"threads": 1, "on_cpu": True, "needed": 4 * GIB, "cap": None} | settings
        return [slot.memory // GIB for slot in places(nodes, **kept)]

    assert counted(node(4)) == [16] * 4
    assert counted(node(9), threads=4) == [32] * 2
    assert counted(node(4), needed=20 * GIB) == [21] * 3
    assert counted(node(4), needed=100 * GIB) == [64], "a larger model is read from its shards by one"
    assert counted(node(4), needed=20 * GIB, cap=6 * GIB) == [6] * 4
    assert counted(node(4), node(2, memory=8 * GIB)) == [16] * 4 + [4] * 2
    assert counted(node(16, 4), on_cpu=False) == [16] * 4
    assert counted(node(16, 0), node(16, 1), on_cpu=False) == [64]


def test_threads_of_workers_are_those_of_the_environment(monkeypatch):
    for stated, threads in (("3", 3), ("", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
        assert slots.threads_of_a_worker() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(Exception, match=re.escape('OMP_NUM_THREADS is "many"')):
        slots.threads_of_a_worker()
