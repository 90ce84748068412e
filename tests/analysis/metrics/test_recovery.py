"""Damage that was planted is found where it was planted, and in the amount that a plain computation gives."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import rankdata

from analysis import LSAR, plots
from analysis.frames import dense_columns, tidy
from analysis.metrics.recovery import Asked, agreement, components_of, diagnose, importance
from analysis.report import diagnosis_findings
from probes import Session, item_questions, text_questions
from probes.items import Item
from probes.patching import DAMAGE, RESTORE, DamagedModel, attribute, patch
from probes.scoring import score
from pruning import Anatomy, Recipe, Segment, prune
from pruning.variants.masks import MaskSet
from pruning.variants.owner import DenseModel
from pruning.variants.store import VariantRecord
from pruning.variants.variant import Variant

COLUMNS = dense_columns("m") | {"method": "planted", "sparsity": 0.1}
EVERYTHING = 1000


def planted_variant(model, change):
    """A variant that keeps all weights but those that `change` takes out of the masks."""
    anatomy = Anatomy(model)
    masks = {key: torch.ones(anatomy.shape(*key), dtype=torch.bool) for key in anatomy}
    change(masks)
    return Variant(
        VariantRecord(id="planted", model="m", model_fingerprint=anatomy.fingerprint()), MaskSet.pack(masks), {}
    )


def subspaces_of(model, rank=2):
    rng = np.random.default_rng(5)
    return [LSAR(rank).fit(rng.normal(size=(4, 32))) for _ in Anatomy(model).blocks]


def questions_that_suffer(session, damage, number=16):
    """Items in pairs of twins; of their random choices that is right which the damage hurts more."""
    rng = np.random.default_rng(2)
    letters = list("abcdefghijklmnopqrstuvwxyz ")

    def text(length):
        return "".join(rng.choice(letters, length))

    items = [
        Item(id=str(i), twin=str(i // 2), prompt=text(9 + i % 5), choices=(text(2), text(2), text(2)), answer=0)
        for i in range(number)
    ]
    questions = item_questions(session, items)
    dense = score(session, questions).values
    with damage.damaged():
        pruned = score(session, questions).values
    answers = (dense - pruned).argmax(axis=1)
    items = [item.model_copy(update={"answer": int(answer)}) for item, answer in zip(items, answers, strict=True)]
    return Asked("mine", "reasoning", "sw", item_questions(session, items), [item.twin for item in items])


def diagnosed(model, tokenizer, damage, asked=None, components=None, skip_first=True, **settings):
    session = Session(model, tokenizer, skip_first=skip_first)
    asked = asked or questions_that_suffer(session, damage)
    components = components or components_of(session.anatomy, damage.projections, subspaces_of(model))
    return diagnose(session, damage, asked, components, COLUMNS, **settings)


def exactly(frame, component, metric="margin_recovery", direction=RESTORE):
    """(layer, role) to the value of the rows of one kind of component."""
    rows = frame[(frame["component"] == component) & (frame["metric"] == metric) & (frame["direction"] == direction)]
    places = [(int(row["layer"]), None if pd.isna(row["role"]) else row["role"]) for row in rows.to_dict("records")]
    assert len(set(places)) == len(places)
    return dict(zip(places, rows["value"], strict=True))


def first_cause(frame):
    ranked = frame[frame["position"] == 1]
    (place,) = {(row["component"], row["layer"], row["role"]) for row in ranked.to_dict("records")}
    return place


# -- planted damage: at all tokens, so all tokens are patched, the first one too --------------------------------------


@pytest.mark.parametrize(
    ("kind", "layer", "role"),
    [("llama", 0, "v"), ("llama", 1, "down"), ("llama", 2, "q"), ("gemma3_text", 1, "gate"), ("gpt_neox", 1, "o")],
)
def test_a_removed_projection_is_the_first_cause_and_brings_back_everything(make_model, kind, layer, role, tokenizer):
    model = make_model(kind)
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[layer, role].fill_(False)))
    frame = diagnosed(model, tokenizer, damage, skip_first=False, confirm=EVERYTHING)
    assert first_cause(frame) == ("weights", layer, role)
    masks, outputs, stream = (exactly(frame, kind) for kind in ("weights", "output", "residual"))
    assert set(masks) == set(Anatomy(model))
    assert masks.pop((layer, role)) == pytest.approx(1, abs=1e-4)
    assert list(masks.values()) == pytest.approx([0] * len(masks), abs=1e-4)  # nothing was removed there
    assert outputs[layer, role] == pytest.approx(1, abs=1e-4)
    before = {place: value for place, value in outputs.items() if place[0] < layer}
    beside = {"q": ("k", "v"), "v": ("q", "k"), "gate": ("up", "q", "o"), "o": ("q", "v"), "down": ("gate", "o")}[role]
    before |= {(layer, other): outputs[layer, other] for other in beside if (layer, other) in outputs}
    assert len(before) >= 2
    assert list(before.values()) == pytest.approx([0] * len(before), abs=1e-4)  # the same in both models
    assert stream == pytest.approx({(block, None): float(block >= layer) for block in range(3)}, abs=1e-4)


def test_a_removed_projection_is_found_by_attribution_alone(model, tokenizer):
    """A mask and an output are confirmed, beside the parts of the stream: which they are is what gradients say."""
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[1, "down"].fill_(False)))
    frame = diagnosed(model, tokenizer, damage, confirm=2)
    assert first_cause(frame) == ("weights", 1, "down")
    assert frame["position"].max() == 2 + 3
    estimated = exactly(frame, "weights", "attributed_recovery")
    assert estimated.pop((1, "down")) > 0.2
    assert set(estimated.values()) == {0.0}
    assert importance(frame) == pytest.approx(
        {f"{layer}.{role}": value for (layer, role), value in exactly(frame, "weights", "attributed_recovery").items()}
    )


class Noisy(DamagedModel):
    """A Llama with all its weights, and one direction of the residual stream after a block shifted."""

    projections = ()

    def __init__(self, model, layer, direction):
        # What the whole MLP adds to the stream: no site that is read or put over lies between here and the block's end.
        self.mlp = model.model.layers[layer].mlp
        self.shift = torch.tensor(direction, dtype=torch.float32)

    @contextmanager
    def damaged(self):
        handle = self.mlp.register_forward_hook(lambda module, inputs, output: output + self.shift)
        try:
            yield
        finally:
            handle.remove()


@pytest.mark.parametrize("layer", [0, 1])
def test_damage_in_the_language_specific_subspace_comes_back_with_it_alone(model, tokenizer, layer):
    subspaces = subspaces_of(model)
    damage = Noisy(model, layer, subspaces[layer].basis_ @ np.array([0.8, -0.6]))
    frame = diagnosed(model, tokenizer, damage, skip_first=False, confirm=EVERYTHING)
    assert first_cause(frame)[:2] == ("specific", layer)
    parts = {kind: exactly(frame, kind)[layer, None] for kind in ("specific", "agnostic", "random", "residual")}
    assert parts == pytest.approx({"specific": 1, "agnostic": 0, "random": 0, "residual": 1}, abs=1e-4)
    assert not exactly(frame, "weights")
    assert importance(frame) == {}
    specific = exactly(frame, "specific", direction=DAMAGE)
    assert specific[layer, None] == pytest.approx(1, abs=1e-4)


def test_damage_outside_of_that_subspace_is_not_laid_to_it(model, tokenizer):
    basis = subspaces_of(model)[1].basis_
    direction = np.random.default_rng(0).normal(size=32)
    direction -= basis @ (basis.T @ direction)
    frame = diagnosed(model, tokenizer, Noisy(model, 1, 0.3 * direction), skip_first=False, confirm=EVERYTHING)
    assert exactly(frame, "agnostic")[1, None] == pytest.approx(1, abs=1e-4)
    assert exactly(frame, "specific")[1, None] == pytest.approx(0, abs=1e-4)
    assert first_cause(frame)[0] != "agnostic"  # nearly the whole stream is no cause


def test_damaged_neurons_come_back_with_the_neurons_of_the_language_and_not_with_random_ones(model, tokenizer):
    chosen = {1: [3, 17]}

    def change(masks):
        for layer, own in chosen.items():
            masks[layer, "gate"][own] = False
            masks[layer, "up"][own] = False

    damage = DamagedModel(DenseModel(model), planted_variant(model, change))
    session = Session(model, tokenizer)
    components = components_of(session.anatomy, damage.projections, subspaces_of(model), chosen)
    frame = diagnosed(model, tokenizer, damage, components=components, skip_first=False, confirm=4)
    rows = frame[(frame["metric"] == "margin_recovery") & (frame["direction"] == RESTORE)].set_index("component")
    assert rows.loc["neurons", "value"] == pytest.approx(1, abs=1e-4)
    assert rows.loc["random_neurons", "value"] == pytest.approx(0, abs=1e-4)
    sentence = next(said for said in diagnosis_findings(frame) if said.startswith("The language-specific neurons"))
    assert "recover 100 % [100, 100], as many random neurons of the same blocks 0 % [" in sentence.replace("-0", "0")


def test_controls_are_of_the_same_size_and_lie_elsewhere(model):
    chosen = {0: [3, 17], 1: [], 2: [40]}
    subspaces = subspaces_of(model)
    components = {c.label: c for c in components_of(Anatomy(model), [(0, "q")], subspaces, chosen)}
    for layer, subspace in enumerate(subspaces):
        (control,) = components[f"random {layer}"].places
        (specific,) = components[f"specific {layer}"].places
        assert control.basis.shape == specific.basis.shape == subspace.basis_.shape
        assert torch.allclose(control.basis.T @ control.basis, torch.eye(2), atol=1e-5)
        assert (control.basis.T @ specific.basis).abs().max() < 1e-5
    own, others = (
        {p.layer: set(p.columns.tolist()) for p in components[k].places} for k in ("neurons", "random_neurons")
    )
    assert own == {0: {3, 17}, 2: {40}}
    assert {layer: len(drawn) for layer, drawn in others.items()} == {0: 2, 2: 1}
    assert not any(own[layer] & others[layer] for layer in own)
    assert [c.label for c in components.values() if c.kind == "weights"] == ["weights 0.q"]


# -- where there is nothing to explain ------------------------------------------------------------------------------


def test_a_model_that_lost_nothing_has_no_causes(model, tokenizer):
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: None))
    frame = diagnosed(model, tokenizer, damage)
    assert frame["metric"].tolist() == ["margin_lost", "accuracy_lost", "loss_added"]
    assert (frame[["value", "low", "high"]] == 0).all().all()
    assert frame["position"].isna().all()
    assert importance(frame) == {}
    assert diagnosis_findings(frame) == [
        "Pruning changed the margin of the right choice (reasoning in Swahili, n = 16) by +0.00 nats "
        "[+0.00, +0.00]: no significant drop.",
        "There is no drop to explain, so no causes are named.",
    ]


def test_a_model_that_gained_has_no_causes_either(model, tokenizer):
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[1, "down"].fill_(False)))
    session = Session(model, tokenizer)
    suffers = questions_that_suffer(session, damage)
    dense = score(session, suffers.questions).values
    with damage.damaged():
        pruned = score(session, suffers.questions).values
    gains = [
        type(question)(question.rows, question.targets, question.choices, int(answer))
        for question, answer in zip(suffers.questions, (pruned - dense).argmax(axis=1), strict=True)
    ]
    frame = diagnosed(model, tokenizer, damage, Asked("mine", "reasoning", "sw", gains, suffers.twins))
    row = frame.set_index("metric").loc["margin_lost"]
    assert row["high"] < 0
    assert len(frame) == 3
    gained = f"by {-row['value']:+.2f} nats [{-row['high']:+.2f}, {-row['low']:+.2f}]: no significant drop"
    assert gained in diagnosis_findings(frame)[0]
    assert "by +" in diagnosis_findings(frame)[0]


# -- the numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned_model():
    """A model with three in ten of its weights, questions that suffer from it, and what a diagnosis makes of them."""
    from conftest import tiny_model, tiny_tokenizer

    model = tiny_model()
    (variant,) = prune(model, tiny_tokenizer(), Recipe(method="magnitude", sparsity=0.7))
    session = Session(model, tiny_tokenizer())
    damage = DamagedModel(DenseModel(model), variant)
    asked = questions_that_suffer(session, damage)
    components = components_of(session.anatomy, damage.projections, subspaces_of(model), {1: [4, 5]})
    return session, damage, asked, components, diagnose(session, damage, asked, components, COLUMNS, confirm=6)


def metrics_by_hand(scores):
    """Sums over items of what is better if higher, an item at a time."""
    found = {"margin": 0.0, "accuracy": 0.0, "loss": 0.0}
    for values, answer in zip(scores.values, scores.answers, strict=True):
        best = max(value for choice, value in enumerate(values) if choice != answer)
        found["margin"] += values[answer] - best
        found["accuracy"] += values[answer] > best
        found["loss"] += values[answer]
    return found


def test_shares_equal_those_by_hand_in_both_directions(pruned_model):
    session, damage, asked, components, frame = pruned_model
    for direction in (RESTORE, DAMAGE):
        patched = patch(session, asked.questions, damage, components, direction=direction)
        dense, pruned = metrics_by_hand(patched.dense), metrics_by_hand(patched.pruned)
        seen = 0
        for number, component in enumerate(components):
            rows = frame[
                (frame["component"] == component.kind)
                & (frame["direction"] == direction)
                & (frame["layer"].isna() if component.layer is None else frame["layer"] == component.layer)
                & (frame["role"].isna() if component.role is None else frame["role"] == component.role)
                & frame["low"].notna()
            ]
            if not len(rows):
                continue
            seen += 1
            got = metrics_by_hand(patched.exact[number])
            for metric, row in zip(("margin", "accuracy", "loss"), rows.to_dict("records"), strict=True):
                lost = dense[metric] - pruned[metric]
                back = got[metric] - pruned[metric] if direction == RESTORE else dense[metric] - got[metric]
                assert row["metric"] == f"{metric}_recovery"
                assert row["value"] == pytest.approx(back / lost, abs=1e-5), component.label
                assert row["low"] <= row["value"] <= row["high"]
        assert seen == (6 + 4 * 3 + 2 if direction == RESTORE else 6)  # confirmed, curves, neurons


def test_what_was_lost_equals_what_was_lost_by_hand_with_an_interval_over_twins(pruned_model):
    session, damage, asked, _, frame = pruned_model
    dense = score(session, asked.questions)
    with damage.damaged():
        pruned = score(session, asked.questions)
    before, after = metrics_by_hand(dense), metrics_by_hand(pruned)
    lost = frame[frame["component"] == "everything"].set_index("metric")
    names = {"margin_lost": "margin", "accuracy_lost": "accuracy", "loss_added": "loss"}
    assert set(lost.index) == set(names)
    for name, metric in names.items():
        assert lost.loc[name, "value"] == pytest.approx((before[metric] - after[metric]) / 16, abs=1e-6)
        assert lost.loc[name, "n"] == 16
    twins = (dense.right - pruned.right).reshape(8, 2).mean(axis=1)
    drawn = np.random.default_rng(1).choice(twins, (20_000, 8)).mean(axis=1)
    spread = np.ptp(twins)
    assert lost.loc["loss_added", ["low", "high"]].tolist() == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.05 * spread
    )


def test_estimates_are_the_shares_of_what_attribution_gives(pruned_model):
    session, damage, asked, components, frame = pruned_model
    estimate = attribute(session, asked.questions, damage, components)
    lost = metrics_by_hand(estimate.dense)["margin"] - metrics_by_hand(estimate.pruned)["margin"]
    rows = frame[frame["metric"] == "attributed_recovery"]
    assert len(rows) == len(components)
    expected = [estimate.attributed[i].sum() / lost for i in range(len(components))]
    assert rows["value"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert set(rows["direction"]) == {RESTORE}


def test_causes_are_ranked_by_what_they_bring_back(pruned_model):
    *_, frame = pruned_model
    ranked = frame[(frame["metric"] == "margin_recovery") & frame["position"].notna()].sort_values("position")
    assert not set(ranked["component"]) & {"residual", "agnostic", "random"}
    assert ranked["position"].tolist() == list(range(1, len(ranked) + 1))
    assert (ranked["value"].diff().dropna() <= 1e-4).all()
    assert set(ranked["component"]) >= {"weights", "specific", "neurons", "random_neurons"}
    assert (ranked["component"] == "weights").sum() == 3


@pytest.mark.parametrize(
    "settings",
    [{"batch_tokens": 8}, {"batch_tokens": 150}, {"batch_tokens": 150, "padding": "left"}],
    ids=["one at a time", "a few at a time", "padded on the left"],
)
def test_batches_and_padding_change_no_diagnosis(pruned_model, settings):
    session, damage, asked, components, frame = pruned_model
    other = Session(session.model, session.tokenizer, **settings)
    again = diagnose(other, damage, asked, components, COLUMNS, confirm=6)
    values = ["value", "low", "high"]
    pd.testing.assert_frame_equal(again.drop(columns=values), frame.drop(columns=values))
    np.testing.assert_allclose(again[values], frame[values], rtol=1e-3, atol=1e-4)


def test_text_is_diagnosed_by_its_loss_alone(model, tokenizer, segments):
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.7))
    session, damage = Session(model, tokenizer), DamagedModel(DenseModel(model), variant)
    rng = np.random.default_rng(0)
    texts = [*segments, *(Segment(f"more {i}", "".join(rng.choice(list("abcdef "), 12 + i))) for i in range(35))]
    dense = score(session, text_questions(session, texts)).right
    with damage.damaged():
        change = dense - score(session, text_questions(session, texts)).right
    texts = [texts[i] for i in change.argsort()[-10:]]  # of random weights any half may predict better
    questions = text_questions(session, texts)
    asked = Asked("text", "text", "de", questions, [segment.id for segment in texts])
    frame = diagnosed(model, tokenizer, damage, asked, skip_first=False, confirm=4)
    lost = frame[frame["component"] == "everything"].set_index("metric")
    assert lost.index.tolist() == ["loss_added"]
    assert lost.loc["loss_added", "value"] == pytest.approx(np.sort(change)[-10:].mean(), rel=1e-5)
    assert lost.loc["loss_added", "low"] > 0
    assert set(frame["metric"]) == {"loss_added", "loss_recovery", "attributed_recovery"}
    assert exactly(frame, "residual", "loss_recovery")[2, None] == pytest.approx(1, abs=1e-4)
    said = diagnosis_findings(frame)
    row = lost.loc["loss_added"]
    assert said[0] == (
        f"Pruning lowers the log-likelihood of a segment by {row['value']:.2f} nats [{row['low']:.2f}, "
        f"{row['high']:.2f}] (the text in German, n = 10)."
    )
    assert "restoring the language-agnostic part alone recovers" in said[2]


# -- in words -------------------------------------------------------------------------------------------------------


def planted_frame(*rows):
    place = {**COLUMNS, "language": "sw", "task": "bundled", "category": "reasoning"}
    keys = ("direction", "component", "layer", "role", "position", "metric", "value", "low", "high", "n")
    return tidy("recovery", [{**place, **dict(zip(keys, row, strict=True))} for row in rows])


def share(component, layer, role, position, value, low, high, metric="margin_recovery", direction=RESTORE):
    return direction, component, layer, role, position, metric, value, low, high, 64


def estimate(component, layer, role, value):
    return RESTORE, component, layer, role, None, "attributed_recovery", value, None, None, None


PLANTED = (
    (None, "everything", None, None, None, "margin_lost", 1.234, 0.5, 2.0, 64),
    (None, "everything", None, None, None, "accuracy_lost", 0.125, 0.05, 0.2, 64),
    (None, "everything", None, None, None, "loss_added", 3.0, 2.0, 4.0, 64),
    share("residual", 0, None, None, 0.21, 0.1, 0.3),
    share("residual", 1, None, None, 0.62, 0.5, 0.7),
    share("residual", 2, None, None, 1.0, 1.0, 1.0),
    share("residual", 0, None, None, 0.9, 0.8, 1.0, metric="accuracy_recovery"),
    *(share("agnostic", layer, None, None, 0.55, 0.4, 0.66) for layer in (0, 1, 2)),
    *(share("specific", layer, None, layer + 2, 0.07 - layer / 100, -0.02, 0.1) for layer in (0, 1, 2)),
    *(share("random", layer, None, None, 0.01, -0.03, 0.04) for layer in (0, 1, 2)),
    share("weights", 1, "down", 1, 0.33, 0.2, 0.45),
    share("weights", 1, "down", None, 0.9, 0.8, 0.95, direction=DAMAGE),
    share("neurons", None, None, 5, 0.04, 0.01, 0.08),
    share("random_neurons", None, None, 6, -0.02, -0.05, 0.01),
    estimate("weights", 1, "down", 0.4),
    estimate("weights", 0, "q", 0.9),
    estimate("residual", 1, None, 0.5),
    estimate("residual", 0, None, 0.1),
    estimate("specific", 0, None, 0.2),
)


def test_sentences_say_what_the_frame_says():
    frame = planted_frame(*PLANTED)
    assert diagnosis_findings(frame)[:5] == [
        "Pruning lowers the margin of the right choice by 1.23 nats [0.50, 2.00] (reasoning in Swahili, n = 64), and "
        "accuracy by 12.5 points [5.0, 20.0].",
        "Restoring the residual stream after block 1 recovers 62 % [50, 70] of the drop: half of the damage is done by "
        "then. Blocks are numbered from 0.",
        "After block 1, restoring the language-agnostic part alone recovers 55 % [40, 66], the language-specific part "
        "6 % [-2, 10], and a random subspace of the same rank 1 % [-3, 4].",
        "The single components that recover most: undoing the mask of down in block 1, 33 % [20, 45]; the "
        "language-specific part after block 0, 7 % [-2, 10]; the language-specific part after block 1, 6 % [-2, 10].",
        "The language-specific neurons recover 4 % [1, 8], as many random neurons of the same blocks -2 % [-5, 1].",
    ]


def test_a_stream_that_recovers_less_than_half_is_said_to():
    rows = [row for row in PLANTED if row[1] != "residual"] + [share("residual", 1, None, None, 0.41, 0.3, 0.5)]
    assert diagnosis_findings(planted_frame(*rows))[1] == (
        "Restoring the residual stream recovers at most 41 % [30, 50] of the drop, after block 1. Blocks are numbered "
        "from 0."
    )


def test_agreement_is_over_components_with_both_numbers():
    frame = planted_frame(*PLANTED)
    # residual 1, weights 1.down, residual 0, specific 0: exactly .62 .33 .21 .07, estimated .5 .4 .1 .2
    exact, estimated = [0.62, 0.33, 0.21, 0.07], [0.5, 0.4, 0.1, 0.2]
    distance = np.square(rankdata(exact) - rankdata(estimated)).sum()
    rho = 1 - 6 * distance / (4 * (4**2 - 1))
    assert agreement(frame) == (pytest.approx(rho), 4, 4)
    assert diagnosis_findings(frame)[-1] == (
        "Over the 4 components that were patched exactly, attribution and exact recovery correlate with Spearman's "
        f"ρ = {rho:.2f}; 4 of the 10 that attribution ranks highest are in the exact top 10."
    )


def test_agreement_counts_those_that_are_among_the_first_ten_both_ways():
    rows = [share("weights", i, "q", i + 1, 1 - i / 100, 0.0, 1.0) for i in range(14)]
    rows += [estimate("weights", i, "q", i / 100) for i in range(14)]  # the other way round
    rho, shared, number = agreement(planted_frame(*rows))
    assert (rho, shared, number) == (pytest.approx(-1), 6, 14)
    assert np.isnan(agreement(planted_frame(*rows[:2], *rows[14:]))[0])  # two say nothing of a rank


@pytest.mark.parametrize("plot", [plots.recovery.heatmap, plots.recovery.curves, plots.recovery.causes])
def test_figures_are_drawn_of_every_diagnosis(pruned_model, tmp_path, plot):
    *_, frame = pruned_model
    drawn = plot(frame)
    assert "reasoning, Swahili" in drawn.texts[0].get_text()
    assert min(file.stat().st_size for file in plots.save(drawn, tmp_path, "f")) > 2000
