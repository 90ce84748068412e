"""A variant's biases are applied with its masks, and taken away again, whoever applies it."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import CORPUS, SHORT
from conftest import DECODERS, tiny_model, tiny_tokenizer
from pairwise import pairwise

from probes import Session, read_against_dense
from probes.items import Item
from probes.patching import DAMAGE, RESTORE, DamagedModel, attribute, patch, role_weights
from probes.scoring import item_questions, score
from pruning import Anatomy, MaskSet, Recipe, Segment, Variant, prune
from pruning.errors import VariantError
from pruning.variants.biases import BIASES_FILE
from pruning.variants.owner import DenseModel
from pruning.variants.store import VariantRecord

FLAP = Recipe(method="flap", sparsity=0.5)
ITEMS = [
    Item(id="1", prompt="The cat sat on the", choices=(" mat", " hat"), answer=0),
    Item(id="2", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " rot."), answer=0),
]
SEGMENTS = [Segment("1", "Something of a certain length."), Segment("2", "Habari ya asubuhi, rafiki?")]


def flap(model, tokenizer, **more):
    (variant,) = prune(model, tokenizer, FLAP, CORPUS, SHORT, **more)
    assert variant.biases
    return variant


def by_hand(model, variant):
    """A copy of the model with the variant's weights and biases."""
    other = copy.deepcopy(model)
    anatomy = Anatomy(other)
    for key in variant.masks:
        anatomy.set_weight(*key, anatomy.weight(*key) * variant.masks[key])
    for layer, role in variant.biases:
        anatomy.set_bias(layer, role, variant.biases[layer, role])
    return other


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("decoder", DECODERS)
def test_biases_come_and_go(decoder):
    """Llama's projections have none before and after, GPT-2's theirs."""
    model, tokenizer = tiny_model(decoder), tiny_tokenizer()
    before = state(model)
    variant = flap(model, tokenizer)
    assert same(state(model), before)
    expected = state(by_hand(model, variant))
    with variant.applied(model):
        assert same(state(model), expected)
    assert same(state(model), before)
    owner = DenseModel(model)
    with owner.pruned_to(variant):
        assert same(state(model), expected)
    assert same(state(model), before)
    other = flap(model, tokenizer, batch_tokens=16)
    for layer in range(len(owner.anatomy.blocks)):
        with owner.block(layer, changes=True) as block:
            block.become(other)
            block.become(variant)
            prefix = f"{owner.anatomy.path(layer, 'residual')}."
            inside = {name: tensor for name, tensor in state(model).items() if name.startswith(prefix)}
            assert same(inside, {name: tensor for name, tensor in expected.items() if name.startswith(prefix)})
            block.restore()
            assert same(state(model), before)
            block.become(variant)
        assert same(state(model), before)
    variant.apply(model)
    assert same(state(model), expected)


def test_biases_are_stored_and_opened(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    variant = flap(model, tokenizer, folder=tmp_path / "study")
    in_memory = flap(model, tokenizer)
    in_memory.save(tmp_path / "saved")
    for opened in (variant, Variant.open(tmp_path / "saved")):
        assert opened.biases.keys() == in_memory.biases.keys()
        assert all(torch.equal(bias, in_memory.biases[key]) for key, bias in opened.biases.items())
    path = tmp_path / "saved" / BIASES_FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(VariantError, match="damaged"):
        Variant.open(tmp_path / "saved")


@pairwise({"decoder": ["llama", "gemma3_text", "gpt2", "gpt_neox", "qwen2_moe"], "streamed": [False, True]})
def test_lockstep_reads_the_model_with_its_biases(decoder, streamed, tmp_path):
    model, tokenizer = tiny_model(decoder), tiny_tokenizer()
    variant = flap(model, tokenizer)
    other = by_hand(model, variant)
    if streamed:
        from pruning import load_model

        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model, tokenizer = load_model(str(tmp_path / "model"), dtype="float32", device="cpu", stream=True)
    found = read_against_dense(Session(model, tokenizer), SEGMENTS, [variant])[variant.id]
    expected = read_against_dense(Session(other, tiny_tokenizer()), SEGMENTS, [])["dense"]
    assert found.nll.numpy() == pytest.approx(expected.nll.numpy(), rel=1e-5)


@pytest.mark.parametrize("direction", [RESTORE, DAMAGE])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_patching_weights_patches_the_bias_with_them(kind, direction):
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    variant = flap(model, tokenizer)
    key = next(key for key in variant.biases if key[1] == "down")
    session = Session(model, tokenizer)
    questions = item_questions(session, ITEMS)
    damage = DamagedModel(session.owner, variant)
    dense, pruned = tiny_model(kind), by_hand(model, variant)
    before = state(model)
    patched = patch(session, questions, damage, [role_weights(*key)], direction=direction)
    assert same(state(model), before)
    mixed = Anatomy(pruned if direction == RESTORE else dense)
    source = Anatomy(dense if direction == RESTORE else pruned)
    mixed.set_weight(*key, source.weight(*key))
    mixed.set_bias(*key, source.bias(*key))
    by_itself = Session(mixed.model, tokenizer)
    expected = score(by_itself, item_questions(by_itself, ITEMS))
    assert patched.exact[0].values == pytest.approx(expected.values, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("direction", [RESTORE, DAMAGE])
def test_attribution_counts_the_bias_as_a_small_step_shows(direction):
    """Where a bias alone is changed, and by little, the first-order estimate is nearly exact."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    session = Session(model, tokenizer)
    key = (1, "down")
    shape = session.anatomy.shape(*key)
    step = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)) * 1e-2
    record = VariantRecord(id="step", model="tiny", model_fingerprint=session.owner.fingerprint)
    variant = Variant(record, MaskSet.pack({key: torch.ones(shape, dtype=torch.bool)}), {}, biases={key: step})
    questions = item_questions(session, ITEMS)
    damage = DamagedModel(session.owner, variant)
    component = role_weights(*key)
    estimated = attribute(session, questions, damage, [component], direction=direction).attributed[0].sum()
    exact = patch(session, questions, damage, [component], direction=direction)
    gain = (exact.exact[0].margin - (exact.pruned if direction == RESTORE else exact.dense).margin).sum()
    assert abs(gain) > 1e-4
    assert estimated == pytest.approx(gain, rel=0.1)
    assert session.anatomy.bias(*key) is None
