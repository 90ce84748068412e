"""Patching in the encoder and in the decoder of an encoder-decoder."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from disturbed import Disturbed
from patched import half_pruned, hooked, mixed
from tokenizers.processors import TemplateProcessing

from probes import Session
from probes.items import Item
from probes.patching import (
    DAMAGE,
    RESTORE,
    DamagedModel,
    attribute,
    head,
    neurons,
    patch,
    residual,
    role_output,
    role_weights,
    stream_part,
)
from probes.scoring import item_questions, score, text_questions
from pruning.variants.owner import DenseModel

ITEMS = [
    Item(id="1", prompt="The cat sat on the", choices=(" mat", " hat"), answer=0),
    Item(id="2", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " rot.", " g"), answer=0),
]
EOS = 2
#: Blocks 0 and 1 are the encoder's, 2 and 3 the decoder's.
LAST_ENCODED, LAST = 1, 3


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    return tokenizer


def basis():
    return torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))[0]


def patched_by_hand(place, value, other):
    """All tokens but EOS, which is no text; the decoder's start token is patched, too."""
    if place.layer <= LAST_ENCODED or place.site in ("cross_k", "cross_v"):
        return torch.cat([mixed(place, value[:, :-1], other[:, :-1]), value[:, -1:]], dim=1)
    return mixed(place, value, other)


@pytest.mark.parametrize("kind", ["mt5", "t5", "umt5"])
def test_patching_through_nnsight_equals_patching_with_plain_hooks(make_model, kind, tokenizer):
    model = make_model(kind)
    session = Session(model, tokenizer)
    anatomy = session.anatomy
    variant = half_pruned(model, tokenizer)
    components = [
        *(residual(layer) for layer in range(LAST + 1)),
        *(stream_part("specific", layer, basis()) for layer in (0, 2)),
        *(stream_part("agnostic", layer, basis(), outside=True) for layer in (1, 3)),
        neurons("neurons", anatomy, {0: torch.tensor([1, 5, 7]), 3: torch.tensor([0])}),
        *(role_output(layer, role) for layer in (0, 3) for role in anatomy.roles(layer)),
        *(head(anatomy, *place) for place in ((0, 1), (1, 0), (3, 0), (3, 1, "cross_heads"), (2, 0, "cross_heads"))),
    ]
    assert {"cross_q", "cross_k", "cross_v", "cross_o", "head.1", "cross_head.1"} <= {c.role for c in components}
    item = ITEMS[1]
    source = torch.tensor([tokenizer(item.prompt)["input_ids"]])
    for direction in (RESTORE, DAMAGE):
        patched = patch(
            session,
            item_questions(session, [item]),
            DamagedModel(DenseModel(model), variant),
            components,
            direction=direction,
        )
        for number, component in enumerate(components):
            for choice, text in enumerate(item.choices):
                labels = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
                seen = {}
                keep = [(p.layer, p.site, partial(seen.__setitem__, p)) for p in component.places]
                with nullcontext() if direction == RESTORE else variant.applied(model):
                    hooked(model, anatomy, keep, input_ids=source, labels=labels)
                change = [(p.layer, p.site, partial(patched_by_hand, p, other=seen[p])) for p in component.places]
                with variant.applied(model) if direction == RESTORE else nullcontext():
                    logits = hooked(model, anatomy, change, input_ids=source, labels=labels)[0]
                expected = float(logits.log_softmax(dim=-1).gather(1, labels.T).sum())
                found = patched.exact[number].values[0, choice]
                assert found == pytest.approx(expected, abs=2e-4), component.label


def test_the_whole_stream_after_the_last_block_is_the_other_model(make_model, tokenizer):
    model = make_model("mt5")
    session = Session(model, tokenizer)
    damage = DamagedModel(DenseModel(model), half_pruned(model, tokenizer))
    questions = item_questions(session, ITEMS)
    restored = patch(session, questions, damage, [residual(LAST)])
    np.testing.assert_allclose(restored.exact[0].values, restored.dense.values, atol=1e-5)
    damaged = patch(session, questions, damage, [residual(LAST)], direction=DAMAGE)
    np.testing.assert_allclose(damaged.exact[0].values, damaged.pruned.values, atol=1e-5)


def test_all_of_the_encoders_stream_restored_is_the_dense_encoder_with_the_pruned_decoder(make_model, tokenizer):
    model = make_model("mt5")
    session = Session(model, tokenizer)
    variant = half_pruned(model, tokenizer)
    before = {key: session.anatomy.weight(*key).clone() for key in session.anatomy}
    questions = item_questions(session, ITEMS)
    damage = DamagedModel(DenseModel(model), variant)
    patched = patch(session, questions, damage, [residual(LAST_ENCODED)], positions="all")
    with variant.applied(model):
        for (layer, role), weight in before.items():
            if layer <= LAST_ENCODED:
                session.anatomy.set_weight(layer, role, weight)
        expected = score(session, questions).values
    np.testing.assert_allclose(patched.exact[0].values, expected, atol=1e-5)
    assert np.abs(patched.exact[0].margin - patched.pruned.margin).max() > 1e-2
    assert all(torch.equal(session.anatomy.weight(*key), weight) for key, weight in before.items())


def test_attribution_is_the_derivative_of_exact_patching(make_model, tokenizer, segments):
    """For a small enough difference the two are the same; gradients flow from the decoder into the encoder."""
    model = make_model("mt5").double()
    session = Session(model, tokenizer)
    damage = Disturbed(model, 1e-4)
    anatomy = session.anatomy
    components = [
        residual(0),
        residual(2),
        stream_part("specific", 1, basis()),
        stream_part("agnostic", 2, basis(), outside=True),
        *(neurons("neurons", anatomy, {layer: torch.arange(20)}) for layer in (0, 2)),
        *(role_output(layer, role) for layer in (0, 2) for role in anatomy.roles(layer)),
        *(role_weights(layer, role) for layer in (0, 2) for role in anatomy.roles(layer)),
    ]
    for questions in (item_questions(session, ITEMS), text_questions(session, segments)):
        for direction in (RESTORE, DAMAGE):
            exact = patch(session, questions, damage, components, direction=direction)
            estimate = attribute(session, questions, damage, components, direction=direction)
            from_here = exact.pruned if direction == RESTORE else exact.dense
            for number, component in enumerate(components):
                change = exact.exact[number].margin - from_here.margin
                assert np.abs(change).sum() > 0, component.label
                close = pytest.approx(change.sum(), abs=0.05 * np.abs(change).sum() + 1e-8)
                assert estimate.attributed[number].sum() == close, component.label
