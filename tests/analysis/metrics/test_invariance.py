"""No number in any frame depends on how the text was cut into batches; bfloat16 changes them by its rounding only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from analysis.frames import dense_columns
from analysis.metrics import contrasts, lape, lsar, perplexity, signal
from probes import DENSE, Session, pooled_states, read_against_dense
from pruning import CalibrationSet, Corpus, Recipe, prune, text_source

LANGUAGES = ("en", "sw", "zh")


def all_frames(variants: list[Any], model: Any, tokenizer: Any, corpus: Corpus, **settings: Any) -> dict[str, Any]:
    session = Session(model, tokenizer, max_length=48, **settings)
    readings = {}
    for language in LANGUAGES:
        read = read_against_dense(session, corpus.take("heldout", language, 12), variants)
        readings |= {(name, language): one for name, one in read.items()}
    fitting = corpus.aligned("parallel", LANGUAGES, 12)
    subspaces = lsar.fit_layers({lang: pooled_states(session, segments) for lang, segments in fitting.items()})
    columns = {DENSE: dense_columns("m")} | {variant.id: variant.columns() for variant in variants}
    ids = {language: [s.id for s in corpus.take("heldout", language, 12)] for language in LANGUAGES}
    language_neurons, selection = lape.analyze(readings, columns)
    return {
        "perplexity": perplexity.analyze(readings, columns),
        "signal": signal.analyze(readings, columns),
        "subspaces": lsar.analyze(readings, columns, subspaces, ids),
        "contrasts": contrasts.analyze(readings, columns, subspaces),
        "neurons": lape.neurons(readings, columns),
        "language_neurons": language_neurons,
        "neuron_selection": selection,
    }


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    model, tokenizer, text = tiny_model(), tiny_tokenizer(), text_source("bundled")
    corpus = Corpus(text, text, text)
    sets = [CalibrationSet.named(lang, samples=4, length=32) for lang in ("en", "sw")]
    variants = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), corpus, sets)
    return variants, model, tokenizer, corpus


@pytest.fixture(scope="module")
def reference(study):
    return all_frames(*study, batch_tokens=1)


@pytest.mark.parametrize(
    "settings",
    [{"batch_tokens": 3 * 48}, {"batch_tokens": 8 * 48}, {"batch_tokens": 8 * 48, "padding": "left"}],
    ids=["three at a time", "eight at a time", "padded on the left"],
)
def test_batches_and_padding_change_no_frame(study, reference, settings):
    for name, frame in all_frames(*study, **settings).items():
        pd.testing.assert_frame_equal(frame.drop(columns=["value"]), reference[name].drop(columns=["value"]), rtol=1e-3)
        np.testing.assert_allclose(frame["value"], reference[name]["value"], rtol=1e-3, atol=1e-5, err_msg=name)


def test_bfloat16_changes_values_by_its_rounding(study, reference):
    _, _, tokenizer, corpus = study
    torch.manual_seed(0)
    model = tiny_model().to(torch.bfloat16)
    sets = [CalibrationSet.named(lang, samples=4, length=32) for lang in ("en", "sw")]
    halves = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), corpus, sets)
    frames = all_frames(halves, model, tokenizer, corpus, batch_tokens=8 * 48)
    for name, metric, rounding in (
        ("perplexity", "perplexity", 0.02),
        ("perplexity", "bits_per_byte", 0.01),
        ("signal", "snr_db", 0.1),
        ("subspaces", "agnostic_error_centred", 0.1),
    ):
        before, after = (f[name][f[name]["metric"] == metric]["value"].to_numpy() for f in (reference, frames))
        assert np.abs(after - before).mean() <= rounding * np.abs(before).mean(), metric
