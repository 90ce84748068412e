"""Reading in lockstep over the bare forward passes of all models, at the widths of Llama-3-8B.

    pytest tests/benchmarks/test_lockstep_cost.py -s

Random weights, bfloat16, a few blocks, a small vocabulary (the loss is measured in test_reader_cost.py). A bare pass is
every block called on every batch by PyTorch alone, once for each model, with no variant made and nothing read.

    PRUNESCOPE_BENCH_BLOCKS   blocks (2)
    PRUNESCOPE_BENCH_TOKENS   tokens that each model reads (8192)
    PRUNESCOPE_BENCH_VARIANTS variants (8)
    PRUNESCOPE_BENCH_ROUNDS   how often everything is timed (1)
"""

from __future__ import annotations

import time

import psutil
import torch
from benchmarks.harness import number, report
from conftest import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from probes import HeldoutStream, Session, plan_reading, read_streams
from pruning import Recipe, Segment, prune

LENGTH = 256


def wide_model(blocks: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=512,
        pad_token_id=0,
        bos_token_id=1,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                for rows in parameter.split(1024):
                    rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    inverse = model.model.rotary_emb
    inverse.__init__(config)  # its buffers were empty, too
    return model


def test_lockstep_reading_over_bare_forward_passes(capsys):
    blocks, tokens = number("BLOCKS", 2), number("TOKENS", 8192)
    model, tokenizer = wide_model(blocks), tiny_tokenizer()
    sparsities = [0.3 + 0.05 * i for i in range(number("VARIANTS", 8))]
    recipes = [Recipe(method="magnitude", sparsity=round(s, 2)) for s in sparsities]
    variants = {variant.id: variant for variant in prune(model, tokenizer, recipes)}
    session = Session(model, tokenizer, max_length=LENGTH, batch_tokens=1024)
    text = [Segment(str(i), "x" * (LENGTH - 1)) for i in range(tokens // LENGTH)]
    stream = HeldoutStream(session, text, list(variants))
    batches = stream.batches
    with torch.no_grad():
        starter = session.starter()
        begun = [starter.begin(**session.stack_inputs(batch)) for batch in batches]

    def bare() -> None:
        with torch.no_grad():
            for _ in range(len(variants) + 1):
                for hidden, arguments in begun:
                    for layer, block in enumerate(session.anatomy.blocks):
                        hidden = block(hidden, *arguments[layer].positional, **arguments[layer].named)

    plan = plan_reading(session, [stream])

    def lockstep() -> None:
        read_streams(session, [stream], variants, plan)

    ratios, times = [], []
    for _ in range(number("ROUNDS", 1)):
        times.append([])
        for run in (bare, lockstep):
            began = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - began)
        ratios.append(times[-1][1] / times[-1][0])
    assert all(torch.isfinite(read.nll).all() for read in stream.readings.values())
    with capsys.disabled():
        print(
            f"\n{len(variants)} variants and the dense model, {blocks} blocks, {tokens} tokens in {len(batches)} batches, "
            f"{torch.get_num_threads()} threads; {plan}; peak resident {psutil.Process().memory_info().rss / 2**30:.1f} GiB"
        )
        print(f"bare passes {times[0][0]:.1f} s, lockstep {times[0][1]:.1f} s, planned {plan.seconds:.1f} s")
        report("lockstep reading / bare forward passes", ratios)
