"""What was planted in the encoder and in the decoder of a tiny encoder-decoder is found there, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.frames import dense_columns
from analysis.metrics import lape, lsar
from probes import DENSE, DamagedModel, Item, Session, attribute, item_questions, patch, pooled_states
from probes.patching import role_weights
from probes.readers.signal import SIGNAL_SITES
from probes.reading import read_against_dense
from pruning import MaskSet, Recipe, Segment, prune
from pruning.variants.owner import DenseModel

#: Dimensions of the planted model: what all tokens share, what differs between them, and what tells languages apart.
COMMON, CONTENT, LANGUAGE = 0, 1, 2
LETTERS = {"en": "abcdefgh", "sw": "ijklmnop"}
#: Block to the neuron planted in it and its language: one in the encoder, one in the decoder.
PLANTED = {1: (5, "en"), 2: (7, "sw")}


@torch.no_grad()
def planted_model(tiny, tokenizer):
    """A model whose blocks pass on the embeddings, but for two neurons that fire in one language each.

    What these neurons write moves states along the direction that tells the languages apart. All other neurons fire on
    every other letter, in either language.
    """
    model = tiny("mt5")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
        else:
            parameter.fill_(1.0)
    content = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    for language, letters in LETTERS.items():
        for number, letter in enumerate(letters):
            (token,) = tokenizer(letter, add_special_tokens=False)["input_ids"]
            state = content[number].clone()  # letters at one place of both alphabets are translations of each other
            state[[COMMON, CONTENT, LANGUAGE]] = torch.tensor(
                [2.0, (-1.0) ** number, 1.0 if language == "en" else -1.0]
            )
            model.shared.weight[token] = state
    for layer, block in enumerate([*model.encoder.block, *model.decoder.block]):
        mlp = block.layer[-1].DenseReluDense
        mlp.wi_0.weight[:, CONTENT] = 1.0
        mlp.wi_1.weight[:, COMMON] = 1.0
        if layer in PLANTED:
            neuron, language = PLANTED[layer]
            mlp.wi_0.weight[neuron] = 0
            mlp.wi_0.weight[neuron, LANGUAGE] = 1.0 if language == "en" else -1.0
            mlp.wo.weight[LANGUAGE, neuron] = 1.0 if language == "en" else -1.0
    return model


def parallel(language, count, seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(LETTERS[language][i] for i in rng.integers(0, 8, 24)) for _ in range(count)]
    return [Segment(str(i), text) for i, text in enumerate(texts)]


def without(model, tokenizer, *keys):
    """A variant without any weight in these projections, and with all others."""
    (variant,) = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.5)])
    masks = {key: torch.full_like(mask, key not in keys) for key, mask in variant.masks.items()}
    return replace(variant, masks=MaskSet.pack(masks))


@pytest.fixture
def planted(make_model, tokenizer):
    return planted_model(make_model, tokenizer)


def read(session, variant):
    """What the dense model and a variant are measured by, and the columns that describe them."""
    readings = {}
    for language in LETTERS:
        for name, own in read_against_dense(session, parallel(language, 16, 1), [variant]).items():
            readings[name, language] = own
    return readings, {DENSE: dense_columns("tiny"), variant.id: variant.columns() | {"model": "tiny"}}


@pytest.mark.parametrize("layer", list(PLANTED))
def test_the_subspace_is_found_in_both_stacks_and_its_damage_where_it_was_done(planted, tokenizer, layer):
    session = Session(planted, tokenizer)
    variant = without(planted, tokenizer, (layer, "down"))
    readings, columns = read(session, variant)
    subspaces = lsar.fit_layers({lang: pooled_states(session, parallel(lang, 16, 2)) for lang in LETTERS})
    frame = lsar.analyze(readings, columns, subspaces)
    for subspace in subspaces:
        assert abs(subspace.basis_[LANGUAGE, 0]) == pytest.approx(1.0, abs=1e-6)
    rows = frame[frame["method"] != DENSE]
    by_layer = rows.groupby(["metric", "layer"], observed=True)["value"].max()
    damaged = [1] if layer == 1 else [2, 3]  # a decoder whose cross-attention is zero sees nothing of its encoder
    for place in range(4):
        assert (by_layer["specific_error", place] > 0.01) == (place in damaged)
        assert by_layer["agnostic_error", place] < 1e-9


def test_planted_neurons_are_found_in_both_stacks(planted, tokenizer):
    session = Session(planted, tokenizer)
    variant = without(planted, tokenizer, (2, "gate"))  # so that in the decoder none of this block fires any more
    readings, columns = read(session, variant)
    chosen = lape.select(lape.FiringCounts.of(readings, DENSE).probabilities()).members
    found = {(int(layer), (int(neuron), ["en", "sw"][language])) for layer, neuron, language in np.argwhere(chosen)}
    assert found == set(PLANTED.items())
    by_language, _ = lape.analyze(readings, columns)
    pruned = by_language[by_language["method"] != DENSE]
    firing = pruned[pruned["metric"] == "still_firing"].groupby("layer")["value"].sum()
    assert firing.to_dict() == {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}


def test_firing_is_a_share_of_the_tokens_that_each_stack_reads(planted, tokenizer):
    """Whole segments in the encoder, second halves in the decoder."""
    session = Session(planted, tokenizer)
    readings = {(DENSE, lang): read_against_dense(session, parallel(lang, 16, 1))[DENSE] for lang in LETTERS}
    probabilities = lape.FiringCounts.of(readings, DENSE).probabilities()
    for column, language in enumerate(LETTERS):
        texts = [segment.text for segment in parallel(language, 16, 1)]
        for layer in range(4):
            read = "".join(text[12:] if layer >= 2 else text for text in texts)
            even = np.mean([LETTERS[language].index(letter) % 2 == 0 for letter in read])
            expected = np.full(48, even)
            if layer in PLANTED:
                expected[PLANTED[layer][0]] = float(PLANTED[layer][1] == language)
            np.testing.assert_allclose(probabilities[layer, :, column], expected, atol=1e-12)


@pytest.mark.parametrize("key", [(0, "o"), (1, "down"), (2, "cross_v"), (3, "q")])
def test_damage_shows_from_where_it_was_done_on_and_is_undone_there(make_model, tokenizer, key):
    model = make_model("mt5")
    session = Session(model, tokenizer)
    variant = without(model, tokenizer, key)
    error = read(session, variant)[0][variant.id, "en"].error[..., SIGNAL_SITES.index("residual")]
    assert [layer for layer, damaged in enumerate((error > 0).all(dim=0)) if damaged] == list(range(key[0], 4))
    assert torch.count_nonzero(error[:, : key[0]]) == 0
    items = [Item(id=str(i), prompt="ab" * i, choices=(" c", " de"), answer=i % 2) for i in range(1, 9)]
    questions, damage = item_questions(session, items), DamagedModel(DenseModel(model), variant)
    components = [role_weights(*each) for each in session.anatomy]
    exact = patch(session, questions, damage, components)
    restored = {c.weights[0]: np.abs(exact.exact[i].margin - exact.pruned.margin) for i, c in enumerate(components)}
    assert {each for each, change in restored.items() if change.max() > 0} == {key}
    np.testing.assert_allclose(exact.exact[list(session.anatomy).index(key)].margin, exact.dense.margin)
    estimate = attribute(session, questions, damage, components).attributed
    assert {list(session.anatomy)[i] for i, values in estimate.items() if np.abs(values).max() > 0} == {key}
