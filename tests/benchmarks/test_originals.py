"""The published scripts themselves against ours, on a random model of SmolLM2-135M's shape with 128 samples.

    git clone https://github.com/locuslab/wanda FOLDER
    PRUNESCOPE_BENCH_ORIGINALS=FOLDER make benchmarks

Wanda's repository holds both methods. It was written for transformers 4.28 and fails on current versions, where a block
must be called with position embeddings; here each block is given these before the scripts see it. Nothing else of
theirs is changed. Masks are compared too.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruning import Anatomy, CalibrationSet, Recipe
from pruning.engine import Job, sweep
from pruning.text.calibration import CalibrationText, Piece

FOLDER = os.environ.get("PRUNESCOPE_BENCH_ORIGINALS")
SAMPLES, LENGTH = 128, int(os.environ.get("PRUNESCOPE_BENCH_LENGTH", "256"))
BLOCKS = int(os.environ.get("PRUNESCOPE_BENCH_BLOCKS", "10"))


def random_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def originals(method: str, model: Any, ids: torch.Tensor) -> float:
    """Prune `model` with the published script and return the seconds it took."""
    assert FOLDER is not None
    sys.path.insert(0, FOLDER)
    try:
        import lib.prune as published
    finally:
        sys.path.remove(FOLDER)
    published.get_loaders = lambda *_, **__: ([(row[None], None) for row in ids], None)
    model.seqlen, model.hf_device_map = LENGTH, {}
    positions = torch.arange(LENGTH)[None]
    embeddings = model.model.rotary_emb(torch.zeros(1, LENGTH, 576), positions)
    for block in model.model.layers:
        block.forward = partial(block.forward, position_embeddings=embeddings)
    arguments = SimpleNamespace(nsamples=SAMPLES, seed=0, use_variant=False, sparsity_ratio=0.5)
    began = time.perf_counter()
    with redirect_stdout(StringIO()), patch("torch.cuda.synchronize"):  # they ask for a GPU here
        getattr(published, f"prune_{method}")(arguments, model, None, torch.device("cpu"))
    return time.perf_counter() - began


@pytest.mark.skipif(FOLDER is None, reason="PRUNESCOPE_BENCH_ORIGINALS names no clone of locuslab/wanda")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_ours_against_the_published_script(method, capsys):
    ids = torch.randint(0, 1000, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    calibration = CalibrationSet(name="en", languages=("en",), samples=SAMPLES, length=LENGTH)
    piece = Piece("en", LENGTH, 0, SAMPLES)
    job = Job(Recipe(method=method, sparsity=0.5), calibration)
    anatomy = Anatomy(random_model())
    text = CalibrationText({piece: ids}, {calibration: [piece]})
    began = time.perf_counter()
    pruned = sweep(anatomy, [job], text)(job)
    ours = time.perf_counter() - began
    model = random_model()
    theirs = originals(method, model, ids)
    reference = Anatomy(model)
    same = sum(int((pruned.masks[key] == (reference.weight(*key) != 0)).sum()) for key in reference)
    total = sum(reference.weight(*key).numel() for key in reference)
    assert same / total > 0.9
    with capsys.disabled():
        print(
            f"\n{method}, {BLOCKS} blocks of SmolLM2-135M's shape, {SAMPLES} x {LENGTH} tokens: published script {theirs:.1f} s, "
            f"ours {ours:.1f} s, ratio {theirs / ours:.2f}; {100 * same / total:.3f} % of the mask bits equal"
        )
