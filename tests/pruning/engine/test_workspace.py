"""A sweep that is killed and started again ends as one that was not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CORPUS, SHORT

from pruning import Anatomy, Recipe
from pruning.engine import Job, Pruned, Workspace, planned_jobs, sweep, workspace
from pruning.engine.shelves import Place
from pruning.errors import DiskError
from pruning.text.calibration import CalibrationText
from pruning.variants.store import VariantRecord, VariantWriter
from pruning.variants.variant import Variant

RECIPES = [
    Recipe(method="wanda", sparsity=0.5),
    Recipe(method="sparsegpt", sparsity=0.5, blocks="1:"),
    Recipe(method="wanda", sparsity=0.5, allocation="owl", propagation="dense"),
    Recipe(method="magnitude", sparsity=0.3),
]
JOBS = planned_jobs(RECIPES, [SHORT])


@pytest.fixture(autouse=True)
def every_block_is_a_checkpoint(monkeypatch):
    monkeypatch.setattr(workspace, "CHECKPOINT_SECONDS", 0)


def run(
    anatomy: Anatomy,
    tokenizer: Any,
    place: Workspace | None = None,
    jobs: Sequence[Job] = JOBS,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[Job, Pruned]:
    text = CalibrationText.draw(tokenizer, CORPUS, [SHORT])
    pruned = sweep(anatomy, jobs, text, batch_tokens=32, workspace=place, progress=progress)
    return {job: pruned(job) for job in jobs}


def assert_same(found: dict[Job, Pruned], wanted: dict[Job, Pruned]) -> None:
    for job, expected in wanted.items():
        assert found[job].masks == expected.masks, job.id
        assert list(found[job].masks) == list(expected.masks)
        values, expected_values = found[job].values, expected.values
        assert set(values) == set(expected_values)
        assert all(torch.equal(values[key], expected_values[key]) for key in values), job.id
        biases, expected_biases = found[job].biases, expected.biases
        assert set(biases) == set(expected_biases)
        assert all(torch.equal(biases[key], expected_biases[key]) for key in biases), job.id
        assert found[job].remarks == expected.remarks


class Kill:
    """Progress that raises at its n-th call."""

    def __init__(self, at: int, how: type[BaseException]) -> None:
        self.left = at
        self.how = how

    def __call__(self, tokens: int) -> None:
        if self.left == 0:
            raise self.how
        self.left -= 1


def killed(anatomy: Anatomy, tokenizer: Any, folder: Path, *, spill: bool = False) -> None:
    """Run a sweep into a folder up to its last block."""
    place = Workspace(folder, "key", states=states(spill))
    with pytest.raises(KeyboardInterrupt):
        run(anatomy, tokenizer, place, progress=Kill(21, KeyboardInterrupt))
    assert place.resumed() is None  # which it was not itself
    assert Workspace(folder, "key").resumed()[0] == 2


def states(spill: bool) -> Place:
    return "disk" if spill else "device"


@pytest.mark.parametrize("spill", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "mt5"])
def test_a_sweep_that_is_killed_anywhere_goes_on_and_ends_the_same(make_model, tokenizer, tmp_path, kind, spill):
    model = make_model(kind)
    anatomy = Anatomy(model)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done: list[int] = []
    wanted = run(anatomy, tokenizer, progress=done.append)
    resumed = 0
    for at, how in zip(
        range(len(done) // 4, len(done), len(done) // 3), [KeyboardInterrupt, SystemExit] * 2, strict=False
    ):
        folder = tmp_path / str(at)
        with pytest.raises(how):
            run(anatomy, tokenizer, Workspace(folder, "key", states=states(spill)), progress=Kill(at, how))
        assert all(torch.equal(tensor, dense[name]) for name, tensor in model.state_dict().items())
        again = Workspace(folder, "key", states=states(spill))
        resumed += again.resumed() is not None
        repeated: list[int] = []
        assert_same(run(anatomy, tokenizer, again, progress=repeated.append), wanted)
        assert sum(repeated) == sum(done)  # what was done before the kill is told at once
        again.close()
    assert resumed >= 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_is_killed_between_a_blocks_masks_and_its_biases_ends_the_same(
    model, tokenizer, tmp_path, monkeypatch
):
    anatomy = Anatomy(model)
    flap = Recipe(method="flap", sparsity=0.5, allocation="uniform", propagation="pruned")
    jobs = planned_jobs([flap, Recipe(method="wanda", sparsity=0.5)], [SHORT])
    wanted = run(anatomy, tokenizer, jobs=jobs)
    written = len(wanted[jobs[0]].biases)
    assert written == 2 * len(anatomy.blocks)  # of o and down
    add, resumed = VariantWriter.add_bias, 0
    for at in range(written):
        kill = Kill(at, KeyboardInterrupt)

        def add_or_die(writer: VariantWriter, key: Any, bias: torch.Tensor, kill: Kill = kill) -> None:
            kill(0)
            add(writer, key, bias)

        folder = tmp_path / str(at)
        with monkeypatch.context() as patched:
            patched.setattr(VariantWriter, "add_bias", add_or_die)
            with pytest.raises(KeyboardInterrupt):
                run(anatomy, tokenizer, Workspace(folder, "key"), jobs)
        again = Workspace(folder, "key")
        resumed += again.resumed() is not None
        assert_same(run(anatomy, tokenizer, again, jobs), wanted)
    assert resumed == written - 2  # in the first block there is nothing to resume yet


@pytest.mark.parametrize("then", [False, True])
def test_a_sweep_may_go_on_with_states_kept_elsewhere(model, tokenizer, tmp_path, then):
    anatomy = Anatomy(model)
    killed(anatomy, tokenizer, tmp_path / "w", spill=not then)
    again = Workspace(tmp_path / "w", "key", states=states(then))
    assert again.resumed() is not None
    assert_same(run(anatomy, tokenizer, again), run(anatomy, tokenizer))


def test_a_resumed_sweep_repeats_little(model, tokenizer, tmp_path):
    """The survey comes again, the blocks that were finished do not."""
    anatomy = Anatomy(model)
    jobs = [job for job in JOBS if job.recipe.allocation == "uniform"]
    done: list[int] = []
    run(anatomy, tokenizer, jobs=jobs, progress=done.append)
    place = Workspace(tmp_path / "w", "key")
    with pytest.raises(KeyboardInterrupt):
        run(anatomy, tokenizer, place, jobs, Kill(len(done) - 1, KeyboardInterrupt))
    repeated: list[int] = []
    run(anatomy, tokenizer, Workspace(tmp_path / "w", "key"), jobs, repeated.append)
    assert sum(repeated) == sum(done)
    assert len(repeated) < len(done) / 2


def test_work_of_another_key_is_removed(model, tokenizer, tmp_path):
    anatomy = Anatomy(model)
    killed(anatomy, tokenizer, tmp_path / "w")
    other = Workspace(tmp_path / "w", "another key")
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["work.json"]
    assert other.resumed() is None


@pytest.mark.parametrize("damage", ["cut short", "altered", "missing"])
@pytest.mark.parametrize("spill", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize(
    "name",
    [
        "position.json",
        "states-*/wanda-*.safetensors",
        "results/sparsegpt-*/weights.safetensors",
        "results/wanda-*/masks.safetensors",
    ],
)
def test_a_damaged_workspace_begins_again(model, tokenizer, tmp_path, name, spill, damage):
    anatomy = Anatomy(model)
    killed(anatomy, tokenizer, tmp_path / "w", spill=spill)
    (path, *_) = sorted((tmp_path / "w").glob(name))
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-30] if damage == "cut short" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    again = Workspace(tmp_path / "w", "key", states=states(spill))
    assert again.resumed() is None
    assert_same(run(anatomy, tokenizer, again), run(anatomy, tokenizer))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}', '{"position": {}}'])
def test_records_that_are_no_records_are_not_followed(tmp_path, content):
    for name in ("work.json", "position.json"):
        Workspace(tmp_path / "w", "key")
        (tmp_path / "w" / name).write_text(content)
        assert Workspace(tmp_path / "w", "key").resumed() is None


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DiskError, match="files that are not a workspace"):
        Workspace(tmp_path, "key")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_closed_workspace_takes_only_its_own_folder(tmp_path):
    (tmp_path / "w").mkdir()
    Workspace(tmp_path / "w", "key").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "states-1/thesis.tex",
        "results/thesis.tex",
        "results/wanda-0.5-row-pruned-en+sw-s0/notes.txt",
        "my folder/work.json",
        "states-one/a.safetensors",
        "thesis/",
    ],
)
def test_what_somebody_put_into_a_workspace_stays(model, tokenizer, tmp_path, name):
    anatomy = Anatomy(model)
    killed(anatomy, tokenizer, tmp_path / "w", spill=True)
    mine = tmp_path / "w" / name
    if name.endswith("/"):
        mine.mkdir()
    else:
        mine.parent.mkdir(exist_ok=True, parents=True)
        mine.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DiskError, match="files that are not a workspace"):
        Workspace(tmp_path / "w", "another key")
    assert sorted(tmp_path.rglob("*")) == before
    again = Workspace(tmp_path / "w", "key", states="disk")
    run(anatomy, tokenizer, again)
    again.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == ([mine] if mine.is_file() else [])
    assert mine.exists()


def test_a_folder_of_another_tool_is_left_alone(tmp_path):
    (tmp_path / "work.json").write_text('{"key": "of another tool"}')
    (tmp_path / "chapter-1").mkdir()
    with pytest.raises(DiskError, match="files that are not a workspace"):
        Workspace(tmp_path, "key")
    assert {path.name for path in tmp_path.iterdir()} == {"work.json", "chapter-1"}


def test_a_link_in_a_workspace_is_not_followed(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.safetensors").write_text("precious")
    Workspace(tmp_path / "w", "key")
    (tmp_path / "w" / "states-1").symlink_to(tmp_path / "thesis")
    Workspace(tmp_path / "w", "key").close()
    assert (tmp_path / "thesis" / "a.safetensors").read_text() == "precious"


def test_a_sweep_that_was_complete_is_not_done_again(model, tokenizer, tmp_path):
    anatomy = Anatomy(model)
    done: list[int] = []
    wanted = run(anatomy, tokenizer, Workspace(tmp_path / "w", "key"), progress=done.append)
    again: list[int] = []
    taken = JOBS[0].id  # what was taken from the folder need not be there any more
    for path in (tmp_path / "w" / "results" / taken).iterdir():
        path.unlink()
    place = Workspace(tmp_path / "w", "key", finished=[taken])
    text = CalibrationText.draw(tokenizer, CORPUS, [SHORT])
    pruned = sweep(anatomy, JOBS, text, workspace=place, progress=again.append)
    assert again == [sum(done)]
    assert_same({job: pruned(job) for job in JOBS[1:]}, {job: wanted[job] for job in JOBS[1:]})
    assert not Workspace(tmp_path / "w", "key").is_complete  # what is neither there nor taken is made again


def test_a_result_on_disk_is_an_ordinary_variants_file(model, tokenizer, tmp_path):
    """Written block by block, and the same bytes as when it is saved in one go."""
    anatomy = Anatomy(model)
    place = Workspace(tmp_path / "w", "key", model="f" * 64)
    for job, pruned in run(anatomy, tokenizer, place).items():
        record = VariantRecord(id=job.id, model="m", model_fingerprint="f" * 64)
        in_memory = run(anatomy, tokenizer)[job]
        Variant(record, in_memory.masks, in_memory.values).save(tmp_path / "saved")
        grown = tmp_path / "w" / "results" / job.id
        names = {path.name for path in grown.iterdir()}
        assert names == {path.name for path in (tmp_path / "saved").iterdir()} - {"recipe.json"}
        for name in names:
            assert (grown / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
        assert pruned.masks == in_memory.masks


def test_states_on_disk_take_no_more_than_two_blocks(model, tokenizer, tmp_path):
    folders: list[int] = []
    place = Workspace(tmp_path / "w", "key", states="disk")
    run(Anatomy(model), tokenizer, place, progress=lambda n: folders.append(len(list(tmp_path.rglob("states-*")))))
    assert max(folders) == 2
    assert not list(tmp_path.rglob("aside"))


def test_masks_by_derivatives_are_chosen_again_where_a_killed_sweep_was_correcting_them(model, tokenizer, tmp_path):
    anatomy = Anatomy(model)
    jobs = planned_jobs([Recipe(method="snip", sparsity=0.5, refinement="swaps", correction="admm")], [SHORT])
    calls: list[int] = []
    expected = run(anatomy, tokenizer, jobs=jobs, progress=calls.append)
    with pytest.raises(KeyboardInterrupt):
        run(anatomy, tokenizer, Workspace(tmp_path, "key"), jobs, Kill(len(calls) - 1, KeyboardInterrupt))
    assert Workspace(tmp_path, "key").resumed()[0] == 2
    assert_same(run(anatomy, tokenizer, Workspace(tmp_path, "key"), jobs), expected)
