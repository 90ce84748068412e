"""What reading costs over plain forward passes of the embedded model, with logits and without.

PRUNESCOPE_BENCH_ROUNDS   how often everything is timed (7)
"""

from __future__ import annotations

import torch
from benchmarks.harness import number, paired_ratios, report

from probes import DENSE, FittingStream, HeldoutStream, Session, plan_reading, read_streams
from pruning import Corpus, Recipe, load_model, prune, text_source
from pruning.models.arithmetic import fast_float32


def test_lockstep_reading_over_plain_forward_passes(capsys):
    model, tokenizer = load_model("demo")
    source = text_source("bundled")
    segments = Corpus(source, source, source).take("heldout", "en", 48)
    session = Session(model, tokenizer)
    variants = {v.id: v for v in prune(model, tokenizer, [Recipe(method="magnitude", sparsity=s) for s in (0.2, 0.3)])}
    without_head = session.anatomy.stack_module(session.anatomy.stacks[0])
    batches = session.batches(segments)

    def plain() -> None:
        for _ in range(1 + len(variants)):
            for batch in batches:
                with torch.no_grad(), fast_float32(model.device):
                    model(input_ids=batch.ids, attention_mask=batch.real, use_cache=False)

    def body() -> None:
        for batch in batches:
            with torch.no_grad(), fast_float32(model.device):
                without_head(input_ids=batch.ids, attention_mask=batch.real, use_cache=False)

    def everything() -> None:
        stream = HeldoutStream(session, segments, list(variants))
        read_streams(session, [stream], variants, plan_reading(session, [stream], trial=False))
        assert stream.readings[DENSE].nll.isfinite().all()

    def pooled_states() -> None:
        stream = FittingStream(session, segments)
        read_streams(session, [stream], {}, plan_reading(session, [stream], trial=False))

    rounds = number("ROUNDS", 7)
    whole = paired_ratios(everything, plain, rounds)
    inner = paired_ratios(pooled_states, body, rounds)
    assert min(whole + inner) > 0
    with capsys.disabled():
        tokens = sum(batch.n_tokens for batch in batches)
        print(f"\n{tokens} tokens in {len(batches)} batches, median of {rounds} pairs (lowest to highest)")
        report("all readers of three models in lockstep / three forward passes with logits", whole)
        report("pooled states / forward pass without the head", inner)
