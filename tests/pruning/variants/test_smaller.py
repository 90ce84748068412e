"""Variants without whole structures are exported as smaller checkpoints of the same architecture, where there are such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CORPUS, SHORT, checkpoint
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pruning import Anatomy, Recipe, Variant, load_model, prune
from pruning.errors import VariantError

IDS = torch.arange(3, 20)[None]
RECIPES = {
    "neurons": Recipe(method="magnitude", sparsity=0.5, pattern="neurons"),
    "heads": Recipe(method="magnitude", sparsity=0.5, pattern="heads"),
    "neurons+heads": Recipe(method="magnitude", sparsity=0.5, pattern="neurons+heads"),
    "blocks": Recipe(method="magnitude", sparsity=0.5, pattern="blocks"),
}
#: Where the number of heads, or of neurons, follows from other sizes.
FIXED_HEADS = ("gpt_neox", "bloom", "opt", "gpt2", "mt5")
FIXED_NEURONS = ("bloom",)


def logits(model: Any) -> torch.Tensor:
    labels = {"labels": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, **labels).logits
    return found


def loaded(folder: Path) -> Any:
    kind = AutoModelForSeq2SeqLM if "mt5" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return kind.from_pretrained(folder)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_smaller_checkpoint_computes_what_the_masked_model_does(tmp_path, kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    model.save_pretrained(tmp_path / "dense")
    whole = size(tmp_path / "dense")
    anatomy = Anatomy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    variants = dict(zip(RECIPES, prune(model, tokenizer, list(RECIPES.values())), strict=True))
    for pattern, variant in variants.items():
        with variant.applied(model):
            expected = logits(model)
        said = variant.export(model, tokenizer, tmp_path / pattern)
        small = loaded(tmp_path / pattern)
        assert torch.allclose(logits(small), expected, atol=1e-4), pattern
        fixed = (pattern == "heads" and kind in FIXED_HEADS) or (pattern == "neurons" and kind in FIXED_NEURONS)
        fixed |= pattern == "blocks" and kind == "mt5"  # which loses the decoder's first block, and its position biases
        if fixed or (pattern == "neurons+heads" and kind == "bloom"):
            assert said.startswith("full size, with zeros: "), pattern
            assert size(tmp_path / pattern) >= whole - 100
            continue
        assert said.startswith("smaller: "), said
        assert said in (tmp_path / pattern / "README.md").read_text()
        gone = sum(o * i - variant.masks.kept(key) for key, (o, i) in shapes(variant).items())
        if pattern == "neurons+heads" and kind in FIXED_HEADS:
            gone = sum(
                o * i - variant.masks.kept(key)
                for key, (o, i) in shapes(variant).items()
                if "down" in key[1] or "up" in key[1] or "gate" in key[1]
            )
        count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert gone <= count <= gone * 1.1 + 200  # with biases and norms
        assert size(tmp_path / pattern) < whole - 2 * gone
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert Anatomy(model).fingerprint() == anatomy.fingerprint()


def shapes(variant: Variant) -> dict[tuple[int, str], tuple[int, int]]:
    return {key: variant.masks.shape(key) for key in variant.masks}


def test_heads_that_share_one_key_are_cut_out_too(tmp_path):
    model, tokenizer = tiny_model("gemma3_text", num_key_value_heads=1), tiny_tokenizer()
    (variant,) = prune(model, tokenizer, RECIPES["heads"])
    with variant.applied(model):
        expected = logits(model)
    assert variant.export(model, tokenizer, tmp_path / "out") == "smaller: 2 heads in each block"
    small = loaded(tmp_path / "out")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert torch.allclose(logits(small), expected, atol=1e-5)


def test_layers_of_several_kinds_keep_theirs_when_blocks_go(tmp_path):
    model, tokenizer = tiny_model("gemma3_text"), tiny_tokenizer()
    anatomy = Anatomy(model)
    for role in anatomy.roles(0):
        anatomy.set_weight(0, role, anatomy.weight(0, role) * 1e-3)
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.4, pattern="blocks"))
    variant.export(model, tokenizer, tmp_path / "out")
    small = loaded(tmp_path / "out")
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    with variant.applied(model):
        assert torch.allclose(logits(small), logits(model), atol=1e-5)


def test_both_stacks_of_an_encoder_decoder_become_shorter(tmp_path):
    model, tokenizer = tiny_model("mt5"), tiny_tokenizer()
    anatomy = Anatomy(model)
    for layer in (1, 3):
        for role in anatomy.roles(layer):
            anatomy.set_weight(layer, role, anatomy.weight(layer, role) * 1e-3)
    (variant,) = prune(model, tokenizer, RECIPES["blocks"])
    assert variant.export(model, tokenizer, tmp_path / "out") == "smaller: 2 of 4 blocks"
    small = loaded(tmp_path / "out")
    assert (small.config.num_layers, small.config.num_decoder_layers) == (1, 1)
    with variant.applied(model):
        assert torch.allclose(logits(small), logits(model), atol=1e-5)


def test_half_precision_is_kept(tmp_path):
    model, tokenizer = tiny_model().to(torch.bfloat16), tiny_tokenizer()
    (variant,) = prune(model, tokenizer, RECIPES["neurons+heads"])
    assert variant.export(model, tokenizer, tmp_path / "out").startswith("smaller")
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


def test_blocks_that_differ_and_streamed_models_stay_at_full_size_and_say_so(tmp_path):
    folder = checkpoint(tmp_path / "model")
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    scoped, every = prune(
        model,
        tokenizer,
        [Recipe(method="magnitude", sparsity=0.5, pattern="neurons", blocks="1:"), RECIPES["neurons"]],
    )
    said = scoped.export(model, tokenizer, tmp_path / "scoped")
    assert said == (
        "full size, with zeros: its blocks have different numbers of neurons, and a configuration has one for all"
    )
    streamed, _ = load_model(str(folder), dtype="float32", device="cpu", stream=True)
    assert "block by block" in every.export(streamed, tokenizer, tmp_path / "streamed")
    with every.applied(model):
        assert torch.equal(logits(loaded(tmp_path / "streamed")), logits(model))
    again = Variant.between(model, loaded(tmp_path / "streamed"), "again")
    assert again.masks == every.masks


def test_a_smaller_checkpoint_is_not_compared_weight_by_weight(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for pattern, variant in zip(RECIPES, prune(model, tokenizer, list(RECIPES.values())), strict=True):
        variant.export(model, tokenizer, tmp_path / pattern)
        with pytest.raises(VariantError, match=r"shapes differ; where blocks, .* \(export --stream\)"):
            Variant.between(model, loaded(tmp_path / pattern), "small")


# Biases


FLAP = Recipe(method="flap", sparsity=0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bloom", "opt"])
def test_biases_travel_to_checkpoints_that_have_a_place_for_them(tmp_path, kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    (variant,) = prune(model, tokenizer, FLAP, CORPUS, SHORT)
    with variant.applied(model):
        expected = logits(model)
    assert "full size, with zeros" in variant.export(model, tokenizer, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert torch.allclose(logits(again), expected, atol=1e-5)
    imported = Variant.between(model, again, "again")
    with imported.applied(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_narrower_checkpoint_has_biases_too(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (variant,) = prune(model, tokenizer, FLAP.model_copy(update={"allocation": "uniform"}), CORPUS, SHORT)
    with variant.applied(model):
        expected = logits(model)
    assert (
        variant.export(model, tokenizer, tmp_path / "out") == "smaller: 24 neurons in each MLP, 2 heads in each block"
    )
    assert torch.allclose(logits(loaded(tmp_path / "out")), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_biases_that_no_checkpoint_can_hold_are_refused(tmp_path, kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    variant, without = prune(
        model, tokenizer, [FLAP, Recipe(method="flap", sparsity=0.5, parameters={"bias": 0})], CORPUS, SHORT
    )
    with pytest.raises(VariantError, match=r"has no bias of (o|down); prune with parameters = \{ bias = 0 \}"):
        variant.export(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert without.export(model, tokenizer, tmp_path / "out").startswith("full size")
