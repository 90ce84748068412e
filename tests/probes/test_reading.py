from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from tokenizers import processors

from probes import (
    DENSE,
    FittingStream,
    HeldoutStream,
    Item,
    Keep,
    QuestionStream,
    Readings,
    Session,
    SignalPower,
    item_questions,
    plan_reading,
    pooled_states,
    read_against_dense,
    read_streams,
    score,
)
from probes.readers.firing import FOLDS
from probes.readers.signal import SIGNAL_SITES
from pruning import Anatomy, CalibrationSet, Corpus, MaskSet, Recipe, Segment, load_model, prune, text_source
from pruning.engine.plan import MemoryCapError
from pruning.errors import DiskError, StudyError


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
    there = [site in Anatomy(model).sites(0) for site in SIGNAL_SITES]
    assert torch.count_nonzero(pruned.error[..., there]) == 0
    assert (pruned.power[..., there] > 0).all()
    assert_same(pruned, dense)


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
    neurons = {"bloom": 128, "mixtral": 4 * 48, "qwen2_moe": 4 * 24 + 40, "qwen3_moe": 4 * 24}
    assert readings[DENSE].fired.shape == (FOLDS, 3, neurons.get(decoder, 48))
    assert readings[DENSE].fired.sum() > 0


def test_activations_that_were_kept_are_those_that_were_read(make_model, decoder, tokenizer, segments):
    """Nothing in the model writes into an output after it was read."""
    session = Session(make_model(decoder), tokenizer)
    (batch,) = session.batches(segments)
    power = []
    for _ in range(2):
        power.append(torch.full((len(segments), 3, len(SIGNAL_SITES)), torch.nan, dtype=torch.float64))
        keep = Keep(SIGNAL_SITES)
        session.read(batch, [SignalPower([power[-1]]), keep])
        for (layer, site), value in keep.values.items():
            norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
            squares = (norms.double().square() * batch.counted).sum(dim=1)
            assert torch.equal(squares, power[-1][list(batch.segments), layer, SIGNAL_SITES.index(site)])
    assert torch.equal(*(sums.nan_to_num(-1) for sums in power))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # with neurons, and without
def test_readings_in_a_file_are_those_in_memory(tmp_path, make_model, kind, tokenizer, segments):
    model = make_model(kind)
    variants = {v.id: v for v in prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.4)])}
    files = {name: tmp_path / name / "en.safetensors" for name in (DENSE, *variants)}
    session = Session(model, tokenizer)
    stream = HeldoutStream(session, segments, list(variants), files)
    read_streams(session, [stream], variants, plan_reading(session, [stream]))
    expected = read_against_dense(session, segments, list(variants.values()))
    for name, path in files.items():
        assert_same(Readings.open(path), expected[name])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"en.safetensors"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: b"",
        lambda content: content[:3],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b"pooled", b"pulled"),
    ],
)
def test_a_damaged_file_of_readings_is_told(tmp_path, model, tokenizer, segments, damage):
    session, path = Session(model, tokenizer), tmp_path / "en.safetensors"
    stream = HeldoutStream(session, segments, [], {DENSE: path})
    read_streams(session, [stream], {}, plan_reading(session, [stream]))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StudyError, match="is damaged"):
        Readings.open(path)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted there")
def test_a_file_of_readings_takes_one_descriptor(tmp_path, model, tokenizer, segments):
    """Thirty variants in seven languages are read at once, and a process may often open 1,024 files."""
    session = Session(model, tokenizer)
    files = {DENSE: tmp_path / "en.safetensors"}
    stream = HeldoutStream(session, segments, [], files)

    def opened_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened_files()
    with stream.opened():
        assert opened_files() <= before + 1
    again = Readings.open(files[DENSE])
    assert opened_files() <= before + 2
    assert again.power.isnan().all()


def test_if_a_file_of_readings_cannot_be_made_the_others_are_removed(tmp_path, model, tokenizer, segments):
    (tmp_path / "taken").write_text("a file, not a folder")
    files = {DENSE: tmp_path / "dense.safetensors", "other": tmp_path / "taken" / "other.safetensors"}
    stream = HeldoutStream(Session(model, tokenizer), segments, ["other"], files)
    with pytest.raises(DiskError) as held:  # its traceback keeps alive whatever was not closed
        stream.opened()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert "taken" in str(held.value)


def assert_same(one, other):
    for field in fields(Readings):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left.isnan(), right.isnan()), field.name
        assert torch.equal(left.nan_to_num(-1), right.nan_to_num(-1)), field.name


def test_variants_read_together_equal_variants_read_alone(model, tokenizer, segments, variants):
    together = read(model, tokenizer, segments, variants, batch_tokens=60)
    for variant in variants:
        alone = read(model, tokenizer, segments, [variant], batch_tokens=60)[variant.id]
        assert_same(together[variant.id], alone)


@pytest.mark.parametrize("tight", [{"wave_bytes": 1}, {"compared_bytes": 1}, {"states_on_host": True}])
def test_a_tight_plan_changes_no_number(model, tokenizer, segments, variants, tight):
    session = Session(model, tokenizer, batch_tokens=60)  # three batches
    stream = HeldoutStream(session, segments, [variant.id for variant in variants])
    plan = replace(plan_reading(session, [stream]), **tight)
    read_streams(session, [stream], {variant.id: variant for variant in variants}, plan)
    for name, readings in read(model, tokenizer, segments, variants, batch_tokens=60).items():
        assert_same(stream.readings[name], readings)


def test_text_and_questions_of_all_kinds_go_through_together(model, tokenizer, segments, variants):
    named = {variant.id: variant for variant in variants}
    session = Session(model, tokenizer, batch_tokens=60)
    items = [
        Item(id=str(i), twin=str(i), category="x", prompt="ab" * i, choices=(" c", " de"), answer=0) for i in (1, 9)
    ]
    questions = item_questions(session, items)
    heldout = HeldoutStream(session, segments, list(named))
    fitting = FittingStream(session, segments[:3])
    asked = QuestionStream(session, questions, [*named, DENSE])
    others = QuestionStream(session, questions[:1], [variants[1].id])  # of one variant alone
    streams = [heldout, fitting, asked, others]
    read_streams(session, streams, named, plan_reading(session, streams))
    for name, readings in read_against_dense(session, segments, variants).items():
        assert_same(heldout.readings[name], readings)
    assert torch.equal(fitting.pooled.transpose(0, 1), pooled_states(session, segments[:3]))
    assert (asked.scores[DENSE].values == score(session, questions).values).all()
    for variant in variants:
        with variant.applied(model):
            assert (asked.scores[variant.id].values == score(session, questions).values).all()
    alone = others.scores[variants[1].id].values  # a batch of another size may be summed in another order
    np.testing.assert_allclose(alone, asked.scores[variants[1].id].values[:1], rtol=1e-6)


def test_a_variant_of_some_projections_leaves_the_others_dense(model, tokenizer, segments):
    """Each block is the dense one where a variant prunes nothing, whatever the variant before it did there."""
    recipes = [
        Recipe(method="magnitude", sparsity=0.5),
        Recipe(method="magnitude", sparsity=0.5, roles=("down",), blocks="1"),
        Recipe(method="magnitude", sparsity=0.5, roles=("q",)),
    ]
    variants = prune(model, tokenizer, recipes)
    together = read(model, tokenizer, segments, variants)
    for variant in variants:
        assert_same(together[variant.id], read(model, tokenizer, segments, [variant])[variant.id])


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "cohere2", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_model_is_read_from_its_shards_as_from_memory(tmp_path, tokenizer, segments, kind):
    folder = checkpoint(tmp_path, kind)
    read_from = []
    for stream in (True, False):
        model, _ = load_model(str(folder), stream=stream)
        if not stream:  # where a tensor starts in its shard can change the last bit of a product with it
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        variants = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.5)])
        read_from.append(read(model, tokenizer, segments, variants, batch_tokens=60))
        if stream:
            assert all(parameter.is_meta for parameter in model.parameters())
    for name in read_from[1]:
        assert_same(read_from[0][name], read_from[1][name])


def test_a_cap_that_holds_no_block_says_how_much_it_takes(model, tokenizer, segments):
    session = Session(model, tokenizer)
    stream = HeldoutStream(session, segments, [])
    with pytest.raises(MemoryCapError, match=r"1.0 MiB of memory cannot hold one block .* raise --memory"):
        plan_reading(session, [stream], memory=1 << 20)


def test_device_memory_of_a_cpu_is_refused(model, tokenizer, segments):
    session = Session(model, tokenizer)
    with pytest.raises(MemoryCapError, match="no device memory to cap: the model is on the CPU; use --memory"):
        plan_reading(session, [FittingStream(session, segments)], device_memory=1 << 30)


def test_a_smaller_cap_makes_more_waves_and_stays_below_it(model, tokenizer):
    session = Session(model, tokenizer, batch_tokens=4096)
    text = [Segment(str(i), "word " * 20) for i in range(4000)]
    stream = HeldoutStream(session, text, ["a", "b", "c"])
    generous = plan_reading(session, [stream])
    cap = generous.memory - (generous.wave_bytes + generous.compared_bytes) * 2 // 3
    tight = plan_reading(session, [stream], memory=cap)
    assert generous.waves == 1
    assert tight.waves > 1
    assert tight.memory <= cap
    assert "waves" in str(tight)


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


def test_bytes_are_those_of_the_text_that_is_predicted(model, tokenizer, segments):
    after_bos = read(model, tokenizer, segments)[DENSE]
    assert after_bos.utf8_bytes.tolist() == after_bos.predicted.tolist() == [len(s.text.encode()) for s in segments]
    cut = read(model, tokenizer, segments[:3], max_length=9)[DENSE]  # of one byte a character
    assert cut.utf8_bytes.tolist() == cut.predicted.tolist() == [8, 8, 8]
    eos = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = eos
    before_eos = read(model, tokenizer, segments)[DENSE]
    assert before_eos.utf8_bytes.tolist() == before_eos.predicted.tolist() == after_bos.predicted.tolist()
    torch.testing.assert_close(before_eos.nll, after_bos.nll)


@pytest.mark.parametrize("skip_first", [True, False])
def test_without_bos_the_first_character_is_not_predicted(model, tokenizer, segments, skip_first):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    dense = read(model, tokenizer, segments, skip_first=skip_first)[DENSE]
    assert dense.predicted.tolist() == [len(s.text.encode()) - 1 for s in segments]
    assert dense.utf8_bytes.tolist() == [len(s.text[1:].encode()) for s in segments]  # 我 is three tokens


def test_special_tokens_that_a_text_spells_out_have_no_bytes(model, tokenizer):
    (read_whole,) = (read(model, tokenizer, [Segment("1", "one<eos>two")])[DENSE],)
    assert read_whole.utf8_bytes.tolist() == read_whole.predicted.tolist() == [6]
