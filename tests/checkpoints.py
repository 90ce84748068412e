"""Tiny checkpoints on disk, and text to calibrate them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from pruning import CalibrationSet, Corpus
from pruning.models.checkpoint import INDEX
from pruning.text.sources import BundledText

CORPUS = Corpus(BundledText(), BundledText(), BundledText())
#: Two languages, so that statistics are put together of several pieces of text.
SHORT = CalibrationSet.named("en+sw", samples=3, length=16)


def checkpoint(folder: Path, kind: str = "llama", *, shard: str = "20KB", **settings: Any) -> Path:
    """Save a tiny random model and its tokenizer, in many small shards, and return the folder."""
    return saved(tiny_model(kind, **settings), folder, shard=shard)


def saved(model: Any, folder: Path, *, shard: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def change_tensors(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the shard that a tensor is in."""
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
