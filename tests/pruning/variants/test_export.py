"""Exported checkpoints are the applied variant, whole or streamed, and say what was done."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from checkpoints import CORPUS, SHORT, checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pruning import CalibrationSet, MaskSet, Recipe, Variant, load_model, prune
from pruning.models.checkpoint import INDEX, Shards
from pruning.variants.export import model_card
from pruning.variants.store import VariantRecord

RECIPES = [
    Recipe(method="sparsegpt", sparsity=0.5),
    Recipe(method="magnitude", sparsity=0.3, roles=("o",), blocks="1:"),
]
KINDS = [
    *("llama", "gemma3_text", "gemma3", "gpt2", "opt", "bloom", "gpt_neox", "phi3"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "mt5"),
]
IDS = torch.arange(3, 20)[None]


def logits(model):
    labels = {"labels": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **labels).logits


def load(folder):
    kind = AutoModelForSeq2SeqLM if "mt5" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return kind.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_of_streamed_and_whole_models_are_the_applied_variant(tmp_path, capfd, kind):
    folder = checkpoint(tmp_path / "model", kind)
    whole, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    streamed, _ = load_model(str(folder), dtype="float32", device="cpu", stream=True)
    for number, variant in enumerate(prune(whole, tokenizer, RECIPES, CORPUS, SHORT)):
        with variant.applied(whole):
            expected = logits(whole)
        places = [tmp_path / f"{number}-{name}" for name in ("whole", "streamed")]
        for place, model in zip(places, (whole, streamed), strict=True):
            capfd.readouterr()
            variant.export(model, tokenizer, place)
            assert capfd.readouterr() == ("", "")  # no progress bars of transformers
            assert torch.equal(logits(load(place)), expected)
        assert_same_files(*places)
    assert all(parameter.is_meta for parameter in streamed.parameters())


def assert_same_files(whole, streamed):
    """The shards are cut otherwise; everything else is byte for byte the same."""
    one, other = Shards(whole), Shards(streamed)
    assert one.shapes == other.shapes
    tensors = [shards.tensors(shards.files) for shards in (one, other)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    rest = {path.name for path in whole.iterdir() if path.suffix != ".safetensors"}
    assert rest == {
        "README.md",
        "config.json",
        "generation_config.json",
        "recipe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in streamed.iterdir() if path.suffix != ".safetensors"} == rest | {INDEX}
    for name in rest:
        assert (whole / name).read_bytes() == (streamed / name).read_bytes(), name
    index = json.loads((streamed / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors[1].values())
    assert list(index["weight_map"]) == sorted(tensors[1])


def test_streamed_export_is_in_the_dtype_of_the_model_and_copies_nothing_but_json(tmp_path):
    folder = checkpoint(tmp_path / "model")
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "old.safetensors").write_bytes(b"weights")
    (folder / "folder.json").mkdir()
    (folder / "recipe.json").write_text('{"somebody": "else"}')
    (folder / "preprocessor_config.json").write_text("{}")
    model, tokenizer = load_model(str(folder), dtype="bfloat16", device="cpu", stream=True)
    (variant,) = prune(model, tokenizer, RECIPES[1])
    variant.export(model, tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "preprocessor_config.json" in names
    assert names.isdisjoint({"modeling_llama.py", "pytorch_model.bin", "old.safetensors", "folder.json"})
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["id"] == variant.id
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_an_export_that_fails_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    from pruning.variants import export

    folder = checkpoint(tmp_path / "model")
    model, _ = load_model(str(folder), dtype="float32", device="cpu", stream=True)
    (variant,) = prune(model, tokenizer, RECIPES[1])

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", fails)
    with pytest.raises(KeyboardInterrupt):
        variant.export(model, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert all(parameter.is_meta for parameter in model.parameters())


# The model card


def parts(card: str) -> tuple[dict, str]:
    start, front, text = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


def card(recipe=None, calibration=None, *, model="google/gemma-3-270m", remarks=(), values=None):
    masks = MaskSet.pack({(0, "q"): torch.tensor([[True, False]]), (0, "gate.1"): torch.ones(1, 4, dtype=torch.bool)})
    name = recipe.variant_id(calibration) if recipe else "theirs"
    record = VariantRecord(
        id=name, model=model, model_fingerprint="abc", recipe=recipe, calibration=calibration, remarks=remarks
    )
    return parts(model_card(Variant(record, masks, values or {})))


def test_card_of_a_calibrated_variant_states_the_recipe():
    recipe = Recipe(method="wanda", sparsity=0.5, allocation="owl", parameters={"outlier": 7}, roles=("q", "gate"))
    front, text = card(recipe, CalibrationSet.named("en+no", samples=4, length=64, seed=3))
    assert front == {
        "library_name": "transformers",
        "base_model": "google/gemma-3-270m",
        "tags": ["pruned", "prunescope", "wanda"],
        "language": ["en", "no"],  # not False, which a bare no is in YAML
    }
    for words in (
        "# wanda-0.5-row-owl-outlier=7-q+gate-pruned-en+no-s3\n",
        "**16.7 %**",
        "| method | wanda (Sun et al., ICLR 2024, 2306.11695) |",
        "| allocation | owl(outlier=7) |",
        "| scope | q gate |",
        "| propagation | pruned |",
        "| samples | 4 × 64 tokens, seed 3 |",
        "| q | 50.00 % |",
        "| gate | 0.00 % |",
    ):
        assert words in text, words
    assert "Remarks" not in text


def test_card_of_a_diagnosed_variant_says_which_diagnosis():
    recipe = Recipe(method="magnitude", sparsity=0.5, allocation="diagnosis", importance={"0.q": 1, "0.gate.1": 2})
    _, text = card(recipe)
    assert (
        f"| allocation | diagnosis={recipe.importance_sha256[:6]} |\n| diagnosis (SHA-256) | `{recipe.importance_sha256}`"
        in text
    )
    assert "importance of 2 matrices, in `recipe.json`" in text


def test_card_of_an_uncalibrated_variant_speaks_of_no_text():
    front, text = card(Recipe(method="magnitude", sparsity=0.3), remarks=("block 1: odd", "block 2: odder"))
    assert "language" not in front
    assert "samples" not in text
    assert "| propagation | none |" in text
    assert "## Remarks\n\n- block 1: odd\n- block 2: odder\n" in text


def test_card_of_a_model_pruned_elsewhere_claims_nothing():
    front, text = card(values={(0, "q"): torch.ones(1)})
    assert front["tags"] == ["pruned", "prunescope"]
    assert "Pruned elsewhere; what was done is not known." in text
    assert "corrected" not in text


@pytest.mark.parametrize("model", ["demo model (4-bit: rounded)", "/home/me/llama", "", "C:\\models"])
def test_only_a_hub_id_is_a_base_model(model):
    front, text = card(model=model)
    assert "base_model" not in front
    assert model in text


def test_card_tells_corrected_from_untouched_weights():
    recipe = Recipe(method="sparsegpt", sparsity=0.5)
    calibration = CalibrationSet.named("en")
    assert "corrected to make up" in card(recipe, calibration, values={(0, "q"): torch.ones(1)})[1]
    assert "the others are those of the dense model" in card(recipe, calibration)[1]
