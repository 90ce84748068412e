"""A whole study of an encoder-decoder: pruned, read, asked, diagnosed and reported."""

from __future__ import annotations

import re

import numpy as np
import pytest
from checkpoints import saved
from command_line import prunescope
from conftest import tiny_model
from pages import written

from analysis import read_frame
from analysis.frames import STUDY_FRAMES, labels
from probes import Session, item_questions, score
from probes.items import Item
from pruning import Recipe, load_model, prune

pytestmark = pytest.mark.usefixtures("sketched")
VARIANT = "magnitude-0.7-matrix"
STUDY = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = ["en", "sw"]
samples = 4
length = 32
[[recipes]]
method = "wanda"
sparsity = 0.5
[[recipes]]
method = "magnitude"
sparsity = 0.7
[evaluation]
segments = 8
fit_segments = 4
max_length = 40
[tasks]
items = "file:riddles/{lang}.jsonl"
"""
SELF = {"q", "k", "v", "o", "gate", "up", "down", "residual"}
CROSS = {"cross_q", "cross_k", "cross_v", "cross_o"}


def write_riddles(folder):
    """Items whose answers are what the dense model prefers more than the variant does."""
    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.7))
    session, rng = Session(model, tokenizer), np.random.default_rng(3)

    def text(length):
        return "".join(rng.choice(list("abcdefghijklmnop"), length))

    items = [Item(id=f"{i}", prompt=text(8), choices=(text(2), text(3)), answer=0) for i in range(20)]
    questions = item_questions(session, items)
    dense = score(session, questions).values
    with variant.applied(model):
        lost = dense - score(session, questions).values
    (folder / "riddles").mkdir()
    for language in ("en", "sw"):
        answered = [
            item.model_copy(update={"answer": int(own.argmax())}) for item, own in zip(items, lost, strict=True)
        ]
        lines = "".join(item.model_dump_json() + "\n" for item in answered)
        (folder / "riddles" / f"{language}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    saved(tiny_model("mt5", max_position_embeddings=1024), folder / "model", shard="1GB")
    write_riddles(folder)
    (folder / "study.toml").write_text(STUDY)
    return folder


def test_an_encoder_decoder_is_pruned_read_asked_and_diagnosed(place, tmp_path):
    out = tmp_path / "out"
    result = prunescope("run", place / "study.toml", "--out", out)
    assert result.returncode == 0, result.stderr
    frames = {name: read_frame(out / "frames" / f"{name}.parquet") for name in STUDY_FRAMES}
    signal = frames["signal"]
    by_layer = {int(layer): set(rows["role"].astype(str)) for layer, rows in signal.groupby("layer")}
    assert by_layer == {0: SELF, 1: SELF, 2: SELF | CROSS, 3: SELF | CROSS}
    assert labels.encoder_blocks(signal) == 2
    assert np.isfinite(signal["value"]).all()
    for name in ("subspaces", "geometry", "language_neurons"):
        assert set(frames[name]["layer"].dropna()) == {0, 1, 2, 3}, name
    assert set(frames["mask_overlap"]["role"].astype(str)) == (SELF | CROSS) - {"residual"}
    assert len(frames["items"]) > 0
    assert np.isfinite(frames["perplexity"]["value"]).all()
    page = written(out / "report.html")
    assert not re.search(r"\b(nan|None)\b", page)
    assert "each read whole by the encoder; the decoder predicts its second half" in page
    assert "The SNR of the residual stream of the encoder is" in page

    words = ["--variant", VARIANT, "--language", "sw", "--category", "all", "--confirm", 2, "--sample", 1]
    result = prunescope("diagnose", out, *words)
    assert result.returncode == 0, result.stderr
    frame = read_frame(out / "diagnoses" / f"{VARIANT}-sw-all" / "recovery.parquet")
    assert labels.encoder_blocks(frame) == 2
    outputs = frame[(frame["component"] == "output") & (frame["metric"] == "attributed_restored")]
    roles = {layer: set(rows["role"].astype(str)) for layer, rows in outputs.groupby("layer")}
    assert roles == {0: SELF - {"residual"}, 1: SELF - {"residual"}} | dict.fromkeys(
        (2, 3), (SELF | CROSS) - {"residual"}
    )
    curve = frame[(frame["component"] == "residual") & (frame["metric"] == "margin_restored")]
    lost = frame[(frame["metric"] == "margin_lost") & (frame["estimated_on"] == "all")]["value"].iloc[0]
    everything = curve[(curve["layer"] == 3) & (curve["estimated_on"] == "all")]["value"].iloc[0]
    assert lost > 0
    assert everything == pytest.approx(lost, rel=1e-3)  # the whole stream after the last block is the dense model
    assert f"diagnosis-curves-{VARIANT}-sw-all" in written(out / "report.html")

    exported = tmp_path / "exported"
    assert prunescope("export", out, exported, "--variant", VARIANT).returncode == 0
    words = ["--out", tmp_path / "compared", "--languages", "en,sw", "--segments", 4]
    result = prunescope("compare", place / "model", exported, *words)
    assert result.returncode == 0, result.stderr
    compared = read_frame(tmp_path / "compared" / "frames" / "signal.parquet")
    assert set(compared["role"].astype(str)) == SELF | CROSS
