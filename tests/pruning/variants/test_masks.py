from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import MaskSet
from pruning.errors import VariantError
from pruning.variants.masks import overlaps
from pruning.variants.tensors import StoredTensors

KEYS = [(0, "q"), (0, "down"), (1, "q")]


def random_masks(seed: int, density: float = 0.5, shape: tuple[int, int] = (5, 13)) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(shape, generator=generator) < density for key in KEYS}


def as_sets(masks: dict) -> dict:
    return {key: set(map(tuple, mask.nonzero().tolist())) for key, mask in masks.items()}


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 20))
def test_algebra_and_iou_are_those_of_sets(one, other, columns):
    a, b = random_masks(one, 0.4, (3, columns)), random_masks(other, 0.6, (3, columns))
    packed_a, packed_b = MaskSet.pack(a), MaskSet.pack(b)
    sets_a, sets_b = as_sets(a), as_sets(b)
    for key in KEYS:
        assert as_sets(packed_a & packed_b)[key] == sets_a[key] & sets_b[key]
        assert as_sets(packed_a | packed_b)[key] == sets_a[key] | sets_b[key]
        assert as_sets(packed_a ^ packed_b)[key] == sets_a[key] ^ sets_b[key]
        union = len(sets_a[key] | sets_b[key])
        assert packed_a.iou(packed_b)[key] == (len(sets_a[key] & sets_b[key]) / union if union else 1.0)
        assert packed_a.kept(key) == len(sets_a[key])
        assert torch.equal((~packed_a)[key], ~a[key])


def test_packing_holds_eight_weights_a_byte_and_loses_none():
    masks = random_masks(0)
    packed = MaskSet.pack(masks)
    assert all(torch.equal(packed[key], mask) for key, mask in masks.items())
    assert packed.sparsity() == pytest.approx(1 - np.mean([mask.numpy() for mask in masks.values()]))


def test_saved_masks_come_back(tmp_path):
    masks = MaskSet.pack(random_masks(1))
    masks.save(tmp_path / "m.safetensors", "model-a")
    assert MaskSet.open(tmp_path / "m.safetensors", "model-a") == masks


def test_opened_masks_are_read_a_projection_at_a_time(tmp_path, monkeypatch):
    a, b = MaskSet.pack(random_masks(1)), MaskSet.pack(random_masks(2))
    for name, masks in (("a", a), ("b", b)):
        masks.save(tmp_path / name, "model-a")
    read = []
    monkeypatch.setattr(StoredTensors, "read", noted(StoredTensors.read, read))
    opened, other = (MaskSet.open(tmp_path / name, "model-a") for name in "ab")
    assert opened.kept() == a.kept()
    assert opened.sparsity((0, "q")) == a.sparsity((0, "q"))
    assert list(opened) == KEYS
    both = ~(opened & other) | opened
    assert read == []
    assert torch.equal(both[0, "down"], (~(a & b) | a)[0, "down"])
    assert {name for name, *_ in read} == {"0.down"}
    read.clear()
    assert torch.equal(opened.rows((1, "q"), 1, 3), a[1, "q"][1:3])
    assert read == [("1.q", 1, 3)]
    assert overlaps([opened, other])[1, "q"].tolist() == overlaps([a, b])[1, "q"].tolist()
    assert both == ~(a & b) | a


def noted(read, calls):
    def noting(self, name, start=0, stop=None):
        calls.append((name, start, stop))
        return read(self, name, start, stop)

    return noting


def test_masks_written_before_counts_were_kept_open_too(tmp_path):
    from safetensors.numpy import save_file

    masks = MaskSet.pack(random_masks(1))
    header = {"model": "model-a", "inputs": {f"{layer}.{role}": 13 for layer, role in KEYS}}
    tensors = {f"{key[0]}.{key[1]}": masks.packed(key) for key in KEYS}
    save_file(tensors, tmp_path / "m.safetensors", {"prunescope-masks-1": json.dumps(header)})
    opened = MaskSet.open(tmp_path / "m.safetensors", "model-a")
    assert opened == masks
    assert opened.kept() == masks.kept()


def test_a_mask_file_is_one_that_safetensors_reads(tmp_path):
    from safetensors.numpy import load_file

    masks = MaskSet.pack(random_masks(1))
    masks.save(tmp_path / "m.safetensors", "model-a")
    loaded = load_file(tmp_path / "m.safetensors")
    assert {name: bits.tolist() for name, bits in loaded.items()} == {
        f"{key[0]}.{key[1]}": masks.packed(key).tolist() for key in KEYS
    }


def test_a_file_that_is_damaged_after_it_was_opened_is_one_line(tmp_path):
    path = tmp_path / "m.safetensors"
    MaskSet.pack(random_masks(1)).save(path, "model-a")
    opened = MaskSet.open(path)
    path.write_bytes(b"")
    with pytest.raises(VariantError, match="is damaged") as caught:
        opened[0, "q"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"kept": {"0.q": 1}}, {"kept": {"0.q": -1}}, {"kept": {"0.q": 3}, "inputs": {"0.q": 17}}]
)
def test_a_header_that_does_not_fit_is_damage(tmp_path, change):
    from safetensors.numpy import save_file

    header = {"model": "a", "inputs": {"0.q": 8}, "kept": {"0.q": 17}} | change
    if header["kept"] == {"0.q": 1}:
        header["kept"] = {"0.q": 1, "0.k": 1}
    save_file({"0.q": np.zeros((2, 1), dtype=np.uint8)}, tmp_path / "m", {"prunescope-masks-1": json.dumps(header)})
    with pytest.raises(VariantError, match="damaged"):
        MaskSet.open(tmp_path / "m")


def test_masks_of_another_model_are_refused(tmp_path):
    MaskSet.pack(random_masks(1)).save(tmp_path / "m.safetensors", "model-a")
    with pytest.raises(VariantError, match="belongs to another model"):
        MaskSet.open(tmp_path / "m.safetensors", "model-b")


@pytest.mark.parametrize("size", [0, 7, 100])
def test_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "m.safetensors"
    MaskSet.pack(random_masks(1)).save(path, "model-a")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(VariantError, match="damaged"):
        MaskSet.open(path)


def test_other_safetensors_are_not_masks(tmp_path):
    from safetensors.numpy import save_file

    save_file({"0.q": np.zeros((2, 2), dtype=np.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(VariantError, match="not a prunescope mask file"):
        MaskSet.open(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "header", ["{}", "[]", "3", '{"model": "a", "inputs": 3}', '{"model": "a", "inputs": {"q": 8}}']
)
def test_a_header_that_says_nothing_is_damage(tmp_path, header):
    from safetensors.numpy import save_file

    tensors = {"0.q": np.zeros((2, 1), dtype=np.uint8)}
    save_file(tensors, tmp_path / "m.safetensors", {"prunescope-masks-1": header})
    with pytest.raises(VariantError, match="damaged"):
        MaskSet.open(tmp_path / "m.safetensors", "a")


def test_equal_masks_are_equal_bytes(tmp_path):
    for name in "ab":
        MaskSet.pack(random_masks(1)).save(tmp_path / name, "model-a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_masks_of_transposed_storage_pack_as_others_do():
    mask = random_masks(2)[0, "q"]
    assert torch.equal(MaskSet.pack({(0, "q"): mask.T.contiguous().T})[0, "q"], mask)


def test_masks_of_other_shapes_do_not_combine():
    a, b = MaskSet.pack(random_masks(0)), MaskSet.pack(random_masks(0, shape=(4, 13)))
    with pytest.raises(VariantError, match="different models"):
        a.iou(b)
