"""What no number in any frame depends on: how the text was cut into batches, and the state of the first token.

bfloat16 changes numbers by its rounding only.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from tokenizers.processors import ByteLevel

from analysis.frames import dense_columns
from analysis.metrics import contrasts, geometry, lape, lsar, perplexity, signal
from probes import DENSE, Readings, Session, pooled_states, read_against_dense
from probes.batches import Batcher
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
        "geometry": geometry.analyze(readings, columns, ids),
        "contrasts": contrasts.analyze(readings, columns, subspaces, ids=ids),
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


class Sink(torch.nn.Module):
    """An activation function whose first token is an attention sink: all neurons fire, and its states are huge."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        first = torch.full_like(value[:, :1], 1e3)
        return torch.cat([first, self.plain(value[:, 1:])], dim=1)


#: Frames that are not about the loss: the second token is predicted from the first one's state.
OF_STATES = ("signal", "subspaces", "neurons", "language_neurons", "neuron_selection")


@pytest.fixture(params=[True, False], ids=["BOS", "no BOS"])
def tokenizer(request):
    found = tiny_tokenizer()
    if not request.param:
        found.backend_tokenizer.post_processor = ByteLevel()
    return found


def test_no_frame_sees_the_state_of_the_first_token(study, tokenizer):
    variants, _, _, corpus = study
    frames = {}
    for skip_first in (True, False):
        for planted in (True, False):
            torch.manual_seed(0)
            model = tiny_model()
            if planted:  # in the last block, where no other token attends to it
                model.model.layers[-1].mlp.act_fn = Sink(model.model.layers[-1].mlp.act_fn)
            frames[skip_first, planted] = all_frames(variants, model, tokenizer, corpus, skip_first=skip_first)
    for name in OF_STATES:
        pd.testing.assert_frame_equal(frames[True, True][name], frames[True, False][name], rtol=1e-5)
    for name in ("signal", "subspaces", "neurons"):  # a sink that counts is seen
        with pytest.raises(AssertionError):
            pd.testing.assert_frame_equal(frames[False, True][name], frames[False, False][name], rtol=1e-2)


def test_after_bos_numbers_are_those_of_all_tokens_but_special_ones(study, reference, monkeypatch):
    """So that nothing that was measured with Gemma's or Llama's tokenizer has changed."""

    def counts(self, ids, *, encoder=False):
        return torch.tensor([token not in self.tokenizer.all_special_ids for token in ids])

    monkeypatch.setattr(Batcher, "counts", counts)
    monkeypatch.setattr(Batcher, "bytes_predicted", lambda self, segment: len(read_part(segment.text).encode()))
    for name, frame in all_frames(*study, batch_tokens=1).items():
        pd.testing.assert_frame_equal(frame, reference[name], check_exact=True)


def read_part(text: str) -> str:
    """Return what 47 tokens of the tiny tokenizer, one a byte, and BOS reach into."""
    ends = np.cumsum([len(letter.encode()) for letter in text])
    return text[: int(np.searchsorted(ends, 47)) + 1]


class OneAtATime(Mapping[tuple[str, str], Readings]):
    """Readings that count how many of them are open at once."""

    def __init__(self, readings: Mapping[tuple[str, str], Readings]) -> None:
        self.readings = readings
        self.open: weakref.WeakSet[Readings] = weakref.WeakSet()
        self.most = 0

    def __getitem__(self, key: tuple[str, str]) -> Readings:
        one = copy(self.readings[key])
        self.open.add(one)
        self.most = max(self.most, len(self.open))
        return one

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.readings)

    def __len__(self) -> int:
        return len(self.readings)


def test_no_analyzer_has_the_readings_of_all_models_open(study):
    """Of two models at most, in all languages: those of one variant, and the dense model's."""
    variants, model, tokenizer, corpus = study
    several = [replace(variants[0], record=variants[0].record.model_copy(update={"id": f"v{i}"})) for i in range(5)]
    seeds = [CalibrationSet.named(lang, samples=4, length=32, seed=i) for i, lang in enumerate(["en", "sw"] * 3)]
    columns = {DENSE: dense_columns("m")}
    session = Session(model, tokenizer, max_length=32)
    held = {}
    for language in LANGUAGES:
        read = read_against_dense(session, corpus.take("heldout", language, 8), variants[:1])
        held[DENSE, language] = read[DENSE]
        for one, calibration in zip(several, seeds, strict=False):
            held[one.id, language] = read[variants[0].id]
            columns[one.id] = one.columns() | {"calibration": calibration.name, "seed": calibration.seed}
    fitting = corpus.aligned("parallel", LANGUAGES, 8)
    subspaces = lsar.fit_layers({lang: pooled_states(session, segments) for lang, segments in fitting.items()})
    ids = {language: [s.id for s in corpus.take("heldout", language, 8)] for language in LANGUAGES}
    for analyze in (
        perplexity.analyze,
        signal.analyze,
        lambda *args: lsar.analyze(*args, subspaces, ids),
        lambda *args: geometry.analyze(*args, ids),
        lambda *args: contrasts.analyze(*args, subspaces),
        lape.analyze,
        lape.distributions,
        lape.neurons,
    ):
        watched = OneAtATime(held)
        analyze(watched, columns)
        assert 0 < watched.most <= 2 * len(LANGUAGES)
