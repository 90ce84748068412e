"""Our GPTQ beside llm-compressor's, on the same real matrices, inputs and grids: what is left of the layers' outputs.

    pip install --no-deps --target FOLDER llmcompressor loguru
    PYTHONPATH=FOLDER pytest tests/benchmarks/test_gptq_peer.py -s

Their scales are those of the dense weight, as ours with `static = 1`. By default ours are fitted to a group when the
sweep reaches it, as GPTQ's authors do it; what that does to the error is stated, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from benchmarks.harness import headline, number, token_blocks
from benchmarks.test_corrections import inputs_of
from torch import Tensor

from pruning import Anatomy, load_model
from pruning.correction.registry import row_errors
from pruning.methods import gptq
from pruning.projections import Key
from pruning.quantization import Grid
from pruning.statistics import InputStatistics, Statistics

BLOCK = number("BLOCK", 9)
CASES = [(4, 128, True), (4, 128, False), (3, 128, True), (4, 0, True)]


def peer(weight: Tensor, inputs: InputStatistics, grid: Grid, *, order: bool) -> Tensor:
    """Return the weight that llm-compressor's GPTQ makes, with scales of the dense weight."""
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    settings = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy="group" if grid.group else "channel",
        group_size=grid.group or None,
        actorder=ActivationOrdering.WEIGHT if order else None,
    )
    groups = weight.unflatten(1, (-1, grid.width(weight.shape[1])))
    scale, zero = calculate_qparams(*groups.aminmax(dim=2), settings)
    made, _, fallen_back = quantize_weight(
        weight[None].clone(), inputs.gram_itself()[None].clone(), scale[None], zero[None], None, settings
    )
    assert not bool(fallen_back.any())
    return made[0]


@pytest.mark.filterwarnings("ignore")
def test_errors_beside_those_of_llm_compressor(capsys):
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
    model, tokenizer = load_model("demo", dtype="float32", device="cpu")
    anatomy = Anatomy(model)
    seen = inputs_of(anatomy, token_blocks(tokenizer, "en", 32, 128), [BLOCK])
    with capsys.disabled():
        headline(f"error of GPTQ, ours over llm-compressor's, block {BLOCK}, 32 x 128 tokens of en")
    for bits, group, symmetric in CASES:
        grid = Grid(bits, group, symmetric)
        said = f"{bits} bits, {f'groups of {group}' if group else 'rows'}, {'' if symmetric else 'a'}symmetric"
        for switch in ({"static": 1.0}, {"order": 1.0}, {}):
            ratios = dict(ratios_of_errors(anatomy, seen, grid, switch))
            with capsys.disabled():
                print(f"  {said}, {switch or 'default'}: {'  '.join(f'{role} {r:.4f}' for role, r in ratios.items())}")
            if switch:
                assert max(ratios.values()) < 1.01


def ratios_of_errors(
    anatomy: Anatomy, seen: Mapping[Key, InputStatistics], grid: Grid, switch: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """Yield every role of the block with the error of ours over theirs, which has the same order of inputs."""
    for group in anatomy.groups(BLOCK):
        inputs = seen[BLOCK, group.leader]
        for role in group.roles:
            weight = anatomy.weight(BLOCK, role)
            ours = gptq.quantize([weight], Statistics(inputs), grid, [role], **switch).weights[0].weight()
            inputs.memo.clear()
            theirs = peer(weight, inputs, grid, order="order" in switch)
            errors = [float(row_errors(weight - made, inputs).sum(dtype=torch.float64)) for made in (ours, theirs)]
            yield role, errors[0] / errors[1]
