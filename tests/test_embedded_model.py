"""The real multilingual model that the demo extra brings (converted on first use, about a minute)."""

from __future__ import annotations

import pytest
import torch

from analysis.frames import dense_columns
from analysis.metrics import perplexity
from probes import DENSE, Session, read_against_dense
from pruning import Corpus, load_model
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
    torch.testing.assert_close(one.power, other.power, rtol=1e-4, atol=0)
    torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-3, atol=1e-2)
    assert (one.fired - other.fired).abs().sum() <= 1e-5 * one.fired.sum()
