"""What blocks are called with is caught once, for any batch, and serves every model with blocks in that stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from pruning import Anatomy
from pruning.engine.streams import StackStarter
from pruning.errors import ModelError

IDS = torch.randint(3, 250, (2, 2, 12), generator=torch.Generator().manual_seed(0))
MASKS = torch.ones(2, 2, 12, dtype=torch.int64)
MASKS[0, 1, :5] = 0
MASKS[1, 0, :9] = 0


def run_blocks(anatomy: Anatomy, starter: StackStarter, **inputs: Tensor) -> Tensor:
    hidden, arguments = starter.begin(**inputs)
    for block, call in zip(anatomy.blocks, arguments, strict=False):
        output = block(hidden, *call.positional, **call.named)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def test_blocks_run_one_by_one_on_padded_text_make_what_the_model_makes(architecture):
    model = tiny_model(architecture)
    anatomy = Anatomy(model)
    stack = anatomy.stacks[0]
    starter = StackStarter(anatomy, stack)
    for ids, mask in zip(IDS, MASKS, strict=True):
        seen: list[Tensor] = []
        hook = (
            anatomy.stack_module(stack)
            .get_submodule(stack.norm)
            .register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        )
        anatomy.stack_module(stack)(input_ids=ids, attention_mask=mask)
        hook.remove()
        hidden = run_blocks(anatomy, starter, input_ids=ids, attention_mask=mask)
        assert torch.equal(hidden[mask.bool()], seen[0][mask.bool()])


def test_equal_arguments_of_several_batches_are_kept_once(model):
    starter = StackStarter(Anatomy(model), Anatomy(model).stacks[0])
    (_, one), (_, other) = (starter.begin(input_ids=ids) for ids in IDS)
    cosines = [call.named["position_embeddings"][0] for call in [*one, *other]]
    assert all(cosine is cosines[0] for cosine in cosines)


def altered_bias(model: Any, change: Any) -> None:
    """Have T5's first block hand on another position bias."""
    block = model.encoder.block[0]
    original = block.forward

    def forward(hidden: Tensor, attention_mask: Tensor | None = None, *rest: Any, **named: Any) -> Any:
        output, bias, cross = original(hidden, attention_mask, *rest, **named)
        return output, change(bias, hidden, attention_mask), cross

    block.forward = forward


def test_what_the_first_block_hands_on_is_made_anew_for_another_mask():
    model = tiny_model("t5")
    altered_bias(model, lambda bias, hidden, mask: bias + mask.float().sum())
    anatomy = Anatomy(model)
    starter = StackStarter(anatomy, anatomy.stacks[0])
    biases = [starter.begin(input_ids=IDS[0], attention_mask=mask)[1][1].positional[1] for mask in MASKS]
    assert not torch.equal(*biases)


def test_arguments_that_depend_on_what_a_block_computed_are_refused():
    model = tiny_model("t5")
    altered_bias(model, lambda bias, hidden, mask: bias + hidden.mean())
    starter = StackStarter(Anatomy(model), Anatomy(model).stacks[0])
    with pytest.raises(ModelError, match=r'^block 1 of this "t5" model is called with values that depend on'):
        starter.begin(input_ids=IDS[0])


def test_a_stack_that_works_on_hidden_states_between_its_blocks_is_refused(model):
    inner = model.model

    def forward(input_ids: Tensor, **named: Any) -> Tensor:
        hidden = inner.embed_tokens(input_ids)
        positions = inner.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in inner.layers:
            hidden = inner.norm(block(hidden, position_embeddings=positions))
        return hidden

    inner.forward = forward
    with pytest.raises(ModelError, match=r'^this "llama" model changes hidden states between block 0 and the next'):
        StackStarter(Anatomy(model), Anatomy(model).stacks[0]).begin(input_ids=IDS[0])
