from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pruning import ROLES, Anatomy
from pruning.errors import ModelError


def test_every_block_has_the_seven_roles_in_running_order(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    assert list(anatomy) == [(layer, role) for layer in range(3) for role in ROLES]


def test_shapes_are_those_of_the_projections(make_model, architecture):
    anatomy = Anatomy(make_model(architecture))
    assert anatomy.weight(1, "gate").shape == (48, 32)
    assert anatomy.weight(1, "down").shape == (32, 48)
    assert anatomy.n_neurons == 48
    assert anatomy.hidden_size == 32


def test_logits_are_those_of_the_models_own_forward(make_model, architecture):
    model = make_model(architecture)
    anatomy = Anatomy(model)
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = anatomy.body(input_ids=ids).last_hidden_state
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(anatomy.logits(hidden), expected)
        torch.testing.assert_close(anatomy.logits(hidden, slice(10, 20)), expected[..., 10:20])


def test_unknown_architecture_is_refused_by_name():
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=20)
    with pytest.raises(ModelError, match=r'unknown model architecture "gpt2".*llama'):
        Anatomy(AutoModelForCausalLM.from_config(config))


def test_fingerprint_tells_models_apart_and_not_copies(make_model):
    one, same, other = make_model(seed=0), make_model(seed=0), make_model(seed=1)
    prints = [Anatomy(model).fingerprint() for model in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    Anatomy(same).weight(2, "down").zero_()
    assert Anatomy(same).fingerprint() != prints[0]
