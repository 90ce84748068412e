"""Studies of other shapes, of other architectures, and with models that were pruned elsewhere."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoints import CORPUS, checkpoint, saved
from command_line import prunescope
from pages import written
from studies import STUDY

from analysis import read_frame
from analysis.frames import STUDY_FRAMES
from probes import Readings, Session, read_against_dense
from pruning import CalibrationSet, Recipe, Variant, load_model, prune

pytestmark = pytest.mark.usefixtures("sketched")


@pytest.mark.parametrize(
    "change",
    [
        {'sets = ["en", "sw", "all"]': 'sets = ["sw"]'},
        {'sets = ["en", "sw", "all"]': 'sets = ["en"]', 'extra = [["sw", 1]]': ""},
        {'method = "wanda"': 'method = "magnitude"\npattern = "row"'},
        {'method = "wanda"': 'method = "wanda"\npropagation = ["pruned", "dense"]'},
    ],
    ids=["one language, two seeds", "one calibration set", "no calibration", "grid of propagations"],
)
def test_studies_of_other_shapes_run_too(place, tmp_path, change):
    text = STUDY
    for old, new in change.items():
        text = text.replace(old, new)
    (place / "other.toml").write_text(text)
    result = prunescope("run", place / "other.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert not re.search(r"\bnan\b", written(tmp_path / "out" / "report.html"))


def small(place, tmp_path, model, *lines):
    """Run a small study of another model; return its folder."""
    text = STUDY.replace('"en", "sw", "zh"]', '"en", "sw"]').replace(
        'sets = ["en", "sw", "all"]', 'sets = ["en", "sw"]'
    )
    text = text.replace('extra = [["sw", 1]]\n', "").replace('model = "model"', f'model = "{model}"')
    (tmp_path / "study.toml").write_text(text + "\n".join(lines))
    result = prunescope("run", tmp_path / "study.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    page = written(tmp_path / "out" / "report.html")
    assert not re.search(r"\b(nan|None)\b", page)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("gpt2", {"q", "k", "v", "o", "up", "down"}),
        ("mixtral", {"q", "k", "v", "o"}),
        ("qwen2_moe", {"q", "k", "v", "o", "gate", "up", "down"}),  # its first block has no experts
    ],
)
def test_models_without_gates_or_with_experts_are_read_too(place, tmp_path, kind, roles):
    out = small(place, tmp_path, checkpoint(tmp_path / "model", kind, max_position_embeddings=1024))
    frames = {name: read_frame(out / "frames" / f"{name}.parquet") for name in STUDY_FRAMES}
    assert set(frames["signal"]["role"]) == roles | {"residual"}
    assert len(frames["language_neurons"])
    assert (len(frames["routing"]) > 0) == (kind != "gpt2")
    drawn = {re.sub("-(wanda|magnitude).*", "", path.stem) for path in (out / "figures").glob("routing*.png")}
    assert drawn == ({"routing", "routing-layers", "routing-languages"} if kind != "gpt2" else set())
    page = written(out / "report.html")
    assert ("of its top-k slots to experts that the dense model does not choose" in page) == (kind != "gpt2")
    kinds = {role.partition(".")[0] for role in frames["mask_overlap"]["role"]}
    assert kinds >= roles
    assert ("gate.3" in set(frames["sparsity"]["role"])) == (kind != "gpt2")


def test_quantized_models_are_measured_beside_pruned_ones_without_masks(place, tmp_path):
    lines = [
        "[[recipes]]",
        'method = ["rtn", "gptq"]',
        "bits = [4, 2]",
        "group = 16",
        "[lens]",
        "tokens = 12",
        "tuned = true",
    ]
    out = small(place, tmp_path, place / "model", *lines)
    frames = {name: read_frame(out / "frames" / f"{name}.parquet") for name in STUDY_FRAMES}
    for name in ("perplexity", "signal", "subspaces", "accuracy"):
        sizes = frames[name].groupby(["method", "pattern"], observed=True)["bits"].unique().map(list).to_dict()
        assert sizes == {
            **({} if name == "signal" else {("dense", "none"): [16.0]}),  # which it is compared with
            ("wanda", "row"): [9.0],
            ("magnitude", "matrix"): [pytest.approx(16 * 0.7 + 1, abs=0.02)],
            **{(m, f"{bits}bit-g16"): [bits + (16 + bits) / 16] for m in ("rtn", "gptq") for bits in (4, 2)},
        }
    assert set(frames["sparsity"]["method"]) == {"wanda", "magnitude"}
    overlap = frames["mask_overlap"]
    by_metric = overlap.groupby("metric", observed=True)["method"].unique().map(list).to_dict()
    assert by_metric["iou"] == ["wanda"]
    assert by_metric["code_agreement"] == ["gptq"]
    noise = frames["signal"].query("metric == 'snr_db' and role == 'residual' and layer == 2")
    quality = noise.groupby(["method", "pattern"], observed=True)["value"].mean()
    assert quality["gptq", "4bit-g16"] > quality["rtn", "4bit-g16"] > quality["rtn", "2bit-g16"]
    page = written(out / "report.html")
    assert "GPTQ, 4 bits, groups of 16" in page
    lens = frames["lens"].groupby("metric", observed=True)["method"].unique().map(set).to_dict()
    assert lens["kl"] == {"dense", "wanda", "magnitude", "rtn", "gptq"}
    assert lens["kl_change"] == lens["kl"] - {"dense"}
    assert "The final prediction is" in page
    drawn = {path.stem for path in (out / "figures").glob("lens*.png")}
    assert {"lens-languages", "lens-wanda-0.5-row-pruned", "lens-tuned-tokens-wanda-0.5-row-pruned"} <= drawn
    assert {"lens-margins-bundled-wanda-0.5-row-pruned", "lens-tuned-margins-bundled-gptq-4bit-g16-pruned"} <= drawn
    margins = frames["lens_margins"]
    assert set(margins["method"]) == lens["kl"]
    assert set(margins["category"]) == set(frames["accuracy"]["category"])
    assert "Compression multiplies perplexity by" in page
    assert (
        "Quantized models have no masks: there is no sparsity and no overlap of masks; the agreement of their" in page
    )
    assert "Codes from different calibration sets agree at a mean rate of" in page


def test_variants_are_measured_before_and_after_fine_tuning(place, tmp_path):
    lines = ["[[recipes]]", 'method = "magnitude"', "sparsity = 0.3", 'recover = "fine-tune"']
    lines += ["parameters = { steps = 3, batch = 4, rate = 0.01 }"]
    out = small(place, tmp_path, place / "model", *lines)
    tuned = "magnitude+fine-tune(batch=4, rate=0.01, steps=3)"
    frames = {name: read_frame(out / "frames" / f"{name}.parquet") for name in STUDY_FRAMES}
    for name in ("perplexity", "signal", "subspaces", "geometry", "language_neurons", "accuracy", "sparsity"):
        assert {"magnitude", tuned} <= set(frames[name]["method"]), name
    size = frames["sparsity"].groupby("method", observed=True)[["value", "bits"]].mean()
    assert tuple(size.loc["magnitude"]) == tuple(size.loc[tuned])
    overlap = frames["mask_overlap"]
    overlap = overlap[overlap["method"] == tuned].groupby("metric", observed=True)["value"].mean()
    assert overlap["iou"] == 1  # magnitude chooses the same whatever the text; only what follows differs
    assert overlap["correction_cosine"] < 0.9
    perplexity = frames["perplexity"]
    perplexity = perplexity[perplexity["metric"] == "perplexity"].groupby("method", observed=True)["value"].mean()
    assert perplexity[tuned] < perplexity["magnitude"]  # of random weights: any text helps
    variant = "magnitude+fine-tune-0.3-matrix-batch=4-rate=0.01-steps=3-pruned-sw-s0"
    result = prunescope("export", out, tmp_path / "exported", "--variant", variant)
    assert result.returncode == 0, result.stderr
    assert "fine-tuned" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")


def test_models_pruned_elsewhere_are_measured_beside_the_variants(place, tmp_path):
    model, tokenizer = load_model(str(place / "model"), device="cpu")
    text = CalibrationSet.named("sw", samples=4, length=32)
    ours, theirs = prune(model, tokenizer, [Recipe(method=m, sparsity=0.25) for m in ("ria", "wanda")], CORPUS, text)
    ours.export(model, tokenizer, tmp_path / "ours")
    theirs.apply(model)
    saved(model, tmp_path / "theirs")
    lines = ["[imported]", 'mine = "ours"', '"llm-toolbox" = "theirs"']
    out = small(place, tmp_path, place / "model", *lines)
    frame = read_frame(out / "frames" / "perplexity.parquet")
    by_method = frame.drop_duplicates("method").set_index("method")
    assert by_method.loc["ria", ["sparsity", "pattern", "calibration"]].tolist() == [0.25, "matrix", "sw"]
    assert by_method.loc["llm-toolbox", ["sparsity", "pattern", "calibration"]].tolist() == [0.25, "unknown", "none"]
    assert (by_method["model"] == str(place / "model")).all()
    assert {"llm-toolbox", "mine"} <= {path.name for path in (out / "variants").iterdir()}
    html = written(out / "report.html")
    assert "Llm-toolbox, sparsity 0.25, pruned elsewhere" in html


def test_a_model_trained_elsewhere_in_all_its_parts_is_measured_as_it_is(place, tmp_path):
    other, tokenizer = load_model(str(place / "model"), dtype="float32", device="cpu")
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    saved(other, tmp_path / "theirs")
    out = small(place, tmp_path, place / "model", "[imported]", 'tuned = "theirs"')
    frame = read_frame(out / "frames" / "perplexity.parquet")
    assert set(frame[frame["method"] == "tuned"]["pattern"]) == {"changed"}
    variant = Variant.open(out / "variants" / "tuned")
    assert (out / "variants" / "tuned" / "others.safetensors").is_file()
    for language in ("en", "sw"):
        readings = Readings.open(out / "readings" / "tuned" / f"{language}.safetensors")
        segments = CORPUS.take("heldout", language, len(readings.nll))
        alone = read_against_dense(Session(other, tokenizer, max_length=40), segments)["dense"]
        torch.testing.assert_close(readings.nll, alone.nll, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(readings.pooled, alone.pooled, rtol=1e-4, atol=1e-5)
    assert "also changed: 7 of 7 norm parameters (by " in (out / "report.html").read_text(encoding="utf-8")
    result = prunescope("export", out, tmp_path / "exported", "--variant", "tuned")
    assert result.returncode == 0, result.stderr
    again, _ = load_model(str(tmp_path / "exported"), dtype="float32", device="cpu")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    assert variant.others.keys() >= {"lm_head.weight", "model.norm.weight"}
