"""Files that grow by one tensor at a time are ordinary safetensors at the end, and go on after a kill."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pruning.errors import VariantError
from pruning.variants.tensors import GrowingTensors, StoredTensors, room_for

TENSORS = {
    "odd": torch.arange(5, dtype=torch.bfloat16),
    "matrix": torch.randn(3, 4).T,
    "none": torch.empty(0, dtype=torch.float16),
    "long": torch.randn(7, dtype=torch.float64),
    "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
}
ROOM = room_for({name: tensor.numel() for name, tensor in TENSORS.items()}, {"made": "here"})


def grown(path, names=tuple(TENSORS)) -> GrowingTensors:
    file = GrowingTensors(path, ROOM)
    for name in names:
        file.add(name, TENSORS[name])
    return file


def same(found: dict, names=tuple(TENSORS)) -> bool:
    return set(found) == set(names) and all(
        torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in names
    )


def test_tensors_written_one_at_a_time_read_back(tmp_path):
    grown(tmp_path / "a").finish({"made": "here"})
    assert same(load_file(tmp_path / "a"))
    stored = StoredTensors(tmp_path / "a")
    assert same({name: stored.read(name) for name in stored})
    assert stored.metadata == {"made": "here"}
    assert torch.equal(stored.read("matrix", 1, 3), TENSORS["matrix"][1:3])
    assert stored.bytes("bytes", 1, 2).tolist() == [[3, 4, 5]]


def test_a_file_with_nothing_in_it_is_one_too(tmp_path):
    GrowingTensors(tmp_path / "a", ROOM).finish({})
    assert load_file(tmp_path / "a") == {}


def test_a_file_goes_on_after_a_kill_and_ends_the_same(tmp_path):
    names = list(TENSORS)
    grown(tmp_path / "whole").finish({})
    for at in range(len(names) + 1):
        state = grown(tmp_path / "a", names[:at]).state()
        if at:
            with (tmp_path / "a").open("ab") as file:
                file.write(b"half a tensor")
        again = GrowingTensors.resumed(tmp_path / "a", state)
        for name in names[at:]:
            again.add(name, TENSORS[name])
        again.finish({})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut short", "altered"])
def test_what_is_not_as_it_was_is_not_gone_on_with(tmp_path, damage):
    state = grown(tmp_path / "a").state()
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-1] if damage == "cut short" else whole[:-1] + bytes([whole[-1] ^ 1]))
    if damage == "missing":
        (tmp_path / "a").unlink()
    assert GrowingTensors.resumed(tmp_path / "a", state) is None


def test_a_stored_file_that_is_none_is_one_line(tmp_path):
    with pytest.raises(VariantError, match="there is no file"):
        StoredTensors(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"\x00" * 20)
    with pytest.raises(VariantError, match="is damaged"):
        StoredTensors(tmp_path / "a")
