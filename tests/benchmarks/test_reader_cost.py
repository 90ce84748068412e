"""What reading costs over plain forward passes of the embedded model, with logits and without.

PRUNESCOPE_BENCH_ROUNDS   how often everything is timed (7)
"""

from __future__ import annotations

import pytest
import torch
from benchmarks.harness import number, paired_ratios, report
from conftest import tiny_model, tiny_tokenizer

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


class WithoutExperts(HeldoutStream):
    """Reads everything but what goes on inside experts."""

    def readers(self, model, batch):
        return [reader for reader in super().readers(model, batch) if "routing" not in reader.sites]


@pytest.mark.parametrize(("kind", "experts", "chosen", "neurons"), [("mixtral", 8, 2, 3584), ("qwen3_moe", 64, 8, 384)])
def test_reading_experts_over_reading_all_else(kind, experts, chosen, neurons, capsys):
    """Random mixtures of four blocks, a quarter as wide as Mixtral-8x7B and half as wide as Qwen3-30B-A3B."""
    number_of = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}[kind]
    model = tiny_model(
        kind,
        hidden_size=1024,
        num_attention_heads=8,
        head_dim=128,
        num_hidden_layers=4,
        num_experts_per_tok=chosen,
        mlp_only_layers=[],
        **{number_of: experts, "intermediate_size": neurons, "moe_intermediate_size": neurons},
    )
    source = text_source("bundled")
    segments = Corpus(source, source, source).take("heldout", "en", 24)
    session = Session(model, tiny_tokenizer())

    def read(kind: type[HeldoutStream]) -> None:
        stream = kind(session, segments, [])
        read_streams(session, [stream], {}, plan_reading(session, [stream], trial=False))

    rounds = number("ROUNDS", 7)
    ratios = paired_ratios(lambda: read(HeldoutStream), lambda: read(WithoutExperts), rounds)
    assert min(ratios) > 0
    with capsys.disabled():
        report(f"{kind}: reading with routing and firing inside experts / without", ratios)
