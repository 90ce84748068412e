"""What is predicted after every block equals what plain hooks, the model's own norm and head give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint
from conftest import tiny_model
from torch import nn

from probes import DENSE, HeldoutStream, Session, Together, TokenLanguages, plan_reading, read_lens, read_streams
from probes.lens import SHARED, UNSEEN, LensReadings, LensStream
from probes.readers.lens import LENS_SUMS
from probes.readers.sampled import Sample
from pruning import Anatomy, Recipe, Segment, load_model, prune
from pruning.errors import StudyError, TextError

KL, ENTROPY, LOSS, AGREEMENT = (LENS_SUMS.index(name) for name in ("kl", "entropy", "loss", "agreement"))
#: Grouped keys, fused projections, capped logits, scaled logits with tied heads, one without gates.
KINDS = ["llama", "phi3", "gemma2", "cohere", "gpt2"]


def languages_of(size=300):
    """Kinds of tokens that have nothing to do with text."""
    kinds = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(3))
    return TokenLanguages(("en", "sw", SHARED, UNSEEN), kinds)


def pruned(model, tokenizer, sparsity=0.5, **settings):
    return prune(model, tokenizer, [Recipe(method="magnitude", sparsity=sparsity, **settings)])[0]


def hooked(model, anatomy, ids):
    """States after every block, the last one included, by plain hooks, before the final norm."""
    states: dict[int, torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(anatomy.blocks):

        def keep(module, inputs, output, layer=layer):
            states[layer] = output[0] if isinstance(output, tuple) else output

        handles.append(block.register_forward_hook(keep))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    for handle in handles:
        handle.remove()
    return [states[layer] for layer in range(len(anatomy.blocks))], logits


def by_hand(model, anatomy, tokenizer, segments, sample, kinds, variant):
    """Sums over the sampled positions of every segment, one segment at a time, with whole logits in float64."""
    sums = torch.zeros(len(anatomy.blocks), len(segments), len(LENS_SUMS), dtype=torch.float64)
    mass = torch.zeros(len(anatomy.blocks), len(segments), len(kinds.names), dtype=torch.float64)
    for number, segment in enumerate(segments):
        ids = tokenizer(segment.text, return_tensors="pt")["input_ids"]
        where = sample.position[sample.segment == number]
        _, dense = hooked(model, anatomy, ids)
        p = dense.log_softmax(dim=-1)[where]
        if variant is None:
            states, _ = hooked(model, anatomy, ids)
        else:
            with variant.applied(model):
                states, _ = hooked(model, anatomy, ids)
        for layer, state in enumerate(states):
            with torch.no_grad():
                q = anatomy.logits(anatomy.normed(state))[0].double().log_softmax(dim=-1)[where]
            sums[layer, number, KL] = (p.exp() * (p - q)).sum()
            sums[layer, number, ENTROPY] = -(q.exp() * q).sum()
            sums[layer, number, LOSS] = -q.gather(1, ids[0, where + 1][:, None]).sum()
            sums[layer, number, AGREEMENT] = (q.argmax(dim=-1) == p.argmax(dim=-1)).sum()
            for kind in range(len(kinds.names)):
                mass[layer, number, kind] = q.exp()[:, kinds.kinds == kind].sum()
    return sums, mass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_predictions_equal_those_of_plain_hooks(make_model, kind, padding, tokenizer, segments):
    model = make_model(kind)
    anatomy, kinds, variant = Anatomy(model), languages_of(), pruned(model, tokenizer)
    session = Session(model, tokenizer, batch_tokens=60, padding=padding)
    found = read_lens(session, segments, kinds, [variant], tokens=40)
    sample = Sample.of(session.batches(segments), 40)
    assert len(sample) == 40
    for name, read in found.items():
        sums, mass = by_hand(model, anatomy, tokenizer, segments, sample, kinds, None if name == DENSE else variant)
        torch.testing.assert_close(read.sums[0], sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read.mass[0], mass, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read.mass.sum(dim=-1), read.sampled.double().expand(1, 3, -1))
        assert read.layers.tolist() == [0, 1, 2]
        assert read.sampled.tolist() == torch.bincount(sample.segment, minlength=len(segments)).tolist()
    assert found[DENSE].sums[0, -1, :, KL].abs().max() < 1e-4
    assert torch.equal(found[DENSE].sums[0, -1, :, AGREEMENT], found[DENSE].sampled.double())
    assert found[variant.id].sums[0, -1, :, KL].sum() > 1e-3


def test_the_decoder_of_an_encoder_decoder_is_read(make_model, tokenizer, segments):
    session = Session(make_model("mt5"), tokenizer, batch_tokens=60)
    variant = pruned(session.model, tokenizer)
    found = read_lens(session, segments[:3], languages_of(), [variant], tokens=20)
    stream = HeldoutStream(session, segments[:3], [variant.id])
    lens = LensStream(session, segments[:3], [DENSE, variant.id], tokens=20)
    plan = plan_reading(session, [stream, lens, reference := lens.reference()], trial=False)
    read_streams(session, [reference], {}, plan)
    lens.prepare(reference, languages_of())
    read_streams(session, [Together(stream, lens)], {variant.id: variant}, plan)
    for name, read in found.items():
        assert read.layers.tolist() == [2, 3]
        torch.testing.assert_close(lens.readings[name].sums, read.sums)
    assert found[DENSE].sums[0, -1, :, KL].abs().max() < 1e-4
    everything = LensStream(session, segments[:3], [DENSE], tokens=10_000)
    read_streams(session, [reference := everything.reference()], {}, plan)
    everything.prepare(reference, languages_of())
    read_streams(session, [everything], {}, plan)
    dense = stream.readings[DENSE]  # whose loss also is of the token after the start token
    assert everything.readings[DENSE].sampled.tolist() == (dense.predicted - 1).tolist()
    assert (everything.readings[DENSE].sums[0, -1, :, LOSS] < dense.nll).all()


def test_in_one_pass_with_the_text_no_number_changes(make_model, tokenizer, segments):
    session = Session(make_model("llama"), tokenizer, batch_tokens=60)
    variant = pruned(session.model, tokenizer)
    variants, kinds = {variant.id: variant}, languages_of()
    alone = HeldoutStream(session, segments, list(variants))
    plan = plan_reading(session, [alone], trial=False)
    read_streams(session, [alone], variants, plan)
    whole, lens = (
        HeldoutStream(session, segments, list(variants)),
        LensStream(session, segments, list(variants), tokens=9),
    )
    read_streams(session, [reference := lens.reference()], {}, plan)
    lens.prepare(reference, kinds)
    together = Together(whole, lens)
    tight = replace(plan, compared_bytes=1)  # a batch at a time
    read_streams(session, [together], variants, tight)
    for name in (DENSE, variant.id):
        for field in ("pooled", "nll", "power", "error", "fired"):
            one, other = (getattr(stream.readings[name], field) for stream in (alone, whole))
            assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)), field
    assert set(lens.readings) == {variant.id}
    expected = read_lens(session, segments, kinds, [variant], tokens=9)[variant.id]
    torch.testing.assert_close(lens.readings[variant.id].sums, expected.sums)


def test_a_model_is_read_from_its_shards_as_from_memory(tmp_path, tokenizer, segments):
    path = checkpoint(tmp_path / "model", "gemma2")
    found = []
    for stream in (True, False):
        model, _ = load_model(str(path), device="cpu", stream=stream)
        variant = pruned(model, tokenizer)
        found.append(read_lens(Session(model, tokenizer), segments, languages_of(), [variant], tokens=12)[variant.id])
    torch.testing.assert_close(found[0].sums, found[1].sums)


def silenced(model, layers):
    """Make blocks add nothing to the stream."""
    for layer in layers:
        block = model.model.layers[layer]
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.zeros_(projection.weight)
    return model


def test_where_later_blocks_add_nothing_the_prediction_is_final(model, tokenizer, segments):
    session = Session(silenced(model, [1, 2]), tokenizer)
    kl = read_lens(session, segments, languages_of(), tokens=30)[DENSE].sums[0, ..., KL].sum(dim=1) / 30
    assert kl[:3].abs().max() < 1e-6
    session = Session(silenced(tiny_model(), [2]), tokenizer)
    kl = read_lens(session, segments, languages_of(), tokens=30)[DENSE].sums[0, ..., KL].sum(dim=1) / 30
    assert kl[1:].abs().max() < 1e-6
    assert kl[0] > 0.01


def test_a_variant_departs_from_the_block_that_was_damaged(model, tokenizer, segments):
    variant = pruned(model, tokenizer, blocks="1:2")
    found = read_lens(Session(model, tokenizer), segments, languages_of(), [variant], tokens=30)
    change = (found[variant.id].sums - found[DENSE].sums).abs().sum(dim=(0, 2, 3))
    assert change[0] == 0
    assert (change[1:] > 0.1).all()


@pytest.mark.parametrize("settings", [{"batch_tokens": 1}, {"padding": "left"}, {"batch_tokens": 10_000}])
def test_positions_depend_on_text_and_seed_only(model, tokenizer, segments, settings):
    one, other = (Sample.of(Session(model, tokenizer, **own).batches(segments), 20) for own in ({}, settings))
    for name in ("segment", "position", "following"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    again = Sample.of(Session(model, tokenizer).batches(segments), 20, seed=1)
    assert not torch.equal(one.position, again.position)
    pairs = set(zip(one.segment.tolist(), one.position.tolist(), strict=True))
    assert len(pairs) == 20
    for segment, position, following in zip(one.segment, one.position, one.following, strict=True):
        ids = tokenizer(segments[segment].text)["input_ids"]
        assert position >= 1  # after BOS
        assert ids[position + 1] == following


def test_a_text_without_two_tokens_in_a_row_is_refused(model, tokenizer):
    with pytest.raises(TextError, match="two tokens in a row"):
        Sample.of(Session(model, tokenizer).batches([Segment("1", "a"), Segment("2", "b")]), 3)


def test_tokens_are_of_the_language_in_which_they_are_most_frequent():
    counts = torch.tensor(
        [
            [1.0, 10, 0, 40, 3, 0, 0, 0],
            [0.0, 10, 1, 11, 9, 0, 23, 0],
            [0.0, 10, 0, 11, 9, 0, 0, 24],
        ]
    )
    assert counts.sum(dim=1).tolist() == [54, 54, 54]
    kinds = TokenLanguages.counted(("en", "sw", "zh"), counts)
    assert kinds.names == ("en", "sw", "zh", SHARED, UNSEEN)
    # once in English only; everywhere; once in Swahili only; 40 of 62, less than two thirds; in two of three; never
    assert [kinds.names[kind] for kind in kinds.kinds[:6]] == ["en", SHARED, "sw", SHARED, SHARED, UNSEEN]


def test_a_language_with_more_text_does_not_own_more_tokens():
    counts = torch.tensor([[100.0, 900], [10, 90]])
    assert TokenLanguages.counted(("en", "sw"), counts).kinds.tolist() == [2, 2]


def test_tokens_are_counted_in_text(model, tokenizer):
    text = {"en": [Segment("1", "aab")], "zh": [Segment("1", "我b")]}
    kinds = TokenLanguages.of(Session(model, tokenizer), text)
    of = {letter: kinds.names[kinds.kinds[tokenizer(letter)["input_ids"][1]]] for letter in "abx"}
    assert of == {"a": "en", "b": SHARED, "x": UNSEEN}
    assert kinds.names[kinds.kinds[tokenizer("我")["input_ids"][1]]] == "zh"
    assert kinds.names[kinds.kinds[tokenizer.bos_token_id]] == UNSEEN


def test_readings_come_back_from_their_file(model, tokenizer, segments, tmp_path):
    read = read_lens(Session(model, tokenizer), segments, languages_of(), tokens=10)[DENSE]
    read.save(tmp_path / "en-lens.safetensors")
    again = LensReadings.open(tmp_path / "en-lens.safetensors")
    assert again.kinds == read.kinds == ("en", "sw", SHARED, UNSEEN)
    tensors = {name: value for name, value in vars(read).items() if name != "kinds"}
    assert all(torch.equal(value, getattr(again, name)) for name, value in tensors.items())
    content = (tmp_path / "en-lens.safetensors").read_bytes()
    (tmp_path / "en-lens.safetensors").write_bytes(content[:-5])
    with pytest.raises(StudyError, match="damaged"):
        LensReadings.open(tmp_path / "en-lens.safetensors")
