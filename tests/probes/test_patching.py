from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DECODERS
from disturbed import Disturbed
from pairwise import pairwise
from patched import half_pruned, hooked, mixed

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
    Item(id="1a", twin="1", prompt="The cat sat on the", choices=(" mat", " hat"), answer=0),
    Item(id="1b", twin="1", prompt="The head is under the", choices=(" mat", " hat"), answer=1),
    Item(id="2", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " rot.", " g"), answer=0),
    Item(id="3", prompt="Habari ya", choices=(" asubuhi", " jioni sana, rafiki"), answer=1),
]


def scored_by_hand(model, tokenizer, item):
    """Log-likelihood of every choice from the model's own logits, one choice at a time."""
    prompt = tokenizer(item.prompt)["input_ids"]
    found = []
    for choice in item.choices:
        ids = tokenizer(item.prompt + choice)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        found.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
    return found


@pairwise({"decoder": DECODERS, "batch_tokens": [16, 64, 4096], "padding": ["left", "right"]})
def test_scores_equal_the_models_own_logits(make_model, decoder, tokenizer, padding, batch_tokens):
    model = make_model(decoder)
    session = Session(model, tokenizer, padding=padding, batch_tokens=batch_tokens)
    scores = score(session, item_questions(session, ITEMS))
    for item, values in zip(ITEMS, scores.values, strict=True):
        expected = scored_by_hand(model, tokenizer, item)
        assert values[: len(expected)] == pytest.approx(expected, abs=2e-4)
        assert np.isneginf(values[len(expected) :]).all()


def test_choices_of_one_token_share_one_row(model, tokenizer):
    session = Session(model, tokenizer)
    item = Item(id="x", prompt="Yes or n", choices=("o", "a", "ot"), answer=0)
    (question,) = item_questions(session, [item])
    assert len(question.rows) == 1  # of "ot" without its last token: the others' rows are its beginning


@pytest.mark.parametrize(
    ("kind", "first"),
    [("llama", 1), ("gemma3_text", 1), ("gpt_neox", 1), ("phi3", 1), ("opt", 1), ("llama", 0), ("gemma3_text", 0)],
)
def test_patching_through_nnsight_equals_patching_with_plain_hooks(make_model, kind, first, tokenizer):
    """Of all tokens from the second on, or from the first."""
    model = make_model(kind)
    session = Session(model, tokenizer, skip_first=first == 1)
    anatomy = session.anatomy
    variant = half_pruned(model, tokenizer)
    basis = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))[0]
    chosen = {0: torch.tensor([1, 5, 7]), 2: torch.tensor([0])}
    roles = [role_output(layer, role) for layer in (0, 2) for role in anatomy.roles(layer)]
    components = [
        residual(1),
        stream_part("specific", 1, basis),
        stream_part("agnostic", 1, basis, outside=True),
        neurons("neurons", anatomy, chosen),
        *(head(anatomy, layer, number) for layer in (0, 2) for number in range(anatomy.n_heads(layer))),
        *roles,
    ]
    assert sum(component.kind == "head" for component in components) >= 4
    item = ITEMS[2]
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
                ids = torch.tensor([tokenizer(item.prompt + text)["input_ids"]])
                start = len(tokenizer(item.prompt)["input_ids"])
                seen = {}
                keep = [(p.layer, p.site, partial(seen.__setitem__, p)) for p in component.places]
                with nullcontext() if direction == RESTORE else variant.applied(model):
                    hooked(model, anatomy, keep, input_ids=ids)
                change = [(p.layer, p.site, partial(by_hand, p, other=seen[p], first=first)) for p in component.places]
                with variant.applied(model) if direction == RESTORE else nullcontext():
                    logits = hooked(model, anatomy, change, input_ids=ids)
                logs = logits[0].log_softmax(dim=-1)
                expected = sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
                assert patched.exact[number].values[0, choice] == pytest.approx(expected, abs=2e-4), component.label


@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_positions_include_the_first_token_whatever_counts(model, tokenizer, padding):
    damage = DamagedModel(DenseModel(model), half_pruned(model, tokenizer))
    apart = Session(model, tokenizer, padding=padding)
    whole = Session(model, tokenizer, padding=padding, skip_first=False)
    components = [residual(0), role_output(1, "v"), role_weights(1, "v")]
    questions = item_questions(apart, ITEMS)
    every = patch(apart, questions, damage, components, positions="all")
    expected = patch(whole, questions, damage, components)
    counted = patch(apart, questions, damage, components)
    estimated = attribute(apart, questions, damage, components, positions="all").attributed
    wanted = attribute(whole, questions, damage, components).attributed
    for number in range(len(components)):
        np.testing.assert_allclose(every.exact[number].margin, expected.exact[number].margin, atol=1e-5)
        np.testing.assert_allclose(estimated[number], wanted[number], atol=1e-5)
    assert np.abs(counted.exact[0].margin - every.exact[0].margin).max() > 1e-3
    assert np.array_equal(counted.exact[2].margin, every.exact[2].margin)  # weights act on every token


def by_hand(place, value, other, first):
    """A part of one value taken from another, from a token on."""
    return torch.cat([value[:, :first], mixed(place, value[:, first:], other[:, first:])], dim=1)


def test_restoring_weights_is_the_model_with_that_one_mask_undone(model, tokenizer):
    session = Session(model, tokenizer)
    variant = half_pruned(model, tokenizer)
    questions = item_questions(session, ITEMS)
    before = {key: session.anatomy.weight(*key).clone() for key in session.anatomy}
    patched = patch(session, questions, DamagedModel(DenseModel(model), variant), [role_weights(1, "down")])
    with variant.applied(model):
        pruned = score(session, questions).values
        session.anatomy.set_weight(1, "down", before[1, "down"])
        undone = score(session, questions).values
    assert all(torch.equal(session.anatomy.weight(*key), weight) for key, weight in before.items())
    np.testing.assert_array_equal(patched.pruned.values, pruned)
    np.testing.assert_array_equal(patched.exact[0].values, undone)
    np.testing.assert_array_equal(patched.dense.values, score(session, questions).values)


def test_the_whole_stream_after_the_last_block_is_the_other_model(make_model, decoder, tokenizer):
    model = make_model(decoder)
    session = Session(model, tokenizer)
    damage = DamagedModel(DenseModel(model), half_pruned(model, tokenizer))
    questions = item_questions(session, ITEMS)
    restored = patch(session, questions, damage, [residual(2)])
    np.testing.assert_allclose(restored.exact[0].values, restored.dense.values, atol=1e-5)
    damaged = patch(session, questions, damage, [residual(2)], direction=DAMAGE)
    np.testing.assert_allclose(damaged.exact[0].values, damaged.pruned.values, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "skip_first"),
    [("llama", True), ("gemma3_text", True), ("gpt_neox", True), ("phi3", True), ("llama", False)],
)
def test_attribution_is_the_derivative_of_exact_patching(make_model, kind, skip_first, tokenizer, segments):
    """For a small enough difference the two are the same; here weights differ by one part in a thousand."""
    model = make_model(kind).double()
    session = Session(model, tokenizer, skip_first=skip_first)
    damage = Disturbed(model, 1e-3)
    anatomy = session.anatomy
    basis = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)))[0]
    components = [
        residual(0),
        stream_part("specific", 1, basis),
        stream_part("agnostic", 1, basis, outside=True),
        neurons("neurons", anatomy, {0: torch.arange(20)}),
        *(role_output(1, role) for role in anatomy.roles(1)),
        *(role_weights(1, role) for role in anatomy.roles(1)),
    ]
    for questions in (item_questions(session, ITEMS), text_questions(session, segments)):
        for direction in (RESTORE, DAMAGE):
            exact = patch(session, questions, damage, components, direction=direction)
            estimate = attribute(session, questions, damage, components, direction=direction)
            from_here = exact.pruned if direction == RESTORE else exact.dense
            for number, component in enumerate(components):
                change = exact.exact[number].margin - from_here.margin
                close = pytest.approx(change.sum(), abs=0.05 * np.abs(change).sum() + 1e-5)
                assert estimate.attributed[number].sum() == close, component.label
