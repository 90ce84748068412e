"""Corrections and refinements: their errors on the text they saw and on fresh text, and their time over its floor.

    make benchmarks, or pytest tests/benchmarks/test_corrections.py -s -k errors

PRUNESCOPE_BENCH_BLOCKS is the number of blocks of the embedded model that the errors are of, spread over its depth.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from benchmarks import published
from benchmarks.harness import (
    calibration_text,
    headline,
    in_turn,
    in_words,
    number,
    pairs,
    ratios,
    report,
    seconds,
    token_blocks,
)
from torch import Tensor

from pruning import Anatomy, Recipe, load_model
from pruning.correction import admm, swaps
from pruning.correction.registry import row_errors
from pruning.engine import Job, sweep
from pruning.engine.streams import StackStarter, Stream, gather
from pruning.patterns import pattern_named
from pruning.projections import Key
from pruning.statistics import GRAM, InputStatistics

#: Tokens of calibration text; as many again are fresh.
TEXTS = pairs("SIZES", "32x128 8x128")
#: Tokens that a block reads at a time.
BATCH = 2048
STEPS: dict[str, dict[str, str]] = {
    "wanda": {},
    "wanda+swaps": {"refinement": "swaps"},
    "wanda+admm": {"correction": "admm"},
    "wanda+swaps+admm": {"refinement": "swaps", "correction": "admm"},
    "wanda+least-squares": {"correction": "least-squares"},
    "sparsegpt": {},
    "sparsegpt+admm": {"correction": "admm"},
}


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    return Anatomy(model), tokenizer


@torch.no_grad()
def inputs_of(anatomy: Anatomy, ids: Tensor, layers: list[int]) -> dict[tuple[int, str], InputStatistics]:
    """Return the Gram matrices of the dense model's inputs on some text, by block and leading role."""
    stream = Stream(list(ids.split(max(1, BATCH // ids.shape[1]))), [])
    stream.languages = ["en"] * len(stream.tokens)
    StackStarter(anatomy, anatomy.stacks[0])(stream)
    found: dict[tuple[int, str], InputStatistics] = {}
    for layer in range(max(layers) + 1):
        wanted = {group: frozenset({GRAM}) for group in anatomy.groups(layer)} if layer in layers else {}
        hidden: list[Tensor] = []
        seen = gather(anatomy, layer, stream, wanted, lambda tokens: None, hidden.append)
        found |= {(layer, leader): statistics for leader, statistics in seen.items()}
        stream.hidden = hidden
    return found


def relative_errors(
    anatomy: Anatomy, weights: Mapping[Key, Tensor], inputs: Mapping[tuple[int, str], InputStatistics]
) -> dict[Key, float]:
    """Return ``tr((W − Ŵ) G (W − Ŵ)ᵀ) / tr(W G Wᵀ)`` of every projection."""
    errors = {}
    for layer in {key[0] for key in weights}:
        for group in anatomy.groups(layer):
            for role in group.roles:
                dense, seen = anatomy.weight(layer, role), inputs[layer, group.leader]
                lost = row_errors(dense - weights[layer, role], seen).sum(dtype=torch.float64)
                errors[layer, role] = float(lost / row_errors(dense, seen).sum(dtype=torch.float64))
    return errors


@pytest.mark.parametrize("size", TEXTS, ids=in_words)
def test_errors_on_calibration_text_and_on_fresh_text(embedded, size, capsys):
    anatomy, tokenizer = embedded
    samples, length = size
    every, wanted = len(anatomy.blocks), number("BLOCKS", 3)
    layers = sorted({round(i * (every - 1) / max(wanted - 1, 1)) for i in range(wanted)})
    both = token_blocks(tokenizer, "en", 2 * samples, length)
    assert len(set(map(tuple, both[:, 1:].tolist()))) == 2 * samples  # else the text was too short, and repeated
    ids, fresh = both[:samples], both[samples:]
    text, sets = calibration_text({"en": ids})
    blocks = ",".join(map(str, layers))
    jobs = {
        name: Job(
            Recipe(
                method=name.split("+")[0],
                sparsity=0.5,
                pattern="row",
                propagation="dense",
                blocks=blocks,
                **steps,
            ),
            sets["en"],
        )
        for name, steps in STEPS.items()
    }
    swept = sweep(anatomy, list(jobs.values()), text, batch_tokens=BATCH)
    on = {"calibration": inputs_of(anatomy, ids, layers), "fresh": inputs_of(anatomy, fresh, layers)}
    found: dict[str, dict[str, float]] = {}
    with capsys.disabled():
        headline(
            f"relative reconstruction error, blocks {blocks}, 50 % in every row, {samples} x {length} tokens of en"
        )
        for name, job in jobs.items():
            pruned = swept(job)
            weights = {}
            for key, mask in pruned.masks.items():
                weights[key] = anatomy.weight(*key) * mask
                if key in pruned.values:
                    weights[key][mask] = pruned.values[key]
            by_text = {text: relative_errors(anatomy, weights, inputs) for text, inputs in on.items()}
            found[name] = {text: sum(errors.values()) / len(errors) for text, errors in by_text.items()}
            down = {text: errors[layers[-1], "down"] for text, errors in by_text.items()}
            print(
                f"  {name}: mean over {len(weights)} projections {found[name]['calibration']:.4f} on calibration text, "
                f"{found[name]['fresh']:.4f} on fresh text; down of block {layers[-1]} {down['calibration']:.4f}, "
                f"{down['fresh']:.4f}",
                flush=True,
            )
    calibration = {name: errors["calibration"] for name, errors in found.items()}
    assert calibration["wanda+least-squares"] < calibration["wanda+admm"] < calibration["wanda"]
    assert calibration["wanda+swaps+admm"] < calibration["wanda+swaps"] < calibration["wanda"]


def test_admm_is_as_good_as_the_published_arithmetic_on_a_real_block(embedded, capsys):
    anatomy, tokenizer = embedded
    layer = len(anatomy.blocks) // 2
    inputs = inputs_of(anatomy, token_blocks(tokenizer, "en", 32, 128), [layer])
    with capsys.disabled():
        headline(f"ADMM on Wanda's masks of block {layer}, 32 x 128 tokens")
        for group in anatomy.groups(layer):
            seen = inputs[layer, group.leader]
            for role in group.roles:
                weight = anatomy.weight(layer, role)
                keep = pattern_named("row").keep(weight.abs() * seen.norms, weight.numel() // 2)
                theirs = published.admm(weight, seen.gram, keep)
                ours = admm.correct([weight], [keep], seen).weights[0]
                errors = [float(row_errors(weight - new, seen).sum(dtype=torch.float64)) for new in (ours, theirs)]
                print(f"  {role}: reconstruction error, ours / published {errors[0] / errors[1]:.5f}", flush=True)
                assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("shape", pairs("SHAPES", "2048x2048"), ids=in_words)
def test_time_over_the_products_that_cannot_be_avoided(shape, capsys):
    """ADMM's floor: its products of the weights with a matrix, and one inverse. That of swaps: one such product."""
    outputs, inputs = shape
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=random) * 0.02
    scales = torch.randn(inputs, generator=random).mul(0.5).exp()
    causes = torch.randn(64, inputs, generator=random) / 8
    seen = InputStatistics(inputs, frozenset({GRAM}))
    for _ in range(4 if inputs < 8192 else 16):
        x = torch.randn(inputs // 2, inputs, generator=random)
        seen.add(x.addmm_(torch.randn(len(x), 64, generator=random), causes).mul_(scales))
    pattern = pattern_named("row")
    keep = pattern.keep(weight.abs() * seen.norms, weight.numel() // 2)
    square = seen.gram_itself() / seen.gram_itself().diagonal().mean()
    identity = torch.eye(inputs)
    found: dict[str, Tensor] = {}
    inverting: list[float] = []

    def products(times: int) -> None:
        out = torch.empty_like(weight)
        for _ in range(times):
            torch.mm(weight, square, out=out)

    def floor() -> None:
        inverting.append(seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(square + identity))))
        products(20)

    def ours() -> None:
        seen.memo.clear()
        found["admm"] = admm.correct([weight], [keep], seen).weights[0]

    def theirs() -> None:
        found["published"] = published.admm(weight, seen.gram, keep)

    def refined() -> None:
        seen.memo.clear()
        found["swaps"] = swaps.refine(weight, keep, seen, pattern)

    runs = {"floor": floor, "admm": ours, "published": theirs, "product": lambda: products(1), "swaps": refined}
    with capsys.disabled():
        headline(f"{outputs} outputs x {inputs} inputs, Wanda's mask of 50 % in every row")
        products(2)
        times = in_turn(number("ROUNDS", 3), runs)
        report("ADMM / 20 products and an inverse", ratios(times["admm"], times["floor"]))
        report("published way / the same", ratios(times["published"], times["floor"]))
        report("share of the inverse in the floor", ratios(inverting, times["floor"]))
        report("swaps, 25 a row / one product", ratios(times["swaps"], times["product"]))
        swapped = int((found["swaps"] & ~keep).sum())
        pairs_of_all = swapped * (inputs / 2) ** 2
        print(
            f"  seconds: ADMM {min(times['admm']):.1f}, swaps {min(times['swaps']):.1f}; {swapped / outputs:.1f} swaps a row, ",
            end="",
        )
        print(
            f"{min(times['swaps']) / swapped * 1e3:.3f} ms each, {pairs_of_all / min(times['swaps']) / 1e9:.1f} billion pairs a second"
        )
    before = float(row_errors(weight * ~keep, seen).sum())
    assert float(row_errors(weight * ~found["swaps"], seen).sum()) < before
    ours_error, theirs_error = (float(row_errors(weight - found[name], seen).sum()) for name in ("admm", "published"))
    assert ours_error == pytest.approx(theirs_error, rel=0.01)
