from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from tokenizers.processors import ByteLevel, TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from probes import NeuronFiring, PooledStates, Reader, Session, TokenLoss
from probes.readers.firing import FOLDS, neuron_places
from pruning import Segment
from pruning.errors import TextError
from pruning.models.anatomy import HEADS, ROLES
from pruning.models.arithmetic import fast_float32


class Recorder(Reader):
    """Keeps everything: what the probes see."""

    sites = frozenset({*ROLES, *HEADS, "activation", "shared_activation", "experts", "residual", "final"})

    def __init__(self):
        self.seen = {}

    def read(self, layer, site, value, batch, dense=None):
        self.seen[layer, site] = value.detach().clone()


def token_loss(segments, session):
    return TokenLoss(
        torch.zeros(segments, dtype=torch.float64), torch.zeros(segments, dtype=torch.int64), session.anatomy
    )


def hooked(model, anatomy, batch):
    """What plain PyTorch hooks see of the same modules in an ordinary forward pass."""
    seen, handles = {}, []
    places = {
        (layer, site): anatomy.path(layer, site)
        for layer in range(3)
        for site in anatomy.sites(layer)
        if site != "routing" and not site.startswith("expert.")  # no module has them for output
    }
    places[3, "final"] = anatomy.final_norm_path

    def hook(key):
        def keep(module, inputs, output):
            value = anatomy.site(*key, output, batch.ids.shape) if key[0] < 3 else output
            seen[key] = (inputs[0] if key[1] in HEADS else value).clone()

        return keep

    for key, path in places.items():
        handles.append(attrgetter(path)(model).register_forward_hook(hook(key)))
    positions = {} if anatomy.kind == "bloom" else {"position_ids": batch.positions}  # it has none
    with torch.no_grad(), fast_float32(anatomy.device):
        model(input_ids=batch.ids, attention_mask=batch.real, **positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_every_site_read_through_nnsight_equals_plain_hooks(make_model, decoder, tokenizer, segments):
    check_all_sites(Session(make_model(decoder), tokenizer), segments)


@pytest.mark.parametrize("kind", ["olmo2", "granite", "starcoder2", "phi", "stablelm", "xglm"])
def test_architectures_that_are_not_in_the_table_are_read_too(make_model, kind, tokenizer, segments):
    check_all_sites(Session(make_model(kind), tokenizer), segments)


def read_by_block(session, batch):
    """What a reader sees if the model runs a block at a time."""
    recorder = Recorder()
    hidden, arguments = session.starter().begin(**session.stack_inputs(batch))
    for layer in range(3):
        hidden = session.read_block(layer, hidden, arguments[layer], batch, [recorder])
    session.read_final(hidden, batch, [recorder])
    return recorder.seen


def check_all_sites(session, segments):
    (batch,) = session.batches(segments)
    recorder = Recorder()
    session.read(batch, [recorder])
    expected = hooked(session.model, session.anatomy, batch)
    by_block = read_by_block(session, batch)
    assert recorder.seen.keys() == by_block.keys() == expected.keys()
    for (layer, site), value in expected.items():
        assert torch.equal(recorder.seen[layer, site], value), (layer, site)
        assert torch.equal(by_block[layer, site], value), (layer, site)
        if site in ROLES:
            assert value.shape == (*batch.ids.shape, session.anatomy.shape(layer, site)[0])


def test_pooled_states_and_firing_counts_equal_sums_over_hooked_values(make_model, decoder, tokenizer, segments):
    session = Session(make_model(decoder), tokenizer)
    (batch,) = session.batches(segments)
    seen = hooked(session.model, session.anatomy, batch)
    active = [layer for layer in range(3) if (layer, "activation") in seen]
    pooled = PooledStates(torch.zeros(3, len(segments), 32))
    places = neuron_places(session.anatomy)
    neurons = max(place.stop for place in places.values())
    firing = NeuronFiring(torch.zeros(FOLDS, 3, neurons, dtype=torch.int32), places)
    session.read(batch, [pooled, firing])
    for row, index in enumerate(batch.segments):
        counted = batch.counted[row].bool()
        for layer in range(3):
            torch.testing.assert_close(pooled.means[layer, index], seen[layer, "residual"][row, counted].mean(dim=0))
    assert active == {"mixtral": [], "qwen2_moe": [0], "qwen3_moe": [1]}.get(decoder, [0, 1, 2])
    for layer in active:
        fired = (seen[layer, "activation"][batch.counted.bool()] > 0).sum(dim=0)
        counts = firing.fired[:, layer, places[layer, "activation"]]
        assert torch.equal(counts.sum(dim=0), fired)
        for row, index in enumerate(batch.segments):  # fewer segments than folds: each has one of its own
            alone = (seen[layer, "activation"][row, batch.counted[row].bool()] > 0).sum(dim=0)
            assert torch.equal(counts[index].long(), alone)


def test_two_sessions_of_one_model_read_the_same(make_model, decoder, tokenizer, segments):
    model = make_model(decoder)
    one, other = Recorder(), Recorder()
    for recorder in (one, other):
        session = Session(model, tokenizer)
        session.read(session.batches(segments)[0], [recorder])
    assert all(torch.equal(value, other.seen[key]) for key, value in one.seen.items())


def test_a_model_gets_only_the_inputs_that_it_takes(make_model, tokenizer, segments):
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    whole, plain = Recorder(), Recorder()
    for recorder, kind in ((whole, LlamaForCausalLM), (plain, Plain)):
        model = make_model("llama")
        model.__class__ = kind
        session = Session(model, tokenizer)
        (batch,) = session.batches(segments)
        session.read(batch, [recorder])
    real = batch.real.bool()
    for key, value in whole.seen.items():
        torch.testing.assert_close(plain.seen[key][real], value[real])


def test_token_loss_is_the_cross_entropy_of_the_models_own_logits(make_model, decoder, tokenizer, segments):
    session = Session(make_model(decoder), tokenizer)
    loss = token_loss(len(segments), session)
    for batch in session.batches(segments):
        session.read(batch, [loss])
    for index, segment in enumerate(segments):
        ids = tokenizer(segment.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = session.model(input_ids=ids).logits
        expected = cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        assert loss.nll[index].item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss.predicted[index] == ids.shape[1] - 1


BOS_AND_EOS = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("added", [None, ByteLevel(), BOS_AND_EOS], ids=["BOS", "nothing", "BOS and EOS"])
def test_neither_the_first_token_nor_special_ones_nor_padding_count(model, tokenizer, segments, added, padding):
    if added is not None:
        tokenizer.backend_tokenizer.post_processor = added
    (batch,) = Session(model, tokenizer, padding=padding).batches(segments)
    first = (batch.positions == 0) & batch.real.bool()
    special = torch.isin(batch.ids, torch.tensor([1, 2]))
    assert torch.equal(batch.counted.bool(), batch.real.bool() & ~first & ~special)
    assert torch.equal(batch.predicted, batch.counted[:, 1:].bool())  # what counts has a token before it
    (whole,) = Session(model, tokenizer, padding=padding, skip_first=False).batches(segments)
    assert torch.equal(whole.counted, whole.real.float())
    assert torch.equal(whole.predicted, (whole.real.bool() & ~first)[:, 1:])


def test_long_segments_are_cut(model, tokenizer, segments):
    batches = Session(model, tokenizer, max_length=8).batches(segments)
    assert max(batch.ids.shape[1] for batch in batches) == 8


def test_batches_respect_their_size_and_miss_nothing(model, tokenizer, segments):
    batches = Session(model, tokenizer, batch_tokens=50).batches(segments)
    assert sorted(i for batch in batches for i in batch.segments) == list(range(len(segments)))
    assert all(batch.ids.numel() <= 50 or len(batch.segments) == 1 for batch in batches)


def test_a_segment_without_text_is_refused(model, tokenizer):
    with pytest.raises(TextError, match='segment "7" has no token to count'):
        Session(model, tokenizer).batches([Segment("7", "")])
    tokenizer.backend_tokenizer.post_processor = ByteLevel()  # no BOS
    with pytest.raises(TextError, match='segment "7" has no token to count'):
        Session(model, tokenizer).batches([Segment("7", "a")])


def test_a_segment_of_one_token_is_read_but_predicts_nothing(model, tokenizer):
    tokenizer.backend_tokenizer.post_processor = ByteLevel()  # no BOS
    session = Session(model, tokenizer, skip_first=False)
    (batch,) = session.batches([Segment("1", "a"), Segment("2", "ab")])
    loss, pooled = token_loss(2, session), PooledStates(torch.zeros(3, 2, 32))
    session.read(batch, [loss, pooled])
    assert loss.predicted.tolist() == [0, 1]
    assert loss.nll[0] == 0
    assert torch.isfinite(pooled.means).all()
