"""Models of the first study's kinds, BLOOM's and Qwen's: no BOS before a text, ALiBi, tied heads; from text to causes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CORPUS
from command_line import prunescope
from conftest import tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from analysis import read_frame
from analysis.study import figures
from probes.items import Item
from pruning import CalibrationSet, Recipe, load_model, prune
from pruning.text.calibration import CalibrationText

VARIANT = "wanda-0.6-row-pruned-sw-s0"
STUDY = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = ["sw"]
samples = 4
length = 32
[[recipes]]
method = "wanda"
sparsity = 0.6
[evaluation]
segments = 6
fit_segments = 4
max_length = 40
[tasks]
items = "file:riddles/{lang}.jsonl"
"""
#: BLOOM names a BOS token that its tokenizer does not set, and pads on the left; Qwen's has none, and pads on the right
#: with the token that ends a text.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "bloom": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "padding_side": "left"},
    "qwen2": {"bos_token": None, "eos_token": "<eos>", "pad_token": "<eos>", "padding_side": "right"},
}
KINDS = list(TOKENIZERS)
SWAHILI = CalibrationSet.named("sw", samples=4, length=32)


def without_bos(kind: str) -> PreTrainedTokenizerFast:
    backend = tiny_tokenizer().backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **TOKENIZERS[kind])


def riddles(folder: Path) -> list[Item]:
    """Questions of random letters, with choices of different lengths, whose answer is the choice that pruning hurts."""
    model, tokenizer = load_model(str(folder), device="cpu")
    (variant,) = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.6), CORPUS, SWAHILI)
    rng = np.random.default_rng(5)

    def word(length: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmnop"), length))

    items = [
        Item(
            id=f"{number}",
            twin=f"{number // 2}",
            category="reasoning",
            prompt=word(int(rng.integers(5, 12))),
            choices=(word(2), word(3)),
            answer=0,
        )
        for number in range(16)
    ]
    dense = scores_of(model, tokenizer, items)
    with variant.applied(model):
        lost = dense - scores_of(model, tokenizer, items)
    return [item.model_copy(update={"answer": int(own.argmax())}) for item, own in zip(items, lost, strict=True)]


@torch.no_grad()
def log_likelihoods(model: Any, ids: list[int]) -> torch.Tensor:
    """Return that of every token but the first, of one text by itself: no padding, no BOS."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def scores_of(model: Any, tokenizer: Any, items: list[Item]) -> np.ndarray:
    """Return the log-likelihood of every choice after its prompt, ``[items, choices]``; a letter is a token."""
    return np.array(
        [
            [
                float(log_likelihoods(model, tokenizer(item.prompt + choice)["input_ids"])[-len(choice) :].sum())
                for choice in item.choices
            ]
            for item in items
        ]
    )


@pytest.fixture(scope="module", params=KINDS)
def diagnosed(request, tmp_path_factory):
    """A study from text to causes: its folder, the model's, and what was asked."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    tiny_model(kind, tie_word_embeddings=True).save_pretrained(folder / "model")
    without_bos(kind).save_pretrained(folder / "model")
    items = riddles(folder / "model")
    (folder / "riddles").mkdir()
    for language in ("en", "sw"):
        lines = "".join(item.model_dump_json() + "\n" for item in items)
        (folder / "riddles" / f"{language}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "study.toml").write_text(STUDY)
    options = ["--variant", VARIANT, "--language", "sw", "--confirm", 2, "--sample", 1, "--positions", "all"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "study_figures", lambda *_: iter(()))  # they take most of the time
        for words in (
            ["run", folder / "study.toml", "--out", folder / "out"],
            ["diagnose", folder / "out", *options],
        ):
            result = prunescope(*words)
            assert result.returncode == 0, result.stderr
    return folder / "out", folder / "model", items


@pytest.fixture(scope="module")
def models(diagnosed) -> dict[str, Any]:
    """The dense model as saved, and the variant as exported: loaded by transformers alone."""
    out, dense, _ = diagnosed
    result = prunescope("export", out, out.parent / "exported", "--variant", VARIANT)
    assert result.returncode == 0, result.stderr
    return {
        name: AutoModelForCausalLM.from_pretrained(place).eval()
        for name, place in (("dense", dense), ("wanda", out.parent / "exported"))
    }


def test_no_bos_is_set_before_calibration_text(diagnosed):
    _, dense, _ = diagnosed
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert tokenizer("Habari")["input_ids"] == [tokenizer.convert_tokens_to_ids(letter) for letter in "Habari"]
    drawn = CalibrationText.draw(tokenizer, CORPUS, [SWAHILI])
    used = torch.cat(list(drawn.tokens.values())).unique().tolist()
    assert not set(used) & {tokenizer.convert_tokens_to_ids(name) for name in ("<bos>", "<pad>")}


def test_heads_stay_tied_and_pruned_models_load_by_themselves(models):
    for model in models.values():
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    dense, pruned = (model.get_input_embeddings().weight for model in models.values())
    assert torch.equal(dense, pruned)
    weights = [(name, p) for name, p in models["wanda"].named_parameters() if p.ndim == 2 and "embed" not in name]
    zeros = sum(int((p == 0).sum()) for _, p in weights) / sum(p.numel() for _, p in weights)
    assert zeros == pytest.approx(0.6, abs=0.02)  # rows of 32, 48 and 128 inputs: 19, 28 and 76 of them


def test_perplexity_is_that_of_each_text_by_itself(diagnosed, models):
    out, dense, _ = diagnosed
    tokenizer = AutoTokenizer.from_pretrained(dense)
    frame = read_frame(out / "frames" / "perplexity.parquet")
    found = frame[frame["metric"] == "perplexity"].set_index(["method", "language"])["value"]
    for method, model in models.items():
        for language in ("en", "sw"):
            texts = [segment.text for segment in CORPUS.take("heldout", language, 6)]
            parts = [log_likelihoods(model, tokenizer(text)["input_ids"][:40]) for text in texts]
            expected = float(torch.cat(parts).mean().neg().exp())
            assert found[method, language] == pytest.approx(expected, rel=1e-4), (method, language)


def test_choices_are_scored_as_continuations_of_the_prompt(diagnosed, models):
    out, dense, items = diagnosed
    tokenizer = AutoTokenizer.from_pretrained(dense)
    frame = read_frame(out / "frames" / "items.parquet")
    frame = frame[(frame["metric"] == "log_likelihood") & (frame["language"] == "sw")]
    for method, model in models.items():
        found = frame[frame["method"] == method].pivot(index="item", columns="choice", values="value")
        expected = scores_of(model, tokenizer, items)
        np.testing.assert_allclose(found.loc[[item.id for item in items]], expected, atol=1e-3)


def test_a_diagnosis_finds_the_drop_and_the_last_stream_recovers_all_of_it(diagnosed, models):
    """Where all positions are patched, what follows the last block is the dense model itself."""
    out, dense, items = diagnosed
    tokenizer = AutoTokenizer.from_pretrained(dense)
    margins = {}
    for method, model in models.items():
        scores = scores_of(model, tokenizer, items)
        answers = [item.answer for item in items]
        rows = range(len(items))
        margins[method] = float(np.mean([scores[i, answers[i]] - scores[i, 1 - answers[i]] for i in rows]))
    drop = margins["dense"] - margins["wanda"]
    frame = read_frame(out / "diagnoses" / f"{VARIANT}-sw-reasoning-all-positions" / "recovery.parquet")
    frame = frame[(frame["estimated_on"] == "all") & (frame["direction"] != "damage")]
    lost = frame[frame["metric"] == "margin_lost"]
    stream = frame[(frame["component"] == "residual") & (frame["layer"] == 2)]
    restored, share = (stream[stream["metric"] == f"margin_{name}"] for name in ("restored", "recovery"))
    assert lost["value"].tolist() == pytest.approx([drop], abs=1e-3)
    assert restored["value"].tolist() == pytest.approx([drop], abs=1e-3)
    assert share["value"].tolist() == pytest.approx([1], abs=1e-3)
    first = frame[(frame["component"] == "residual") & (frame["layer"] == 0) & (frame["metric"] == "margin_restored")]
    assert abs(float(first["value"].iloc[0]) - drop) > 1e-2  # so the whole is no matter of course
