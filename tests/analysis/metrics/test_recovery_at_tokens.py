"""Damage at some tokens of minimal pairs is found at those tokens, after the block that did it."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from planted import COLUMNS

from analysis import plots
from analysis.frames import read_frame, write_frame
from analysis.metrics.components import AT_TOKENS, components_of
from analysis.metrics.recovery import Asked, diagnose
from analysis.metrics.recovery_frame import named_causes
from analysis.report import diagnosis_findings
from analysis.report.explore.diagnosis import recovery as explored
from probes import Session, paired_questions
from probes.batches import TOKEN_CLASSES
from probes.items import Item
from probes.patching import RESTORE, DamagedModel, patch, residual, residual_at
from probes.scoring import score
from pruning import Anatomy

#: Letters that only the words have in which the prompts of a pair differ; that only the others have; the last token.
LETTERS = {"differing": "xyz", "elsewhere": "m", "last": "?"}


class DamagedAtLetters(DamagedModel):
    """A Llama with all its weights, and the stream after a block shifted at the tokens of some letters."""

    projections, biases = (), ()

    def __init__(self, model, tokenizer, layer, letters, size=1.0):
        self.embeddings, self.mlp = model.model.embed_tokens, model.model.layers[layer].mlp
        self.tokens = torch.tensor(tokenizer.convert_tokens_to_ids(list(letters)))
        self.shift = size * torch.randn(32, generator=torch.Generator().manual_seed(3))

    def differentiable_biases(self):
        return nullcontext()

    @contextmanager
    def damaged(self):
        read = []
        hooks = [
            self.embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0])),
            self.mlp.register_forward_hook(
                lambda module, inputs, output: output + torch.isin(read[-1], self.tokens)[..., None] * self.shift
            ),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def items_of(number=12):
    """Pairs whose prompts differ in a word of x, y and z; two in five items have no twin."""
    rng = np.random.default_rng(4)

    def word(letters, length):
        return "".join(rng.choice(list(letters), length))

    items = []
    for i in range(number):
        before, after = (f"{word('abcd', 2 + i % 3)}m{word('abcd', 2)}" for _ in range(2))
        choices = tuple(f" {word('efgh', 2)}{end}" for end in "jkl")
        words = [f"{first}{word('xyz', 3)}" for first in "xyz"]
        items += [
            Item(id=f"{i}{x}", twin=str(i), prompt=f"{before} {own} {after}?", choices=choices, answer=0)
            for x, own in zip("ab", words[:2], strict=True)
        ]
        if i % 2:
            items.append(Item(id=f"{i}c", prompt=f"{before} {words[2]} {after}?", choices=choices, answer=0))
    return items


def asked_of(session, damage, items):
    """The items; of their choices that is right which the damage hurts more."""
    questions = paired_questions(session, items)
    dense = score(session, questions).values
    with damage.damaged():
        answers = (dense - score(session, questions).values).argmax(axis=1)
    items = [item.model_copy(update={"answer": int(answer)}) for item, answer in zip(items, answers, strict=True)]
    return Asked("mine", "reasoning", "sw", paired_questions(session, items), [item.template for item in items])


def exactly(frame, kind, on, metric="margin_recovery"):
    rows = frame[(frame["component"] == kind) & (frame["metric"] == metric) & (frame["direction"] == RESTORE)]
    rows = rows[rows["estimated_on"].astype(str) == on]
    return dict(zip(rows["layer"].astype(int), rows["value"], strict=True))


@pytest.fixture(scope="module", params=[("differing", 1), ("last", 1), ("elsewhere", 0)], ids=lambda each: each[0])
def planted(request):
    tokens, layer = request.param
    model, tokenizer = tiny_model(), tiny_tokenizer()
    session = Session(model, tokenizer)
    damage = DamagedAtLetters(model, tokenizer, layer, LETTERS[tokens])
    items = items_of()
    asked = asked_of(session, damage, items)
    components = [residual(block) for block in range(3)]
    components += [residual_at(block, each) for block in range(3) for each in TOKEN_CLASSES]
    frame = diagnose(session, damage, asked, components, COLUMNS, confirm=2, sample=1)
    return tokens, layer, session, damage, items, asked, components, frame


def test_damage_at_one_class_of_tokens_comes_back_there_and_nowhere_else(planted):
    tokens, layer, *_, frame = planted
    for on in ("all", "first", "second"):  # no half chose anything: what one shows, the other confirms
        for each in TOKEN_CLASSES:
            found = exactly(frame, f"residual_{each}", on)
            assert found[layer] == pytest.approx(float(each == tokens), abs=1e-4)
            before = [value for block, value in found.items() if block < layer]
            assert before == pytest.approx([0] * layer, abs=1e-4)  # nothing was planted yet
        assert exactly(frame, f"residual_{tokens}", on, "attributed_recovery")[layer] > 0.05


def test_after_the_last_block_all_is_at_the_last_token(planted):
    *_, frame = planted
    assert exactly(frame, "residual_last", "all")[2] == pytest.approx(1, abs=1e-4)
    for each in ("differing", "elsewhere"):
        assert exactly(frame, f"residual_{each}", "all")[2] == pytest.approx(0, abs=1e-4)


def test_estimates_are_over_the_items_that_have_a_twin(planted):
    _, _, session, damage, items, asked, components, frame = planted
    paired = np.array([sum(other.twin == item.twin for other in items) == 2 for item in items])
    assert 0 < paired.sum() < len(items)
    patched = patch(session, asked.questions, damage, components[3:])
    lost = (patched.dense.margin - patched.pruned.margin)[paired].mean()
    for i, component in enumerate(components[3:]):
        restored = (patched.exact[i].margin - patched.pruned.margin)[paired].mean()
        for metric, expected in (("margin_restored", restored), ("margin_recovery", restored / lost)):
            found = exactly(frame, component.kind, "all", metric)[component.layer]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    rows = frame[frame["component"].isin(AT_TOKENS)]
    halves = {name: int(paired[own].sum()) for name, own in asked.halves.items()}
    for on, n in {"all": paired.sum(), **halves}.items():
        assert set(rows[rows["estimated_on"].astype(str) == on]["n"]) == {n}
    assert set(frame[frame["component"] == "residual"]["n"]) == {len(items), *map(len, asked.halves.values())}


def test_tokens_are_never_named_as_causes(planted):
    *_, frame = planted
    assert not len(named_causes(frame))
    assert frame[frame["component"].isin(AT_TOKENS)]["position"].isna().all()


def test_a_sentence_says_what_comes_back_where(planted):
    tokens, layer, *_, frame = planted
    said = diagnosis_findings(frame)
    names = {
        "differing": "at the words in which the prompts of a pair differ",
        "last": "at the last token",
        "elsewhere": "at all others",
    }
    (sentence,) = (
        line for line in said if line.startswith(f"After block {layer}, restoring the stream at some tokens")
    )
    assert f"{names.pop(tokens)} 100 % " in sentence
    assert all(f"{name} 0 % " in sentence for name in names.values())
    moved = [line for line in said if line.startswith("The last token alone recovers more than the differing words")]
    if tokens == "differing":
        assert len(moved) == 1
        assert "after block 2 on either half of the questions, and after every later block." in moved[0]


def test_the_frame_is_kept_and_its_figure_drawn(planted, tmp_path):
    *_, frame = planted
    write_frame(tmp_path, "recovery", frame)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "recovery.parquet"), frame, check_dtype=False)
    drawn = plots.recovery.positions(frame)
    assert "at some tokens (reasoning, Swahili)" in drawn.texts[0].get_text().replace("\n", " ")
    assert "margin" in [axes.get_title() for axes in drawn.axes]
    chart = explored({"one": ("one", frame)})
    shown = chart.data[chart.data["kind"] == "stream at some tokens"]
    assert set(shown["component"]) == {
        "words in which the pair differs",
        "last token, and those of the choice",
        "other tokens",
    }
    assert shown["value"].notna().all()


def test_an_encoder_has_no_last_token_and_its_decoder_nothing_else(make_model):
    anatomy = Anatomy(make_model("mt5"))
    found = {(c.kind, c.layer) for c in components_of(anatomy, (), (), pairs=True) if c.kind in AT_TOKENS}
    encoder, decoder = (range(stack.first, stack.stop) for stack in anatomy.stacks)
    expected = {(f"residual_{tokens}", layer) for tokens in ("differing", "elsewhere") for layer in encoder}
    assert found == expected | {("residual_last", layer) for layer in decoder}
