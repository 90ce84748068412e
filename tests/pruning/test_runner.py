"""One door to pruning: in memory and in a folder the same variants, whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import CORPUS, SHORT

from pruning import Anatomy, CalibrationSet, PruningRun, Recipe, SetAsideWarning, Variant, prune, runner
from pruning.engine import Job, planned_jobs, workspace
from pruning.engine.plan import MemoryCapError
from pruning.errors import DiskError, ModelError, VariantError
from pruning.files import PARTIAL

RECIPES = [
    Recipe(method="sparsegpt", sparsity=0.5, blocks="1:"),
    Recipe(method="wanda", sparsity=0.5),
    Recipe(method="snip", sparsity=0.5),
    Recipe(method="magnitude", sparsity=0.3, roles=("o",)),
    Recipe(method="gptq", bits=3, group=8, blocks="1:"),
]
FRUGAL = [recipe for recipe in RECIPES if recipe.method != "snip"]
SETS = [SHORT, CalibrationSet.named("zh", samples=2, length=16)]


@pytest.fixture(autouse=True)
def every_block_is_a_checkpoint(monkeypatch):
    monkeypatch.setattr(workspace, "CHECKPOINT_SECONDS", 0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(variants: list[Variant], folder: Path) -> dict[str, bytes]:
    for variant in variants:
        variant.save(folder / "variants" / variant.id)
    return files(folder)


@pytest.mark.parametrize("memory", [None, 1 << 40])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "mt5"])
def test_a_folder_holds_what_memory_does(make_model, tokenizer, tmp_path, kind, memory):
    model = make_model(kind)
    held = prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny")
    stored = prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny", folder=tmp_path / "out", memory=memory)
    assert [variant.record for variant in stored] == [variant.record for variant in held]
    assert all(one.masks == other.masks for one, other in zip(stored, held, strict=True))
    assert all(one.bits() == other.bits() for one, other in zip(stored, held, strict=True))
    assert files(tmp_path / "out") == saved(held, tmp_path / "saved")


def cap_for(model, tokenizer, waves: int, tmp_path) -> int:
    cap = None  # for recipes that need not hold the whole model
    while True:
        run = PruningRun(
            Anatomy(model), tokenizer, planned_jobs(FRUGAL, SETS), CORPUS, tmp_path / "nowhere", memory=cap
        )
        if len(run.waves) >= waves:
            return run.plan.memory
        cap = run.plan.memory - 1


def test_a_run_that_is_killed_anywhere_goes_on_and_ends_the_same(model, tokenizer, tmp_path):
    whole = saved(prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny"), tmp_path / "whole")
    ticks: list[int] = []
    prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny", folder=tmp_path / "count", progress=ticks.append)
    for at in range(0, len(ticks), max(1, len(ticks) // 5)):
        out = tmp_path / str(at)
        left = [at]

        def kill(tokens: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny", folder=out, progress=kill)
        done = {path: path.stat().st_mtime_ns for path in (out / "variants").rglob("*.*")}
        prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny", folder=out)
        assert files(out) == whole
        assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.mark.parametrize("at", range(5))
def test_a_kill_while_variants_are_put_in_place_costs_no_pruning(model, tokenizer, tmp_path, monkeypatch, at):
    recipes = [Recipe(method="wanda", sparsity=s / 10) for s in range(3, 6)]
    whole = saved(prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny"), tmp_path / "whole")
    put, calls = runner.put_in_place, []

    def killed(folder: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) > at // 2:
            if at % 2:
                put(folder, place)
            raise KeyboardInterrupt
        put(folder, place)

    monkeypatch.setattr(runner, "put_in_place", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=tmp_path / "out")
    monkeypatch.setattr(runner, "put_in_place", put)
    ticks: list[int] = []
    prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=tmp_path / "out", progress=ticks.append)
    assert len(ticks) == (1 if at < 5 else 0)
    assert files(tmp_path / "out") == whole


def test_what_is_finished_is_not_made_again_and_what_changed_is(model, tokenizer, tmp_path):
    def make(recipes, **settings) -> int:
        ticks: list[int] = []
        prune(model, tokenizer, recipes, CORPUS, SHORT, folder=tmp_path, progress=ticks.append, **settings)
        return sum(ticks)

    assert make(RECIPES[:2]) > 0
    assert make(RECIPES[:2]) == 0
    wanda = tmp_path / "variants" / "wanda-0.5-row-pruned-en+sw-s0"
    before = files(wanda)
    (wanda / "masks.safetensors").write_bytes(b"damaged")
    assert make(RECIPES[:2]) > 0
    assert files(wanda) == before
    (wanda / "recipe.json").unlink()
    assert make(RECIPES[:2]) > 0
    record = json.loads((wanda / "recipe.json").read_text())
    (wanda / "recipe.json").write_text(json.dumps(record | {"key": "of another version"}))
    assert make(RECIPES[:2]) > 0
    assert files(wanda) == before


def test_waves_are_units_that_can_run_apart(model, tokenizer, tmp_path):
    """In any order, and with what was done in one of them there for the next run."""
    cap = cap_for(model, tokenizer, 3, tmp_path)
    whole = saved(prune(model, tokenizer, FRUGAL, CORPUS, SETS, name="tiny"), tmp_path / "whole")

    def a_run() -> PruningRun:
        jobs = planned_jobs(FRUGAL, SETS)
        return PruningRun(Anatomy(model), tokenizer, jobs, CORPUS, tmp_path / "out", memory=cap, name="tiny")

    first = a_run()
    waves = first.waves
    assert {job for wave in waves for job in wave.jobs} == set(first.jobs.values())
    assert first.plan.states == "disk"
    assert f"in {len(waves)} waves" in str(first.plan)
    for wave in reversed(waves):
        ticks: list[int] = []
        assert first.run(wave, ticks.append) == [job.id for job in wave.jobs]
        assert sum(ticks) == wave.tokens
    first.close()
    assert files(tmp_path / "out") == whole
    assert a_run().waves == ()
    assert a_run().plan is None


def test_somebody_elses_folder_in_the_place_of_a_variant_is_refused_at_once(model, tokenizer, tmp_path):
    place = tmp_path / "variants" / "wanda-0.5-row-pruned-en+sw-s0"
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("precious")
    ticks: list[int] = []
    with pytest.raises(DiskError, match="did not write"):
        prune(model, tokenizer, RECIPES[1], CORPUS, SHORT, folder=tmp_path, progress=ticks.append)
    assert ticks == []
    assert (place / "thesis.tex").read_text() == "precious"


# What cannot be made


def damaged(model):
    """Make one projection's weights infinite where only a few recipes look."""
    with torch.no_grad():
        Anatomy(model).weight(2, "o")[3, 4] = torch.inf
    return model


def test_a_variant_that_cannot_be_made_is_set_aside_and_stays_so(model, tokenizer, tmp_path):
    damaged(model)
    recipes = [
        Recipe(method="magnitude", sparsity=0.5),
        Recipe(method="magnitude", sparsity=0.5, blocks=":2"),
        Recipe(method="wanda", sparsity=0.5, blocks=":2"),
    ]
    with pytest.warns(SetAsideWarning, match=r"magnitude-0.5-matrix was set aside: block 2, role o: .* infinite"):
        held = prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny")
    assert [variant.id for variant in held] == [
        "magnitude-0.5-matrix-blocks:2".replace(":", "_"),
        "wanda-0.5-row-blocks_2-pruned-en+sw-s0",
    ]
    out = tmp_path / "out"
    with pytest.warns(SetAsideWarning):
        prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=out)
    found = files(out)
    assert json.loads(found.pop("set_aside.json"))["magnitude-0.5-matrix"]["reason"].startswith("block 2, role o")
    assert found == saved(held, tmp_path / "saved")
    ticks: list[int] = []
    with pytest.warns(SetAsideWarning):
        prune(model, tokenizer, recipes, CORPUS, SHORT, name="tiny", folder=out, progress=ticks.append)
    assert ticks == []  # it would end so again
    other = [Recipe(method="magnitude", sparsity=0.4), *recipes]
    with pytest.warns(SetAsideWarning):  # what is new is tried
        prune(model, tokenizer, other, CORPUS, SHORT, name="tiny", folder=out)
    assert set(json.loads((out / "set_aside.json").read_text())) == {"magnitude-0.5-matrix", "magnitude-0.4-matrix"}


def test_work_of_the_others_survives_a_variant_that_fails(model, tokenizer, tmp_path):
    damaged(model)
    recipes = [Recipe(method="magnitude", sparsity=0.5), Recipe(method="wanda", sparsity=0.5, blocks=":2")]

    def kill(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, tokenizer, recipes, CORPUS, SHORT, folder=tmp_path, progress=kill)
    assert json.loads((tmp_path / "set_aside.json").read_text()).keys() == {"magnitude-0.5-matrix"}
    assert list((tmp_path / "scratch").iterdir())


def test_if_nothing_can_be_made_that_is_an_error_and_leaves_nothing(model, tokenizer, tmp_path):
    damaged(model)
    recipes = [Recipe(method=method, sparsity=0.5) for method in ("magnitude", "wanda")]
    for folder in (None, tmp_path / "out", tmp_path / "out"):
        with pytest.raises(ModelError, match="block 2, role o"):
            prune(model, tokenizer, recipes, CORPUS, SHORT, folder=folder)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "[]", '{"a": 3}', '{"magnitude-0.5-matrix": {"key": 3}}'])
def test_a_damaged_record_of_what_was_set_aside_is_not_followed(model, tokenizer, tmp_path, content):
    (tmp_path / "set_aside.json").write_text(content)
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.5), folder=tmp_path)
    assert variant.id == "magnitude-0.5-matrix"


# Caps


def test_a_cap_on_a_device_without_memory_of_its_own_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(MemoryCapError, match=r"this model runs on the cpu, which has no memory of its own to cap"):
        prune(model, tokenizer, RECIPES[1], CORPUS, SHORT, folder=tmp_path, device_memory=1 << 30)
    assert list(tmp_path.iterdir()) == []


def test_a_cap_too_small_says_how_much_is_needed(model, tokenizer, tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(MemoryCapError, match=r"0.09 GiB cannot hold .* about 0.69 GiB"):
            prune(model, tokenizer, RECIPES[1], CORPUS, SHORT, folder=folder, memory=100_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_was_removed_meanwhile_is_missed(model, tokenizer, tmp_path):
    run = PruningRun(Anatomy(model), tokenizer, [Job(RECIPES[3])], None, tmp_path)
    (wave,) = run.waves
    (name,) = run.run(wave)
    assert str(wave) == "magnitude, without text"
    assert run.finished(name)
    (run.place(name) / "masks.safetensors").unlink()
    assert not run.finished(name)
    with pytest.raises(VariantError, match="there is no mask file"):
        run.open(name)
    assert not any(PARTIAL in str(path) for path in tmp_path.rglob("*"))


def test_waves_for_several_processes_keep_calibration_sets_whole_and_make_the_same_variants(model, tokenizer, tmp_path):
    whole = saved(prune(model, tokenizer, RECIPES, CORPUS, SETS, name="tiny"), tmp_path / "whole")
    jobs, out = planned_jobs(RECIPES, SETS), tmp_path / "out"

    def a_run(parts: int = 1) -> PruningRun:
        return PruningRun(Anatomy(model), tokenizer, jobs, CORPUS, out, name="tiny", parts=parts)

    alone, waves = a_run().waves, a_run(parts=2).waves
    assert [len(a_run(parts=parts).waves) for parts in (3, 100)] == [len(a_run(parts=len(SETS)).waves)] * 2
    assert len(waves) > len(alone)
    assert {job for wave in waves for job in wave.jobs} == set(jobs)
    for one in alone:
        parts = [wave for wave in waves if set(wave.jobs) <= set(one.jobs)]
        sets = [{job.calibration for job in part.jobs} for part in parts]
        assert sum(map(len, sets)) == len({job.calibration for job in one.jobs})
    for wave in waves:
        another = a_run()  # as in a process of its own, which has planned waves of its own
        another.run(another.wave([job.id for job in wave.jobs]))
    assert files(out) == whole
    assert not list((out / "scratch").glob("*"))


def test_what_several_processes_set_aside_is_all_on_record(model, tokenizer, tmp_path):
    jobs = planned_jobs(RECIPES, SETS)
    runs = [PruningRun(Anatomy(model), tokenizer, jobs, CORPUS, tmp_path / "out", name="tiny") for _ in range(2)]
    for run, job in zip(runs, jobs, strict=False):
        run._note_set_aside({job.id: "planted"})
    assert runs[1].set_aside == {job.id: "planted" for job in jobs[:2]}
    assert json.loads((tmp_path / "out" / "set_aside.json").read_text()).keys() == runs[1].set_aside.keys()
