"""The real multilingual model that the demo extra brings (converted on first use, about a minute)."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from analysis.frames import dense_columns
from analysis.metrics import perplexity
from probes import DENSE, Session, read_against_dense
from pruning import CalibrationSet, Corpus, load_model
from pruning.text.calibration import CalibrationText, shared_text
from pruning.text.sources import BUNDLED_LANGUAGES, BundledText


@pytest.fixture(scope="module")
def embedded():
    return load_model("demo", dtype="float32")


@pytest.fixture(scope="module")
def corpus():
    return Corpus(BundledText(), BundledText(), BundledText())


def test_dense_perplexity_is_plausible_and_lowest_in_english(embedded, corpus):
    session = Session(*embedded)
    readings = {
        (DENSE, lang): read_against_dense(session, corpus.take("heldout", lang, 16))[DENSE]
        for lang in BUNDLED_LANGUAGES
    }
    frame = perplexity.analyze(readings, {DENSE: dense_columns("demo")})
    value = frame[frame["metric"] == "perplexity"].set_index("language")["value"]
    assert value.idxmin() == "en"
    assert 20 < value["en"] < 100
    assert value.max() < 600


def test_padding_and_batch_size_change_a_real_model_only_by_rounding(embedded, corpus):
    segments = corpus.take("heldout", "sw", 4)
    one = read_against_dense(Session(*embedded), segments)[DENSE]
    other = read_against_dense(Session(*embedded, batch_tokens=1, padding="left"), segments)[DENSE]
    torch.testing.assert_close(one.nll, other.nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.power, other.power, rtol=1e-4, atol=0, equal_nan=True)
    torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-3, atol=1e-2)
    assert (one.fired - other.fired).abs().sum() <= 1e-5 * one.fired.sum()


def test_three_draws_of_the_bundled_text_are_disjoint(corpus, embedded):
    """Of 32 x 128 tokens of every language, and of mixes."""
    _, tokenizer = embedded
    for name in (*BUNDLED_LANGUAGES, "en+sw", "all"):
        sets = [
            CalibrationSet.named(name, all_languages=BUNDLED_LANGUAGES, samples=32, length=128, seed=seed)
            for seed in range(3)
        ]
        text = CalibrationText.draw(tokenizer, corpus, sets)

        def rows(chosen, text=text):
            return [row for piece in text.pieces[chosen] for row in text.tokens[piece].tolist()]

        for one, other in combinations(sets, 2):
            assert shared_text(text.drawn[one], text.drawn[other]) == 0
            assert not {tuple(row) for row in rows(one)} & {tuple(row) for row in rows(other)}
