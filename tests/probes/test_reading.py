from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from probes import DENSE, DenseSignal, Readings, Session, read_against_dense
from probes.readers.firing import FOLDS
from probes.readers.signal import SIGNAL_SITES
from pruning import Anatomy, CalibrationSet, Corpus, MaskSet, Recipe, prune, text_source
from pruning.errors import StudyError


@pytest.fixture
def variants(model, tokenizer):
    return prune(model, tokenizer, [Recipe(method="magnitude", sparsity=s) for s in (0.3, 0.6)])


def read(model, tokenizer, segments, variants=(), **settings):
    return read_against_dense(Session(model, tokenizer, **settings), segments, variants)


def test_a_variant_that_prunes_nothing_differs_in_nothing(model, tokenizer, segments, variants):
    everything = MaskSet.pack({key: torch.ones_like(mask) for key, mask in variants[0].masks.items()})
    same = replace(variants[0], masks=everything)
    readings = read(model, tokenizer, segments, [same])
    dense, pruned = readings[DENSE], readings[same.id]
    assert torch.count_nonzero(pruned.error) == 0
    assert (pruned.power > 0).all()
    for field in fields(Readings):
        assert torch.equal(getattr(pruned, field.name), getattr(dense, field.name)), field.name


def test_error_is_the_squared_difference_of_the_two_models(model, tokenizer, segments, variants):
    readings = read(model, tokenizer, segments, variants[:1])
    ids = tokenizer(segments[1].text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        dense = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, 1:]
        with variants[0].applied(model):
            pruned = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, 1:]
    error = readings[variants[0].id].error[1, 1, -1].item()
    power = readings[variants[0].id].power[1, 1, -1].item()
    assert error == pytest.approx(((dense - pruned) ** 2).sum().item(), rel=1e-4)
    assert power == pytest.approx((dense**2).sum().item(), rel=1e-4)


@pytest.mark.parametrize("settings", [{"batch_tokens": 1}, {"batch_tokens": 60}, {"padding": "left"}])
def test_padding_and_batch_size_change_nothing_beyond_rounding(make_model, decoder, tokenizer, segments, settings):
    model = make_model(decoder)
    variants = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.4)])
    one, other = (
        read(model, tokenizer, segments, variants),
        read(model, tokenizer, segments, variants, **settings),
    )
    for name in one:
        for field in fields(Readings):
            torch.testing.assert_close(
                getattr(one[name], field.name),
                getattr(other[name], field.name),
                rtol=2e-4,
                atol=1e-5,
                equal_nan=True,
            )


def test_sums_are_there_for_the_sites_that_a_model_has(make_model, decoder, tokenizer, segments):
    model = make_model(decoder)
    anatomy = Anatomy(model)
    variant = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.4)])[0]
    readings = read(model, tokenizer, segments, [variant])
    for layer in range(3):
        for position, site in enumerate(SIGNAL_SITES):
            power = readings[DENSE].power[:, layer, position]
            error, own = (readings[name].error[:, layer, position] for name in (variant.id, DENSE))
            if site in anatomy.sites(layer):
                assert (power > 0).all()
                assert (error > 0).all()
                assert (own == 0).all()
            else:
                assert torch.stack([power, error, own]).isnan().all()
    experts = decoder in ("mixtral", "qwen2_moe", "qwen3_moe")
    assert readings[DENSE].fired.shape == (FOLDS, 3, 0 if experts else 128 if decoder == "bloom" else 48)
    assert readings[DENSE].fired.sum() > 0 or experts


def test_activations_that_were_kept_are_those_that_were_read(make_model, decoder, tokenizer, segments):
    """Nothing in the model writes into an output after it was read."""
    session = Session(make_model(decoder), tokenizer)
    (batch,) = session.batches(segments)
    power = []
    for _ in range(2):
        signal = DenseSignal(len(segments), 3)
        session.read(batch, [signal])
        power.append(signal.power)
        for (layer, site), value in signal.take_activations().items():
            norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
            squares = (norms.double().square() * batch.counted).sum(dim=1)
            assert torch.equal(squares, signal.power[list(batch.segments), layer, SIGNAL_SITES.index(site)])
    assert torch.equal(*(sums.nan_to_num(-1) for sums in power))


def test_readings_without_neurons_come_back_from_disk(tmp_path, make_model, tokenizer, segments):
    readings = read(make_model("mixtral"), tokenizer, segments)[DENSE]
    readings.save(tmp_path / "en.safetensors")
    opened = Readings.open(tmp_path / "en.safetensors")
    assert opened.fired.shape == (FOLDS, 3, 0)
    assert torch.equal(opened.power.isnan(), readings.power.isnan())


def test_variants_read_together_equal_variants_read_alone(model, tokenizer, segments, variants, monkeypatch):
    together = read(model, tokenizer, segments, variants, batch_tokens=60)
    monkeypatch.setattr("probes.reading._DENSE_BYTES", 1)  # one batch of dense activations at a time
    for variant in variants:
        alone = read(model, tokenizer, segments, [variant], batch_tokens=60)[variant.id]
        for field in fields(Readings):
            assert torch.equal(getattr(together[variant.id], field.name), getattr(alone, field.name))


def test_the_model_is_dense_again_afterwards(model, tokenizer, segments, variants):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read(model, tokenizer, segments, variants)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pruning_still_works_on_a_model_that_a_session_reads(make_model, decoder, tokenizer, segments):
    model, text = make_model(decoder), text_source("bundled")
    recipe, calibration = Recipe(method="wanda", sparsity=0.5), CalibrationSet.named("en", samples=2, length=16)
    before = prune(model, tokenizer, recipe, Corpus(text, text, text), calibration)[0]
    session = Session(model, tokenizer)
    first = read_against_dense(session, segments)[DENSE]
    assert prune(model, tokenizer, recipe, Corpus(text, text, text), calibration)[0].masks == before.masks
    assert torch.equal(read_against_dense(session, segments)[DENSE].pooled, first.pooled)


def test_bytes_are_those_of_the_text_that_was_read(model, tokenizer, segments):
    whole = read(model, tokenizer, segments)[DENSE].utf8_bytes.tolist()
    assert whole == [len(s.text.encode()) for s in segments]
    cut = read(model, tokenizer, segments, max_length=9)[DENSE]
    assert (cut.utf8_bytes <= 9).all()
    assert (cut.predicted <= 8).all()


def test_saved_readings_come_back_and_damage_is_noticed(tmp_path, model, tokenizer, segments):
    readings = read(model, tokenizer, segments)[DENSE]
    path = tmp_path / "en.safetensors"
    readings.save(path)
    opened = Readings.open(path)
    assert all(torch.equal(getattr(opened, f.name), getattr(readings, f.name)) for f in fields(Readings))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(StudyError, match="damaged"):
        Readings.open(path)
