from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pruning import Anatomy, CalibrationSet, Corpus, Recipe, Variant, prune
from pruning.errors import DiskError, VariantError
from pruning.text import BundledText


@pytest.fixture
def variant(model, tokenizer):
    source = BundledText()
    calibration = CalibrationSet.named("en+sw", samples=4, length=16)
    return prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), Corpus(source, source, source), calibration)[0]


def test_dense_model_is_restored_bit_for_bit(model, variant):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with variant.applied(model):
        weight = Anatomy(model).weight(0, "q")
        assert int((weight == 0).sum()) == weight.numel() // 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dense_model_is_restored_when_the_block_fails(model, variant):
    before = Anatomy(model).weight(1, "down").clone()
    with pytest.raises(RuntimeError, match="on purpose"), variant.applied(model):
        raise RuntimeError("on purpose")
    assert torch.equal(Anatomy(model).weight(1, "down"), before)


def test_saved_variant_opens(tmp_path, variant, model):
    variant.save(tmp_path / "v")
    opened = Variant.open(tmp_path / "v", Anatomy(model).fingerprint())
    assert opened.record == variant.record
    assert opened.masks == variant.masks


def test_variant_of_another_model_is_refused(tmp_path, variant, make_model):
    variant.save(tmp_path / "v")
    other = make_model(seed=5)
    with pytest.raises(VariantError, match="belongs to another model"):
        Variant.open(tmp_path / "v", Anatomy(other).fingerprint())
    with pytest.raises(VariantError, match="belongs to another model"), variant.applied(other):
        pass


def test_variant_cannot_be_applied_twice(model, variant):
    variant.apply(model)
    with pytest.raises(VariantError, match="pruned already"):
        variant.apply(model)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"id": 3'])
def test_damaged_recipe_is_refused(tmp_path, variant, content):
    variant.save(tmp_path / "v")
    (tmp_path / "v" / "recipe.json").write_text(content)
    with pytest.raises(VariantError, match="damaged"):
        Variant.open(tmp_path / "v")


def test_missing_variant_is_refused(tmp_path):
    with pytest.raises(VariantError, match="no pruned variant"):
        Variant.open(tmp_path)


def test_exported_checkpoint_loads_and_is_the_pruned_model(tmp_path, model, tokenizer, variant):
    ids = torch.arange(3, 20)[None]
    variant.export(model, tokenizer, tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    with torch.no_grad(), variant.applied(model):
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    weight = Anatomy(loaded).weight(2, "gate")
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert json.loads((tmp_path / "checkpoint" / "recipe.json").read_text())["recipe"]["method"] == "wanda"


def test_export_never_overwrites(tmp_path, model, tokenizer, variant):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DiskError, match="not empty"):
        variant.export(model, tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
