"""Encoder-decoders: what their encoder and decoder read, and that what is read is what plain hooks see."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from tokenizers.processors import ByteLevel, TemplateProcessing

from probes import (
    DENSE,
    FittingStream,
    HeldoutStream,
    Item,
    QuestionStream,
    Reader,
    Readings,
    Session,
    item_questions,
    plan_reading,
    pooled_states,
    read_against_dense,
    read_streams,
    score,
    text_questions,
)
from probes.readers.firing import FOLDS
from probes.readers.signal import SIGNAL_SITES
from probes.streams import AtHead
from pruning import MaskSet, Recipe, Segment, load_model, prune
from pruning.errors import ModelError, TextError
from pruning.models.anatomy import HEADS, ROLES
from pruning.models.arithmetic import fast_float32

KINDS = ["mt5", "t5", "umt5"]
#: Blocks of the tiny models: two of the encoder, two of the decoder.
ENCODER, BLOCKS, DECODER_START = 2, 4, 0
ITEMS = [
    Item(id="1a", twin="1", prompt="The cat sat on the", choices=(" mat", " hat"), answer=0),
    Item(id="2", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " rot.", " g"), answer=0),
    Item(id="3", prompt="Yes or no?", choices=("y", "n"), answer=1),
]


@pytest.fixture
def tokenizer(tokenizer):
    """One that ends every text with EOS, as T5's does, and adds nothing before it."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    return tokenizer


def pruned(model, tokenizer, *sparsities):
    return prune(model, tokenizer, [Recipe(method="magnitude", sparsity=sparsity) for sparsity in sparsities])


class Recorder(Reader):
    sites = frozenset({*ROLES, *HEADS, "activation", "residual", "final"})

    def __init__(self):
        self.seen = {}

    def read(self, layer, site, value, batch, dense=None):
        self.seen[layer, site] = value.detach().clone()


def hooked(model, anatomy, encoder, decoder=None):
    """What plain hooks see of every site in an ordinary forward pass; of the encoder alone without a decoder's part."""
    seen = {}
    stop = BLOCKS if decoder else ENCODER
    places = {(layer, site): anatomy.path(layer, site) for layer in range(stop) for site in anatomy.sites(layer)}
    if decoder:
        places[BLOCKS, "final"] = anatomy.final_norm_path

    def keep(key):
        def hook(module, inputs, output):
            value = anatomy.site(*key, output) if key[0] < BLOCKS else output
            seen[key] = (inputs[0] if key[1] in HEADS else value).clone()

        return hook

    with ExitStack() as hooks, torch.no_grad(), fast_float32(anatomy.device):
        for key, path in places.items():
            hooks.callback(attrgetter(path)(model).register_forward_hook(keep(key)).remove)
        if decoder:
            more = {f"decoder_{name}": value for name, value in decoder.items()}
            model(**encoder, **more, use_cache=False)
        else:
            model.get_encoder()(**encoder)
    return seen


def given(batch):
    return {"input_ids": batch.ids, "attention_mask": batch.real}


def alone(ids):
    return {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_read_through_nnsight_equals_plain_hooks(make_model, kind, tokenizer, segments):
    model = make_model(kind)
    session = Session(model, tokenizer)
    whole, halves = session.batches(segments)
    for batch, decoder in ((whole, None), (halves, given(halves.decoder))):
        recorder = Recorder()
        session.read(batch, [recorder])
        expected = hooked(model, session.anatomy, given(batch), decoder)
        assert recorder.seen.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(recorder.seen[key], value), key
    crossing = {site for layer, site in expected if layer >= ENCODER}
    assert {"cross_q", "cross_k", "cross_v", "cross_o"} <= crossing
    assert expected[ENCODER, "cross_k"].shape[1] == halves.ids.shape[1]  # of the encoder's tokens


class Recorded:
    """A stream that records everything in every model."""

    compares = False
    at_head = AtHead()

    def __init__(self, session, segments, models):
        self.files = {}
        self.models = models
        self.batches = session.batches(segments)
        self.recorders = {(m, number): Recorder() for m in models for number in range(len(self.batches))}

    def opened(self):
        return ExitStack()

    def readers(self, model, batch):
        return [self.recorders[model, batch]]


@pytest.mark.parametrize("kind", KINDS)
def test_in_lockstep_every_model_reads_the_output_of_its_own_encoder(make_model, kind, tokenizer, segments):
    model = make_model(kind)
    session = Session(model, tokenizer, batch_tokens=80)
    variants = {variant.id: variant for variant in pruned(model, tokenizer, 0.3, 0.6)}
    stream = Recorded(session, segments, (*variants, DENSE))
    read_streams(session, [stream], variants, plan_reading(session, [stream]))
    for (name, number), recorder in stream.recorders.items():
        batch = stream.batches[number]
        with nullcontext() if name == DENSE else variants[name].applied(model):
            decoder = None if batch.decoder is None else given(batch.decoder)
            expected = hooked(model, session.anatomy, given(batch), decoder)
        if decoder:  # whose encoder is the context, and is read on whole segments
            expected = {key: value for key, value in expected.items() if key[0] >= ENCODER}
        assert recorder.seen.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(recorder.seen[key], value), (name, number, key)


BOS_AND_EOS = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
EOS = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("added", "before", "after"), [(EOS, [], [2]), (ByteLevel(), [], []), (BOS_AND_EOS, [1], [2])])
def test_a_segment_is_read_whole_by_the_encoder_and_then_in_halves(
    make_model, tokenizer, segments, added, before, after, padding
):
    tokenizer.backend_tokenizer.post_processor = added
    whole, halves = Session(make_model("mt5"), tokenizer, padding=padding).batches(segments)

    def read(batch, row):
        return [int(token) for token, real in zip(batch.ids[row], batch.real[row], strict=True) if real]

    def counted(batch, row):
        return [int(token) for token, counts in zip(batch.ids[row], batch.counted[row], strict=True) if counts]

    for batch in (whole, halves):
        for row, index in enumerate(batch.segments):
            text = tokenizer(segments[index].text, add_special_tokens=False)["input_ids"]
            half = len(text) // 2
            if batch is whole:
                assert read(batch, row) == [*before, *text, *after]
                assert counted(batch, row) == text  # the first token, too: an encoder reads in both directions
                assert batch.decoder is None
                continue
            assert read(batch, row) == [*before, *text[:half], *after]
            assert read(batch.decoder, row) == [DECODER_START, *text[half:], *after]
            assert counted(batch.decoder, row) == text[half:]
            predicted = batch.decoder.ids[row, 1:][batch.decoder.predicted[row]]
            assert predicted.tolist() == text[half:]


@pytest.mark.parametrize("kind", ["mt5", "t5"])
@pytest.mark.parametrize("settings", [{}, {"batch_tokens": 60}, {"padding": "left"}])
def test_readings_are_sums_over_what_each_model_computes_of_one_segment_at_a_time(
    make_model, kind, settings, tokenizer, segments
):
    model = make_model(kind)
    session = Session(model, tokenizer, **settings)
    anatomy = session.anatomy
    (variant,) = pruned(model, tokenizer, 0.5)
    readings = read_against_dense(session, segments, [variant])
    fired = {name: torch.zeros(BLOCKS, 48, dtype=torch.int64) for name in readings}
    for index, segment in enumerate(segments):
        ids = tokenizer(segment.text)["input_ids"]
        text, half = ids[:-1], (len(ids) - 1) // 2
        halved = alone([*text[:half], 2]), alone([DECODER_START, *text[half:]])
        seen = {}
        for name in readings:
            with nullcontext() if name == DENSE else variant.applied(model):
                inside = hooked(model, anatomy, alone(ids))
                seen[name] = inside | {k: v for k, v in hooked(model, anatomy, *halved).items() if k[0] >= ENCODER}
                with torch.no_grad():
                    logits = model(**halved[0], decoder_input_ids=halved[1]["input_ids"]).logits[0].double()
            logs = logits.log_softmax(dim=-1)[:-1].gather(1, torch.tensor(text[half:])[:, None])
            assert readings[name].nll[index].item() == pytest.approx(-float(logs.sum()), rel=1e-4)
            assert readings[name].predicted[index] == len(text) - half
            assert readings[name].utf8_bytes[index] == len(bytes(segment.text, "utf-8")) - starts(segment.text, half)
            assert readings[name].context[index] == half
            assert readings[name].tokens[:, index].tolist() == [len(text)] * 2 + [len(text) - half] * 2
        for (layer, site), dense in seen[DENSE].items():
            which = slice(0, len(text)) if layer < ENCODER else slice(1, None)
            if site in ("cross_k", "cross_v"):  # of the tokens that the encoder read
                which = slice(0, half)
            for name in readings:
                value = seen[name][layer, site][0, which].double()
                if site == "residual":
                    mean = readings[name].pooled[layer, index].double()
                    torch.testing.assert_close(mean, value.mean(dim=0), rtol=1e-4, atol=1e-5)
                if site == "activation":
                    fired[name][layer] += (value > 0).sum(dim=0)
                if site in SIGNAL_SITES:
                    error = readings[name].error[index, layer, SIGNAL_SITES.index(site)].item()
                    power = readings[name].power[index, layer, SIGNAL_SITES.index(site)].item()
                    expected = float((value - dense[0, which].double()).square().sum())
                    assert error == pytest.approx(expected, rel=1e-3, abs=1e-9), (name, layer, site)
                    assert power == pytest.approx(float(dense[0, which].double().square().sum()), rel=1e-4)
    for name, counts in fired.items():
        assert torch.equal(readings[name].fired.sum(dim=0).long(), counts)
        assert readings[name].fired.shape == (FOLDS, BLOCKS, 48)


def starts(text: str, half: int) -> int:
    """Where the second half begins, in bytes; a character that it only continues is not in it."""
    while (text.encode()[half] & 0xC0) == 0x80:
        half += 1
    return half


def assert_same(one, other):
    for field in fields(Readings):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left.isnan(), right.isnan()), field.name
        assert torch.equal(left.nan_to_num(-1), right.nan_to_num(-1)), field.name


@pytest.mark.parametrize("tight", [{"wave_bytes": 1}, {"compared_bytes": 1}, {"states_on_host": True}])
def test_a_tight_plan_changes_no_number(make_model, tokenizer, segments, tight):
    model = make_model("mt5")
    session = Session(model, tokenizer, batch_tokens=60)
    variants = {variant.id: variant for variant in pruned(model, tokenizer, 0.3, 0.6)}
    stream = HeldoutStream(session, segments, list(variants))
    read_streams(session, [stream], variants, replace(plan_reading(session, [stream]), **tight))
    for name, readings in read_against_dense(session, segments, list(variants.values())).items():
        assert_same(stream.readings[name], readings)


def test_reading_in_files_with_text_and_questions_together_equals_each_alone(tmp_path, make_model, tokenizer, segments):
    model = make_model("mt5")
    session = Session(model, tokenizer, batch_tokens=60)
    variants = {variant.id: variant for variant in pruned(model, tokenizer, 0.3, 0.6)}
    names = [DENSE, *variants]
    questions = item_questions(session, ITEMS)
    heldout = HeldoutStream(session, segments, names, {name: tmp_path / name / "en.safetensors" for name in names})
    fitting, asked = FittingStream(session, segments[:3]), QuestionStream(session, questions, names)
    streams = [heldout, fitting, asked]
    plan = plan_reading(session, streams)
    ticks: list[float] = []
    read_streams(session, streams, variants, plan, ticks.append)
    assert sum(ticks) == pytest.approx(plan.tokens)
    for name, readings in read_against_dense(session, segments, list(variants.values())).items():
        assert_same(Readings.open(heldout.files[name]), readings)
    assert torch.equal(fitting.pooled.transpose(0, 1), pooled_states(session, segments[:3]))
    for name in names:
        with nullcontext() if name == DENSE else variants[name].applied(model):
            assert (asked.scores[name].values == score(session, questions).values).all()


def test_a_variant_that_prunes_nothing_differs_in_nothing(make_model, tokenizer, segments):
    model = make_model("mt5")
    (variant,) = pruned(model, tokenizer, 0.5)
    everything = MaskSet.pack({key: torch.ones_like(mask) for key, mask in variant.masks.items()})
    same = replace(variant, masks=everything)
    readings = read_against_dense(Session(model, tokenizer), segments, [same])
    assert_same(readings[same.id], readings[DENSE])
    error = readings[same.id].error
    assert ((error == 0) | error.isnan()).all()


@pytest.mark.parametrize("kind", ["mt5", "umt5"])
def test_a_model_is_read_from_its_shards_as_from_memory(tmp_path, tokenizer, segments, kind):
    folder = checkpoint(tmp_path, kind)
    read_from = []
    for stream in (True, False):
        model, _ = load_model(str(folder), stream=stream)
        variants = pruned(model, tokenizer, 0.5)
        read_from.append(read_against_dense(Session(model, tokenizer, batch_tokens=60), segments, variants))
    for name in read_from[1]:
        assert_same(read_from[0][name], read_from[1][name])


def test_the_plan_counts_what_is_held_for_the_decoder(make_model, tokenizer):
    """States, the output of every model's encoder, and position biases: of two models, then of twelve."""
    session = Session(make_model("mt5"), tokenizer, batch_tokens=4096)
    text = [Segment(str(i), "word " * 20) for i in range(2000)]
    few, many = (
        plan_reading(session, [HeldoutStream(session, text, [str(i) for i in range(models)])], trial=False)
        for models in (1, 11)
    )
    tokens = 2000 * (101 + 51 + 52)  # whole, first and second half
    assert many.wave_bytes - few.wave_bytes == 10 * tokens * 32 * 4
    biases = 2000 * 4 * max(101 * 101, 51 * 51 + 51 * 52) * 4
    assert few.wave_bytes > 2 * tokens * 32 * 4 + biases


def by_hand(model, tokenizer, item):
    """The log-likelihood of every choice from the model's own logits: the prompt encoded, the choice decoded."""
    found = []
    for choice in item.choices:
        labels = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            output = model(**alone(tokenizer(item.prompt)["input_ids"]), labels=torch.tensor([labels]))
        logs = output.logits[0].double().log_softmax(dim=-1)
        found.append(sum(float(logs[i, token]) for i, token in enumerate(labels)))
    return found


@pytest.mark.parametrize(("padding", "batch_tokens"), [("left", 64), ("right", 4096), ("right", 16)])
@pytest.mark.parametrize("kind", KINDS)
def test_items_are_scored_as_the_models_own_loss_would(make_model, kind, tokenizer, padding, batch_tokens):
    model = make_model(kind)
    session = Session(model, tokenizer, padding=padding, batch_tokens=batch_tokens)
    questions = item_questions(session, ITEMS)
    scores = score(session, questions)
    for item, values in zip(ITEMS, scores.values, strict=True):
        expected = by_hand(model, tokenizer, item)
        assert values[: len(expected)] == pytest.approx(expected, abs=2e-4)
        assert np.isneginf(values[len(expected) :]).all()
    assert [len(question.rows) for question in questions] == [2, 2, 1]  # choices of one token share the start token
    assert questions[2].rows == ((DECODER_START,),)


def test_the_loss_of_a_text_is_that_of_its_question(make_model, tokenizer, segments):
    session = Session(make_model("mt5"), tokenizer)
    asked = score(session, text_questions(session, segments))
    expected = -read_against_dense(session, segments)[DENSE].nll.numpy()
    np.testing.assert_allclose(asked.right, expected, rtol=1e-5)


def test_what_cannot_be_read_is_told(make_model, tokenizer):
    session = Session(make_model("mt5"), tokenizer)
    with pytest.raises(TextError, match='segment "7" has no token to count'):
        session.batches([Segment("7", "")])
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    with pytest.raises(TextError, match="segment \"7\" is too short to be halved: 'a'; leave it out"):
        session.batches([Segment("7", "a")])
    with pytest.raises(TextError, match='item "x" has no prompt, and this tokenizer adds no token'):
        item_questions(session, [Item(id="x", prompt="", choices=("a", "b"), answer=0)])
    model = make_model("mt5")
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match='names no "decoder_start_token_id"'):
        Session(model, tokenizer)
