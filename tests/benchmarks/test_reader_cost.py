"""What the readers cost: all of them together over a plain forward pass of the same batches, in one run.

    make benchmarks

A figure to quote, not a test that passes or fails with the machine's mood: it prints the ratios and checks only that
they are numbers.
"""

from __future__ import annotations

import torch
from benchmarks.harness import number, paired_ratios, report

from probes import DenseSignal, NeuronFiring, PooledStates, Session, SignalError, TokenLoss
from pruning import Corpus, load_model, text_source


def test_all_readers_over_a_plain_forward_pass(capsys):
    model, tokenizer = load_model("demo")
    source = text_source("bundled")
    segments = Corpus(source, source, source).take("heldout", "en", 48)
    session = Session(model, tokenizer)
    without_head = session.anatomy.stack_module(session.anatomy.stacks[0])
    batches, layers = session.batches(segments), len(session.anatomy.blocks)
    dense_signal = DenseSignal(len(segments), layers)
    references = []
    for batch in batches:
        session.read(batch, [dense_signal])
        references.append(dense_signal.take_activations())

    pooled = PooledStates(len(segments), layers, session.anatomy.hidden_size)
    firing = NeuronFiring(layers, session.anatomy.n_neurons)
    loss = TokenLoss(len(segments), session.anatomy)
    error = torch.zeros_like(dense_signal.power)

    def plain() -> None:
        for batch in batches:
            with torch.no_grad():
                model(input_ids=batch.ids, attention_mask=batch.real, use_cache=False)

    def body() -> None:
        for batch in batches:
            with torch.no_grad():
                without_head(input_ids=batch.ids, attention_mask=batch.real, use_cache=False)

    def internals() -> None:
        for batch, dense in zip(batches, references, strict=True):
            session.read(batch, [pooled, firing, SignalError(dense, error)])

    def everything() -> None:
        for batch, dense in zip(batches, references, strict=True):
            session.read(batch, [pooled, firing, SignalError(dense, error), loss])

    rounds = number("ROUNDS", 7)
    whole = paired_ratios(everything, plain, rounds)
    inner = paired_ratios(internals, body, rounds)
    assert min(whole + inner) > 0
    with capsys.disabled():
        tokens = sum(int(batch.real.sum()) for batch in batches)
        print(f"\n{tokens} tokens in {len(batches)} batches, median of {rounds} pairs (lowest to highest)")
        report("all readers / forward pass with logits", whole)
        report("all readers but the loss / forward pass without the head", inner)
