"""Readings of models made elsewhere are those of the checkpoints themselves, whatever of them differs."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from checkpoints import saved
from conftest import tiny_model

from probes import (
    DENSE,
    HeldoutStream,
    Item,
    QuestionStream,
    Readings,
    Session,
    TokenLanguages,
    item_questions,
    plan_reading,
    read_against_dense,
    read_lens,
    read_streams,
    score,
)
from probes.readers.sampled import Sample
from pruning import Anatomy, Variant
from pruning.models.loading import load_weights

#: What is changed of a model: the names of its parameters contain one of these. Rows of tied and untied heads, tables
#: of positions, norms before, inside and after the blocks, routers, and everything at once.
CHANGES = [
    ("llama", "embed_tokens"),
    ("llama", "lm_head"),
    ("llama", "input_layernorm"),
    ("llama", ""),
    ("gemma3_text", "embed_tokens"),
    ("gemma3_text", "model.norm"),
    ("gemma3_text", "q_norm"),
    ("gpt2", "wpe"),
    ("gpt2", "c_attn.bias"),
    ("gpt2", ""),
    ("bloom", "word_embeddings_layernorm"),
    ("qwen2_moe", ".gate.weight"),
    ("qwen2_moe", "shared_expert_gate"),
    ("mt5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    ("mt5", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    ("mt5", "encoder.final_layer_norm"),
    ("mt5", ""),
]


def changed(kind, part):
    random = torch.Generator().manual_seed(5)
    model = tiny_model(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model


def assert_equal(one, other):
    for field in fields(Readings):
        if field.name not in ("power", "error", "agreed"):  # sums that compare the model with its dense parent
            left, right = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(left.isnan(), right.isnan()), field.name
            assert torch.equal(left.nan_to_num(-1), right.nan_to_num(-1)), field.name


@pytest.mark.parametrize(("kind", "part"), CHANGES)
def test_readings_in_lockstep_are_those_of_the_checkpoint(tmp_path, tokenizer, segments, kind, part):
    dense, other = tiny_model(kind), changed(kind, part)
    items = [
        Item(id=str(i), twin=str(i), category="x", prompt="ab" * i, choices=(" c", " de"), answer=0) for i in (1, 9)
    ]
    expected = read_against_dense(Session(other, tokenizer, batch_tokens=60), segments)[DENSE]
    plain = read_against_dense(Session(dense, tokenizer, batch_tokens=60), segments)[DENSE]
    asked = item_questions(Session(other, tokenizer), items)
    answers = score(Session(other, tokenizer), asked).values
    assert not torch.equal(expected.nll, plain.nll)
    folders = saved(dense, tmp_path / "dense"), saved(other, tmp_path / "other")
    for stream in (False, True):
        parent, child = (load_weights(str(f), dtype="float32", device="cpu", stream=stream) for f in folders)
        if not stream:  # where a tensor starts in its shard can change the last bit of a product with it
            for parameter in parent.parameters():
                parameter.data = parameter.data.clone()
        imported = Variant.between(parent, child, "theirs", tmp_path / f"theirs-{stream}")
        session = Session(parent, tokenizer, batch_tokens=60)
        questions = QuestionStream(session, asked, ["theirs", DENSE])
        text = HeldoutStream(session, segments, ["theirs"])
        read_streams(session, [text, questions], {"theirs": imported}, plan_reading(session, [text, questions]))
        assert_equal(text.readings["theirs"], expected)
        assert_equal(text.readings[DENSE], plain)
        np.testing.assert_allclose(questions.scores["theirs"].values, answers, rtol=1e-5)
        if stream:
            assert all(parameter.is_meta for parameter in parent.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "phi3"])
def test_states_loss_and_error_are_those_of_transformers(tokenizer, segments, kind):
    dense, other = tiny_model(kind), changed(kind, "")
    imported = Variant.between(dense, other, "theirs")
    readings = read_against_dense(Session(dense, tokenizer), segments, [imported])
    for number, segment in enumerate(segments):
        ids = tokenizer(segment.text, return_tensors="pt")["input_ids"]
        states = {}
        for name, model in ((DENSE, dense), ("theirs", other)):
            found = []
            blocks = Anatomy(model).blocks
            hooks = [b.register_forward_hook(lambda m, i, o, f=found: f.append(_tensor(o)[0, 1:])) for b in blocks]
            with torch.no_grad():
                logits = model(input_ids=ids).logits.double()
            for hook in hooks:
                hook.remove()
            states[name] = torch.stack(found)
            nll = -logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
            torch.testing.assert_close(readings[name].nll[number], nll, rtol=1e-5, atol=1e-5)
            pooled = readings[name].pooled[:, number]
            torch.testing.assert_close(pooled, states[name].mean(dim=1), rtol=1e-4, atol=1e-5)
        error = (states["theirs"] - states[DENSE]).double().square().sum(dim=(1, 2))
        torch.testing.assert_close(readings["theirs"].error[number, :, -1], error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_lens_has_each_models_own_norm_and_head(tmp_path, tokenizer, segments, kind, stream):
    dense, other = tiny_model(kind), changed(kind, "")
    folder = saved(dense, tmp_path / "dense")
    parent = load_weights(str(folder), dtype="float32", device="cpu", stream=stream)
    imported = Variant.between(dense, other, "theirs")
    languages = TokenLanguages(("en", "rest"), torch.arange(300) % 2)
    session = Session(parent, tokenizer, batch_tokens=60)
    read = read_lens(session, segments, languages, [imported], tokens=40)
    sample = Sample.of(session.batches(segments), 40)
    for name, model in ((DENSE, dense), ("theirs", other)):
        for number, segment in enumerate(segments):
            ids = tokenizer(segment.text, return_tensors="pt")["input_ids"]
            where = sample.position[sample.segment == number]
            found = []
            hooks = [
                block.register_forward_hook(lambda m, i, o, f=found: f.append(_tensor(o)[0]))
                for block in Anatomy(model).blocks
            ]
            with torch.no_grad():
                model(input_ids=ids)
                final = dense(input_ids=ids).logits[0].double().log_softmax(dim=-1)[where]
                for hook in hooks:
                    hook.remove()
                for layer, state in enumerate(found[: len(hooks)]):
                    own = Anatomy(model).logits(Anatomy(model).normed(state)).double().log_softmax(dim=-1)[where]
                    kl = (final.exp() * (final - own)).sum()
                    loss = -own.gather(1, ids[0, where + 1][:, None]).sum()
                    expected = torch.stack([kl, loss])
                    sums = read[name].sums[0, layer, number, [0, 2]]
                    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
                    mass = read[name].mass[0, layer, number]
                    shares = torch.stack([own.exp()[:, kind::2].sum() for kind in (0, 1)])
                    torch.testing.assert_close(mass, shares, rtol=1e-4, atol=1e-4)


def _tensor(output):
    return output[0] if isinstance(output, tuple) else output


def test_variants_with_and_without_other_embeddings_are_read_together_as_alone(tokenizer, segments):
    kinds = {"all": "", "embeddings": "embed_tokens", "norms": "norm", "block": "mlp"}
    dense = tiny_model()
    variants = [Variant.between(dense, changed("llama", part), name) for name, part in kinds.items()]
    together = read_against_dense(Session(dense, tokenizer), segments, variants)
    for name, part in kinds.items():
        alone = read_against_dense(Session(changed("llama", part), tokenizer), segments)
        assert_equal(together[name], alone[DENSE])
