from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from tokenizers.processors import ByteLevel
from torch.nn.functional import cross_entropy

from probes import NeuronFiring, PooledStates, Session, TokenLoss
from pruning import Segment
from pruning.anatomy import BLOCK_SITES
from pruning.errors import TextError


class Recorder:
    """Keeps everything: what the probes see."""

    sites = frozenset({*BLOCK_SITES, "final"})

    def __init__(self):
        self.seen = {}

    def read(self, layer, site, value, batch):
        self.seen[layer, site] = value.detach().clone()


def hooked(model, anatomy, batch):
    """What plain PyTorch hooks see of the same modules in an ordinary forward pass."""
    seen, handles = {}, []
    places = {(layer, site): anatomy.path(layer, site) for layer in range(3) for site in BLOCK_SITES}
    places[3, "final"] = anatomy.final_norm_path
    for key, path in places.items():
        module = attrgetter(path)(model)
        handles.append(module.register_forward_hook(lambda m, i, o, key=key: seen.__setitem__(key, o)))
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.real, position_ids=batch.positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_every_site_read_through_nnsight_equals_plain_hooks(make_model, architecture, tokenizer, segments):
    session = Session(make_model(architecture), tokenizer)
    (batch,) = session.batches(segments)
    recorder = Recorder()
    session.read(batch, [recorder])
    expected = hooked(session.model, session.anatomy, batch)
    assert recorder.seen.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(recorder.seen[key], value), key


def test_pooled_states_and_firing_counts_equal_sums_over_hooked_values(make_model, architecture, tokenizer, segments):
    session = Session(make_model(architecture), tokenizer)
    (batch,) = session.batches(segments)
    pooled, firing = PooledStates(len(segments), 3, 32), NeuronFiring(3, 48)
    session.read(batch, [pooled, firing])
    seen = hooked(session.model, session.anatomy, batch)
    for row, index in enumerate(batch.segments):
        counted = batch.counted[row].bool()
        for layer in range(3):
            torch.testing.assert_close(pooled.means[index, layer], seen[layer, "residual"][row, counted].mean(dim=0))
    for layer in range(3):
        fired = (seen[layer, "activation"][batch.counted.bool()] > 0).sum(dim=0)
        assert torch.equal(firing.fired[layer], fired)
    assert firing.tokens == int(batch.counted.sum())


def test_token_loss_is_the_cross_entropy_of_the_models_own_logits(make_model, architecture, tokenizer, segments):
    session = Session(make_model(architecture), tokenizer)
    loss = TokenLoss(len(segments), session.anatomy)
    for batch in session.batches(segments):
        session.read(batch, [loss])
    for index, segment in enumerate(segments):
        ids = tokenizer(segment.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = session.model(input_ids=ids).logits
        expected = cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        assert loss.nll[index].item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss.predicted[index] == ids.shape[1] - 1


def test_special_tokens_and_padding_are_not_counted(model, tokenizer, segments):
    (batch,) = Session(model, tokenizer).batches(segments)
    (with_special,) = Session(model, tokenizer, special_tokens=True).batches(segments)
    lengths = [len(tokenizer(segments[i].text)["input_ids"]) for i in batch.segments]
    assert batch.counted.sum(dim=1).tolist() == [length - 1 for length in lengths]
    assert with_special.counted.sum(dim=1).tolist() == lengths
    assert not (batch.counted.bool() & (batch.ids == tokenizer.bos_token_id)).any()


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


def test_a_segment_of_one_token_is_read_but_predicts_nothing(model, tokenizer):
    tokenizer.backend_tokenizer.post_processor = ByteLevel()  # no BOS
    session = Session(model, tokenizer)
    (batch,) = session.batches([Segment("1", "a"), Segment("2", "ab")])
    loss, pooled = TokenLoss(2, session.anatomy), PooledStates(2, 3, 32)
    session.read(batch, [loss, pooled])
    assert loss.predicted.tolist() == [0, 1]
    assert loss.nll[0] == 0
    assert torch.isfinite(pooled.means).all()
