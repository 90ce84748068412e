"""A tiny model with a study of it, and figures that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import saved
from conftest import tiny_model
from matplotlib.figure import Figure
from studies import STUDY


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    # the longest bundled items take more than 512 bytes, which are this tokenizer's tokens
    saved(tiny_model(max_position_embeddings=1024), folder / "model", shard="1GB")
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture
def sketched(monkeypatch):
    """Draw each figure once and coarsely: figures take nine tenths of the time of a study of a tiny model."""
    savefig = Figure.savefig

    def sketch(self: Figure, path: Path, *, format: str, **settings: Any) -> None:
        if format == "pdf":
            Path(path).write_bytes(b"%PDF")
        else:
            savefig(self, path, format=format, **settings | {"dpi": 72})

    monkeypatch.setattr(Figure, "savefig", sketch)
