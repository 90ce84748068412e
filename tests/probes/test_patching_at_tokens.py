"""Patching the stream at the words in which a pair differs, at the last token, and elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from disturbed import Disturbed
from patched import half_pruned, hooked
from tokenizers.processors import TemplateProcessing

from probes import Session, paired_questions
from probes.batches import TOKEN_CLASSES
from probes.items import Item
from probes.patching import DAMAGE, RESTORE, DamagedModel, attribute, patch, residual, residual_at
from probes.scoring import item_questions, text_questions
from pruning.variants.owner import DenseModel

#: One byte is one token.
ITEMS = [
    Item(id="1a", twin="1", prompt="The cat sat on the", choices=(" mat", " hats", "!"), answer=0),
    Item(id="1b", twin="1", prompt="The horse sat on the", choices=(" mat", " hats", "!"), answer=1),
    Item(id="2a", twin="2", prompt="So it is no", choices=(" a", " b"), answer=0),
    Item(id="2b", twin="2", prompt="So it is yes", choices=(" a", " b"), answer=1),
    Item(id="3", prompt="Habari ya", choices=(" asubuhi", " jioni"), answer=0),
]
#: Positions of the words that differ, in bytes of the prompt.
WORDS = {"1a": range(4, 7), "1b": range(4, 9), "2a": range(9, 11), "2b": range(9, 12), "3": None}


def tokens_by_hand(item, length, kind, encoder, every):
    """Which of the tokens are patched: of prompt and choice after BOS, or of the prompt before EOS in an encoder."""
    begin = 0 if encoder else 1
    stop = begin + len(item.prompt)
    last = set() if encoder else set(range(stop - 1, length))
    words = {place + begin for place in WORDS[item.id]} - last
    of = {"differing": words, "last": last, "elsewhere": set(range(length)) - words - last}
    special = set() if every else ({stop} if encoder else {0})
    return sorted(of[kind] - special)


@pytest.mark.parametrize(
    ("kind", "positions"), [("llama", "counted"), ("gpt_neox", "counted"), ("phi3", "counted"), ("llama", "all")]
)
def test_patching_through_nnsight_equals_patching_with_plain_hooks(make_model, kind, positions, tokenizer):
    model = make_model(kind)
    session = Session(model, tokenizer, padding="left" if kind == "gpt_neox" else "right")

    def asked(item, text):
        ids = torch.tensor([tokenizer(item.prompt + text)["input_ids"]])
        return {"input_ids": ids}, ids[0, len(item.prompt) + 1 :]

    def tokens(item, component, length):
        return tokens_by_hand(item, length, component.kind.removeprefix("residual_"), False, positions == "all")

    components = [residual_at(layer, tokens) for layer in (0, 2) for tokens in TOKEN_CLASSES]
    expect_plain_hooks(session, components, positions, asked, tokens)


@pytest.mark.parametrize("positions", ["counted", "all"])
def test_in_an_encoder_decoder_words_are_in_the_encoder_and_the_last_token_in_the_decoder(
    make_model, positions, tokenizer
):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    session = Session(make_model("mt5"), tokenizer)

    def asked(item, text):
        source = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        labels = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        return {"input_ids": source, "labels": labels}, labels[0]

    def tokens(item, component, length):
        kind = component.kind.removeprefix("residual_")
        if component.layer > 1:
            return list(range(length)) if kind == "last" else []
        return tokens_by_hand(item, length, kind, True, positions == "all")

    components = [residual_at(layer, tokens) for layer in (1, 2) for tokens in TOKEN_CLASSES]
    expect_plain_hooks(session, components, positions, asked, tokens)


def expect_plain_hooks(session, components, positions, asked, tokens):
    """Compare with the stream taken from the other model by hand, in both directions."""
    model, questions = session.model, paired_questions(session, ITEMS)
    variant = half_pruned(model, session.tokenizer)
    layers = {component.layer for component in components}
    runs = [(i, choice, *asked(ITEMS[i], text)) for i in (0, 3) for choice, text in enumerate(ITEMS[i].choices[:2])]
    seen: dict[str, list] = {RESTORE: [], DAMAGE: []}
    patched = {}
    for direction, kept in seen.items():
        with nullcontext() if direction == RESTORE else variant.applied(model):
            for *_, run, _ in runs:
                values = {}
                edits = [(layer, "residual", partial(values.__setitem__, layer)) for layer in layers]
                hooked(model, session.anatomy, edits, **run)
                kept.append(values)
        damage = DamagedModel(DenseModel(model), variant)
        patched[direction] = patch(session, questions, damage, components, direction=direction, positions=positions)
    for direction, kept in seen.items():
        with variant.applied(model) if direction == RESTORE else nullcontext():
            for values, (i, choice, run, wanted) in zip(kept, runs, strict=True):
                for number, component in enumerate(components):
                    other = values[component.layer]
                    chosen = tokens(ITEMS[i], component, other.shape[1])

                    def change(value, other=other, chosen=chosen):
                        value[:, chosen] = other[:, chosen]
                        return value

                    logits = hooked(model, session.anatomy, [(component.layer, "residual", change)], **run)[0]
                    predicting = logits[-len(wanted) :] if "labels" in run else logits[-len(wanted) - 1 : -1]
                    expected = float(predicting.log_softmax(dim=-1).gather(1, wanted[:, None]).sum())
                    found = patched[direction].exact[number].values[i, choice]
                    assert found == pytest.approx(expected, abs=2e-4), (component.label, i, choice, direction)
        clean = patched[direction].pruned if direction == RESTORE else patched[direction].dense
        for found in patched[direction].exact.values():  # what has no twin is left as it is
            np.testing.assert_allclose(found.values[4], clean.values[4], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mt5"])
def test_attribution_at_some_tokens_is_the_derivative_and_adds_up(make_model, kind, tokenizer):
    model = make_model(kind).double()
    session = Session(model, tokenizer)
    damage = Disturbed(model, 1e-4)
    layers = (0, 1) if kind == "llama" else (1, 2)
    classes = [residual_at(layer, tokens) for layer in layers for tokens in TOKEN_CLASSES]
    questions = paired_questions(session, ITEMS)
    for direction in (RESTORE, DAMAGE):
        whole = attribute(session, questions, damage, [residual(layer) for layer in layers], direction=direction)
        parts = attribute(session, questions, damage, classes, direction=direction).attributed
        exact = patch(session, questions, damage, classes, direction=direction)
        clean = exact.pruned if direction == RESTORE else exact.dense
        for i, component in enumerate(classes):
            change = exact.exact[i].margin - clean.margin
            assert parts[i][:4] == pytest.approx(change[:4], abs=0.05 * np.abs(change).max() + 1e-8), component.label
            assert parts[i][4] == 0
        for i in range(len(layers)):
            added = parts[3 * i] + parts[3 * i + 1] + parts[3 * i + 2]
            np.testing.assert_allclose(added[:4], whole.attributed[i][:4], rtol=1e-6, atol=1e-12)
            assert np.abs(whole.attributed[i][:4]).min() > 1e-9


def test_what_is_no_pair_has_no_such_tokens(model, tokenizer, segments):
    session = Session(model, tokenizer)
    damage = DamagedModel(DenseModel(model), half_pruned(model, tokenizer))
    components = [residual_at(1, tokens) for tokens in TOKEN_CLASSES]
    for questions in (item_questions(session, ITEMS), text_questions(session, segments)):
        patched = patch(session, questions, damage, components)
        for found in patched.exact.values():
            np.testing.assert_allclose(found.margin, patched.pruned.margin, atol=1e-5)
