"""Margins of choices after every block equal those of plain hooks; where choices first differ is found."""

from __future__ import annotations

import pytest
import torch

from probes import DENSE, Item, QuestionStream, Session, Together, item_questions, plan_reading, read_streams
from probes.lens_margins import LensMargins, MarginStream, first_difference
from probes.scoring import Question
from pruning import Anatomy, Recipe, prune
from pruning.errors import StudyError

ITEMS = [
    Item(id="1a", twin="1", prompt="The cat sat on the", choices=("m", "h"), answer=0),
    Item(id="1b", twin="1", prompt="The bat sat on the", choices=("m", "h"), answer=1),
    Item(id="2", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " gelb.", " rot."), answer=0),
    Item(id="3", prompt="Yes or no?", choices=("no", "y"), answer=1),
    Item(id="4", prompt="Up, or up and down?", choices=(" up", " up, down"), answer=0),
]

#: What all choices of an item share, and the letters by which the right one and another then differ.
FIRST = [("", "m", "h"), ("", "h", "m"), (" ", "g", "r"), ("", "y", "n")]


def read(session, variants, *streams):
    plan = plan_reading(session, list(streams), trial=False)
    read_streams(session, list(streams), variants, plan)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "gpt2"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_margins_equal_those_of_plain_hooks(make_model, kind, padding, tokenizer):
    model = make_model(kind)
    anatomy, session = Anatomy(model), Session(model, tokenizer, batch_tokens=80, padding=padding)
    variant = prune(model, tokenizer, [Recipe(method="magnitude", sparsity=0.5)])[0]
    questions = item_questions(session, ITEMS)
    stream, scored = MarginStream(session, questions, [DENSE, variant.id]), QuestionStream(session, questions, [DENSE])
    stream.prepare()
    read(session, {variant.id: variant}, Together(scored, stream))
    for name in (DENSE, variant.id):
        values = stream.margins[name].values
        assert values.shape == (1, 3, len(ITEMS))
        assert stream.margins[name].layers.tolist() == [0, 1, 2]
        assert values[..., -1].isnan().all()  # one choice is the beginning of the other
        for number, (shared, right, other) in enumerate(FIRST):
            ids = tokenizer(ITEMS[number].prompt + shared, return_tensors="pt")["input_ids"]
            tokens = [tokenizer(letter)["input_ids"][-1] for letter in (right, other)]
            for layer, state in enumerate(states_of(model, anatomy, ids, None if name == DENSE else variant)):
                with torch.no_grad():
                    logits = anatomy.logits(anatomy.normed(state))[0, -1].double()
                expected = (logits[tokens[0]] - logits[tokens[1]]).item()
                assert values[0, layer, number].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    margin = torch.from_numpy(scored.scores[DENSE].margin)
    torch.testing.assert_close(stream.margins[DENSE].values[0, -1, :2], margin[:2], rtol=1e-4, atol=1e-4)


def states_of(model, anatomy, ids, variant):
    states = []

    def keep(module, inputs, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in anatomy.blocks]
    with torch.no_grad():
        if variant is None:
            model(input_ids=ids)
        else:
            with variant.applied(model):
                model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return states


def test_the_decoder_of_an_encoder_decoder_is_read(make_model, tokenizer):
    session = Session(make_model("mt5"), tokenizer, batch_tokens=80)
    questions = item_questions(session, ITEMS[:2])
    stream, scored = MarginStream(session, questions, [DENSE]), QuestionStream(session, questions, [DENSE])
    stream.prepare()
    read(session, {}, Together(scored, stream))
    assert stream.margins[DENSE].layers.tolist() == [2, 3]
    margin = torch.from_numpy(scored.scores[DENSE].margin)
    found = stream.margins[DENSE].values[0, -1]
    assert torch.equal(found > 0, margin > 0)


def test_the_first_difference_is_from_the_right_choice():
    shared = [(0, 3, 10, 0), (0, 4, 20, 0), (0, 3, 10, 1), (0, 4, 21, 1), (0, 3, 10, 2), (0, 4, 20, 2)]
    longer = [(0, 5, 30, 0), (1, 5, 31, 2)]
    question = Question(((1,), (2,)), tuple(shared + longer), 3, 0)
    assert first_difference(question) == (1, [20, 21, 20])
    ended = Question(((1,),), ((0, 3, 10, 0), (0, 3, 10, 1), (0, 4, 11, 1)), 2, 1)
    assert first_difference(ended) is None


def test_margins_come_back_from_their_file(tmp_path):
    found = LensMargins(torch.arange(3), torch.full((1, 3, 4), torch.nan).double())
    found.save(tmp_path / "en-margins.safetensors")
    again = LensMargins.open(tmp_path / "en-margins.safetensors")
    assert torch.equal(again.layers, found.layers)
    assert again.values.isnan().all()
    (tmp_path / "en-margins.safetensors").write_bytes(b"{}")
    with pytest.raises(StudyError, match="damaged"):
        LensMargins.open(tmp_path / "en-margins.safetensors")
