"""States of other questions at the last token of the prompt, against plain PyTorch hooks."""

from __future__ import annotations

from functools import partial
from itertools import takewhile

import numpy as np
import pytest
import torch
from patched import half_pruned, hooked

from probes import Session, item_questions
from probes.items import Item
from probes.patching import DamagedModel, cross
from pruning.variants.owner import DenseModel

ITEMS = [
    Item(id="1", prompt="The cat sat on the", choices=(" mat", " hats"), answer=0),
    Item(id="2", prompt="Go", choices=(" a", " b"), answer=0),
    Item(id="3", prompt="Is it so", choices=(" yes", " no"), answer=1),
]
OTHERS = [
    Item(id="1", prompt="Die Katze", choices=(" ja", " nein"), answer=0),
    Item(id="2", prompt="Das ist es nicht", choices=("!", "?"), answer=0),
]
CHOSEN = np.array([[1, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize(("padding", "batch_tokens", "pruned"), [("right", 1024, False), ("left", 40, True)])
def test_states_put_in_equal_those_of_plain_hooks(make_model, tokenizer, padding, batch_tokens, pruned):
    model = make_model("llama")
    session = Session(model, tokenizer, padding=padding, batch_tokens=batch_tokens)
    variant = half_pruned(model, tokenizer)
    damage = DamagedModel(DenseModel(model), variant)
    if not pruned:
        found = cross(session, item_questions(session, ITEMS), item_questions(session, OTHERS), CHOSEN)
    else:
        with damage.damaged():
            found = cross(session, item_questions(session, ITEMS), item_questions(session, OTHERS), CHOSEN)
    assert found.layers.tolist() == [0, 1, 2]
    assert found.patched.shape == (2, 3, 3, 2)
    if pruned:
        with variant.applied(model):
            expect_by_hand(session, tokenizer, found)
    else:
        expect_by_hand(session, tokenizer, found)


def shared_by_choices(item):
    """The prompt, and what all choices begin with."""
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*item.choices, strict=False))
    return item.prompt + "".join(letters[0] for letters in shared)


def expect_by_hand(session, tokenizer, found):
    model, anatomy = session.model, session.anatomy
    states = []
    for other in OTHERS:
        seen = {}
        ids = torch.tensor([tokenizer(shared_by_choices(other))["input_ids"]])
        hooked(model, anatomy, [(b, "residual", partial(seen.__setitem__, b)) for b in range(3)], input_ids=ids)
        states.append({block: value[0, -1] for block, value in seen.items()})
    for i, item in enumerate(ITEMS):
        start, last = (len(tokenizer(text)["input_ids"]) for text in (item.prompt, shared_by_choices(item)))
        for choice, text in enumerate(item.choices):
            ids = torch.tensor([tokenizer(item.prompt + text)["input_ids"]])

            def scored(edits, ids=ids, start=start):
                logs = hooked(model, anatomy, edits, input_ids=ids)[0].log_softmax(dim=-1)
                return sum(float(logs[k - 1, ids[0, k]]) for k in range(start, ids.shape[1]))

            assert found.clean[i, choice] == pytest.approx(scored([]), abs=2e-4)
            for draw in range(2):
                for block in range(3):

                    def put(value, other=states[CHOSEN[draw, i]][block], last=last - 1):
                        value[0, last] = other
                        return value

                    expected = scored([(block, "residual", put)])
                    assert found.patched[draw, block, i, choice] == pytest.approx(expected, abs=2e-4)


def test_a_questions_own_state_changes_nothing(make_model, tokenizer):
    for kind in ("gpt_neox", "mt5"):
        session = Session(make_model(kind), tokenizer)
        questions = item_questions(session, ITEMS)
        found = cross(session, questions, questions, np.arange(3)[None])
        stack = session.anatomy.stacks[-1]
        assert found.layers.tolist() == list(range(stack.first, stack.stop))
        for values in found.patched[0]:
            np.testing.assert_allclose(values, found.clean, atol=1e-4)
