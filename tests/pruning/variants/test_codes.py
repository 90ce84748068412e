"""Codes of quantized weights: packed, on disk, and as variants."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import CORPUS, SHORT, checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pruning import Anatomy, Recipe, Variant, load_model, prune
from pruning.errors import VariantError
from pruning.quantization import Grid
from pruning.variants.codes import CodeSet, PackedCodes, pack_codes, unpack_codes
from pruning.variants.size import pruned_bits

GPTQ, AWQ = Recipe(method="gptq", bits=3, group=8), Recipe(method="awq", bits=2, group=16)
RTN = Recipe(method="rtn", bits=4, group=0, parameters={"symmetric": 1})


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
def test_packing_is_undone_and_takes_as_many_bits_as_codes_have(bits, rows, count, seed):
    codes = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes)
    assert packed.shape == (rows, math.ceil(count / 8) * bits)
    in_order = [(int(codes[0, k]) >> (bits - 1 - b)) & 1 for k in range(count) for b in range(bits)]
    assert [(int(packed[0, n // 8]) >> (7 - n % 8)) & 1 for n in range(len(in_order))] == in_order


@pytest.fixture
def quantized(model, tokenizer):
    return prune(model, tokenizer, [GPTQ, AWQ, RTN], CORPUS, SHORT)


def test_names_say_bits_and_group(quantized):
    assert [v.id for v in quantized] == [
        "rtn-4bit-row-symmetric=1",
        "gptq-3bit-g8-pruned-en+sw-s0",
        "awq-2bit-g16-pruned-en+sw-s0",
    ]
    assert [v.columns()["pattern"] for v in quantized] == ["4bit-row", "3bit-g8", "2bit-g16"]
    assert {v.columns()["sparsity"] for v in quantized} == {0.0}


def test_what_was_made_is_what_is_saved_opened_written_and_exported(tmp_path, model, tokenizer, quantized):
    anatomy = Anatomy(model)
    for variant in quantized:
        variant.save(tmp_path / variant.id)
        assert {path.name for path in (tmp_path / variant.id).iterdir()} == {"recipe.json", "codes.safetensors"}
        opened = Variant.open(tmp_path / variant.id, anatomy.fingerprint())
        assert opened.bits() == variant.bits()
        assert opened.projections == variant.projections == tuple(anatomy)
        for key in anatomy:
            dense, wanted = anatomy.weight(*key), variant.codes[key].unpacked().weight()
            wide = torch.full((2, *dense.T.shape), 7.0, dtype=torch.bfloat16)
            opened.write(key, dense, wide[1].T)  # any strides and dtype
            assert torch.equal(wide[1].T, wanted.bfloat16())
            assert bool((wide[0] == 7).all())
            some = opened.codes.rows(key, 3, 9).unpacked()
            assert torch.equal(some.weight(), wanted[3:9])
    before = anatomy.weight(1, "up").clone()
    variant = quantized[1]
    with variant.applied(model):
        assert torch.equal(anatomy.weight(1, "up"), variant.codes[1, "up"].unpacked().weight())
    assert torch.equal(anatomy.weight(1, "up"), before)
    variant.export(model, tokenizer, tmp_path / "checkpoint")
    exported, _ = load_model(str(tmp_path / "checkpoint"))
    assert torch.equal(Anatomy(exported).weight(1, "up"), variant.codes[1, "up"].unpacked().weight())
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "A quantized variant of" in card
    assert "| bits | 3 |" in card
    assert "Sparsity" not in card


def test_many_rows_are_decoded_a_few_at_a_time(monkeypatch):
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    quantized = Grid(3, 8).quantized(weight)
    packed = PackedCodes.pack(quantized)
    monkeypatch.setattr("pruning.variants.codes._DECODED", (24 * 7, 24 * 7))
    out = torch.empty(50, 24)
    packed.write(out)
    assert torch.equal(out, quantized.weight())


def test_sizes_are_those_of_what_is_stored(model, quantized):
    anatomy = Anatomy(model)
    weights = sum(o * i for o, i in (anatomy.shape(*key) for key in anatomy))
    rows = sum(anatomy.shape(*key)[0] for key in anatomy)
    inputs = sum(anatomy.shape(*key)[1] for key in anatomy)
    rtn, gptq, awq = quantized
    assert rtn.bits() == pytest.approx(4 + 16 * rows / weights, abs=1e-12)
    assert gptq.bits() == pytest.approx(3 + (16 + 3) / 8, abs=1e-12)
    assert awq.bits() == pytest.approx(2 + (16 + 2) / 16 + 16 * inputs / weights, abs=1e-12)


def test_sizes_of_pruned_models_count_masks(model, tokenizer):
    recipes = [Recipe(method="magnitude", sparsity=0.25, pattern="row"), Recipe(method="magnitude", pattern="2:4")]
    plain, of_four = prune(model, tokenizer, recipes)
    assert plain.bits() == 16 * 0.75 + 1 == pruned_bits(0.25, "row")
    assert of_four.bits() == pytest.approx(8 + math.log2(6) / 4)


def test_a_streamed_checkpoint_is_quantized_and_exported_as_one_in_memory(tmp_path, tokenizer):
    source = checkpoint(tmp_path / "dense")
    whole, _ = load_model(str(source))
    streamed, _ = load_model(str(source), stream=True)
    made = prune(whole, tokenizer, [GPTQ, AWQ], CORPUS, SHORT)
    again = prune(streamed, tokenizer, [GPTQ, AWQ], CORPUS, SHORT, folder=tmp_path / "out")
    for one, other in zip(made, again, strict=True):
        for key in one.codes:
            assert torch.equal(one.codes[key].codes, other.codes[key].codes)
    again[0].export(streamed, tokenizer, tmp_path / "checkpoint")
    exported, _ = load_model(str(tmp_path / "checkpoint"))
    assert torch.equal(Anatomy(exported).weight(2, "o"), made[0].codes[2, "o"].unpacked().weight())


def test_a_damaged_or_foreign_code_file_is_refused(tmp_path, quantized):
    place = tmp_path / "v"
    quantized[1].save(place)
    path, model = place / "codes.safetensors", quantized[1].record.model_fingerprint
    with pytest.raises(VariantError, match="belongs to another model"):
        CodeSet.open(path, "0" * 64)
    good, tensors = path.read_bytes(), {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(VariantError, match=r"codes.safetensors is damaged"):
        Variant.open(place)
    save_file(tensors, path)
    with pytest.raises(VariantError, match="is not a prunescope code file"):
        Variant.open(place)
    header = {"prunescope-codes-1": json.dumps({"model": model, "projections": {"0.q": {"bits": 3, "inputs": 32}}})}
    for wrong in (
        tensors,
        {"0.q:codes": tensors["0.q:codes"]},
        {"0.q:codes": tensors["0.q:codes"][:, 1:], "0.q:scales": tensors["0.q:scales"]},
    ):
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, path, header)
        with pytest.raises(VariantError, match=r"codes.safetensors is damaged"):
            Variant.open(place)


def test_a_saved_quantized_variant_replaces_a_pruned_one_and_the_reverse(tmp_path, model, tokenizer, quantized):
    (pruned,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.5))
    for variant in (pruned, quantized[0], pruned):
        variant.save(tmp_path / "v")
        assert Variant.open(tmp_path / "v").record == variant.record
