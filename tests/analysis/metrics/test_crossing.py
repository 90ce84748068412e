"""An answer that two planted languages share, and a third does not, is found to be so, from the block that makes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from planted import COLUMNS

from analysis import plots
from analysis.frames import dense_columns, read_frame, write_frame
from analysis.metrics.crossing import Crossing, Pairing, crossing_frame
from analysis.report import crossing_figures, crossing_findings
from probes import DENSE, Session, item_questions
from probes.items import Item
from probes.patching import cross

#: Of each language: the letters of a prompt that decide, and the two choices. The last is another language's own.
LETTERS = {"en": ("xy", "AB"), "de": ("uv", "CD"), "sw": ("pq", "EF")}
#: Dimensions of the stream: what the letters say (in English and German; in Swahili), and the answer likewise.
SAID, ANSWER = {"en": 0, "de": 0, "sw": 1}, {"en": 2, "de": 2, "sw": 3}


def items_of(language, templates=14):
    """A pair a template: its letter stands at different places, in prompts of different length; what it says is the same in all languages."""
    letters, choices = LETTERS[language]
    found = []
    for i in range(templates):
        for which, letter in enumerate(letters):
            prompt = "m" * (i % 5) + letter + "m" * (i % 7) + "?"
            found.append(Item(id=f"{i}-{which}", twin=str(i), prompt=prompt, choices=tuple(choices), answer=which))
    return found


def planted_model(tokenizer):
    """A Llama whose second block writes at each token what the letters before say; its other blocks do nothing.

    Queries are zero, so that it attends to all tokens alike; the head reads the answer in the language of the choices.
    """
    model = tiny_model()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
            block.input_layernorm.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings.zero_()
        head.zero_()
        embeddings[:, 10] = 1
        for language, (letters, choices) in LETTERS.items():
            for sign, letter, choice in zip((1, -1), letters, choices, strict=True):
                token, answer = (tokenizer.convert_tokens_to_ids(each) for each in (letter, choice))
                embeddings[token, SAID[language]] = sign
                head[answer, ANSWER[language]] = sign
        attention = model.model.layers[1].self_attn
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.zero_()
        for language in LETTERS:
            attention.v_proj.weight[SAID[language], SAID[language]] = 1
            attention.o_proj.weight[ANSWER[language], SAID[language]] = 10
    return model


@pytest.fixture(scope="module")
def frame():
    tokenizer = tiny_tokenizer()
    session = Session(planted_model(tokenizer), tokenizer)
    items = {language: items_of(language) for language in LETTERS}
    asked, answers = items["de"], np.array([item.answer for item in items["de"]])
    found = {}
    for source in LETTERS:
        pairing = Pairing.of(asked, items[source])
        questions, sources = (item_questions(session, own) for own in (asked, items[source]))
        crossed = cross(session, questions, sources, np.stack([pairing.sources, pairing.controls]))
        found[DENSE, source] = Crossing.of(pairing, crossed, answers)
        found["v", source] = found[DENSE, source]
    place = {"language": "de", "task": "mine", "category": "reasoning"}
    templates = [item.template for item in asked]
    return crossing_frame(place, found, {DENSE: dense_columns("m"), "v": COLUMNS}, templates)


def shares(frame, source, metric="twin_share", method="dense"):
    rows = frame[(frame["method"] == method) & (frame["source_language"] == source) & (frame["metric"] == metric)]
    return rows.sort_values("layer")["value"].tolist()


def test_an_answer_moves_between_languages_that_share_it_from_the_block_on_that_makes_it(frame):
    """Before it is made, states of the last token tell nothing; that of a language apart only takes the own away."""
    assert shares(frame, "de") == pytest.approx([0, 1, 1], abs=1e-4)
    assert shares(frame, "en") == pytest.approx([0, 1, 1], abs=1e-4)
    assert shares(frame, "sw") == pytest.approx([0, 0.5, 0.5], abs=1e-4)
    assert shares(frame, "sw", "control_share") == pytest.approx([0, 0.5, 0.5], abs=1e-4)
    assert shares(frame, "en", "control_share") == pytest.approx([0, 1, 1], abs=0.2)  # the answer is all that is there
    swing = frame[frame["metric"] == "swing"]
    assert (swing["value"] > 0.1).all()
    assert (frame["n"] == 28).all()


def test_it_is_said_and_drawn(frame, tmp_path):
    said = crossing_findings(frame)
    assert len(said) == 6
    english = next(line for line in said if "dense" in line and "asked in English" in line)
    assert english.startswith(
        "In the dense model (reasoning in German, n = 28), the state at the last token of the twin asked in English "
        "moves the margin 100 % "
    )
    assert "after block 1, the first after which the interval lies above 75 %" in english
    swahili = next(line for line in said if "pruned" in line and "asked in Swahili" in line)
    assert "50 % " in swahili
    assert "after no block does the interval lie above 75 %" in swahili
    write_frame(tmp_path, "crossing", frame)
    assert len(read_frame(tmp_path / "crossing.parquet")) == len(frame)
    (figure,) = crossing_figures(frame, section="s", name="d", variant="v", language="de", category="reasoning")
    drawn = figure.draw()
    titles = [axes.get_title() for axes in drawn.axes if axes.get_visible()]
    assert titles == ["dense", "pruned"]
    assert min(file.stat().st_size for file in plots.save(drawn, tmp_path, "f")) > 2000


def test_estimates_are_ratios_of_sums_and_are_withheld_where_nothing_swings():
    rng = np.random.default_rng(0)
    own, twin = rng.normal(2, 1, 30), rng.normal(-1, 1, 30)
    patched = rng.normal(0, 1, (2, 3, 30))
    crossing = Crossing(np.arange(3), np.arange(30), own, twin, patched)
    templates = [str(i // 2) for i in range(30)]
    place = {"language": "de", "task": "mine", "category": "reasoning"}

    def made(one):
        return crossing_frame(place, {(DENSE, "en"): one}, {DENSE: dense_columns("m")}, templates)

    frame = made(crossing)
    for draw, metric in enumerate(("twin", "control")):
        for layer in range(3):
            moved = sum(own[i] - patched[draw, layer, i] for i in range(30))
            expected = moved / sum(own[i] - twin[i] for i in range(30))
            assert shares(frame, "en", f"{metric}_share")[layer] == pytest.approx(expected)
            assert shares(frame, "en", f"{metric}_moved")[layer] == pytest.approx(moved / 30)
    rows = frame[frame["layer"].notna()]
    assert ((rows["low"] < rows["value"]) & (rows["value"] < rows["high"])).all()
    still = made(Crossing(np.arange(3), np.arange(30), own, own + rng.normal(0, 0.01, 30), patched))
    assert set(still["metric"]) == {"swing", "twin_moved", "control_moved"}
    (said,) = crossing_findings(still)
    assert "too little to say which states carry it" in said
    assert plots.crossing.crossing(still)


def test_pairs_that_the_other_language_does_not_have_alike_are_left_out():
    own, others = items_of("de", 6), items_of("en", 6)
    whole = Pairing.of(own, others)
    assert whole.items.tolist() == list(range(12))
    assert whole.twins.tolist() == whole.sources.tolist() == [i ^ 1 for i in range(12)]
    for k, twin in zip(whole.controls, whole.twins, strict=True):
        assert others[k].answer == own[twin].answer
        assert others[k].template != own[twin].template
    turned = [item.model_copy(update={"answer": 1 - item.answer}) if item.twin == "1" else item for item in others]
    fewer = [item for item in turned if item.id != "0-1"]
    assert Pairing.of(own, fewer).items.tolist() == list(range(4, 12))
    singles = [item.model_copy(update={"twin": item.id}) for item in own]
    assert not len(Pairing.of(singles, others).items)


def test_margins_are_kept(tmp_path):
    crossing = Crossing(np.arange(2), np.array([1, 3]), np.ones(2), -np.ones(2), np.zeros((2, 2, 2)))
    crossing.save(tmp_path / "c.safetensors")
    again = Crossing.open(tmp_path / "c.safetensors")
    for name, values in vars(crossing).items():
        np.testing.assert_array_equal(getattr(again, name), values)
