"""Damage that was planted is found where it was planted, and in the amount that a plain computation gives."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from planted import COLUMNS, diagnosed, planted_variant, pruned_and_diagnosed, questions_that_suffer, subspaces_of
from scipy.stats import t

from analysis import plots
from analysis.frames import tidy
from analysis.metrics.added import AGNOSTIC_ADDED
from analysis.metrics.agreement import agreement
from analysis.metrics.drop import Drop
from analysis.metrics.recovery import (
    ADDED,
    CAUSES,
    CONTROLS,
    Asked,
    components_of,
    diagnose,
    importance,
    to_confirm,
)
from analysis.metrics.recovery_frame import named_causes
from analysis.report import diagnosis_findings
from analysis.report.recovery import describe
from probes import Session, text_questions
from probes.patching import DAMAGE, RESTORE, Component, DamagedModel, attribute, patch, residual
from probes.scoring import ChoiceScores, score
from pruning import Anatomy, Recipe, Segment, prune
from pruning.variants.owner import DenseModel

EVERYTHING = 1000


def exactly(frame, component, metric="margin_recovery", direction=RESTORE):
    """(layer, role) to the value of the rows of one kind of component."""
    rows = frame[(frame["component"] == component) & (frame["metric"] == metric) & (frame["direction"] == direction)]
    rows = rows[rows["estimated_on"].astype(str) == "all"]
    places = [(int(row["layer"]), None if pd.isna(row["role"]) else row["role"]) for row in rows.to_dict("records")]
    assert len(set(places)) == len(places)
    return dict(zip(places, rows["value"], strict=True))


def first_cause(frame):
    """The one that either half ranks first; what it restores on the other half is significant."""
    ranked = frame[frame["position"] == 1]
    places = ranked[["component", "layer", "role"]].astype(object)
    (place,) = set(places.where(places.notna(), None).itertuples(index=False, name=None))
    assert set(ranked["estimated_on"]) == {"first", "second", "both"}
    named = named_causes(frame)
    assert bool(named["significant"].iloc[0])
    assert named["component"].iloc[0] == place[0]
    assert named["layer"].iloc[0] == place[1] or place[1] is None
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


@pytest.mark.parametrize(("kind", "role"), [("mixtral", "down.2"), ("qwen2_moe", "gate.1")])
def test_a_damaged_expert_is_found_and_no_other_one(make_model, kind, role, tokenizer):
    model = make_model(kind)
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[1, role].fill_(False)))
    frame = diagnosed(model, tokenizer, damage, skip_first=False, confirm=EVERYTHING)
    assert first_cause(frame) == ("weights", 1, role)
    outputs = exactly(frame, "output")
    expert = f"expert.{role[-1]}"
    assert outputs[1, expert] == pytest.approx(1, abs=1e-4)
    assert outputs[1, "experts"] == pytest.approx(1, abs=1e-4)
    same = {place: value for place, value in outputs.items() if place[0] == 1 and place[1] not in (expert, "experts")}
    assert len(same) >= 7  # roles of the attention, and the other experts, which read the same input
    assert list(same.values()) == pytest.approx([0] * len(same), abs=1e-4)
    estimated = exactly(frame, "output", "attributed_recovery")
    assert max(estimated, key=lambda place: estimated[place] * (place[0] == 1)) in ((1, expert), (1, "experts"))
    assert f"the output of expert {role[-1]} in block 1" in [describe(row) for row in frame.to_dict("records")]
    assert plots.recovery.heatmap(frame)


@pytest.mark.parametrize(("kind", "number"), [("llama", 1), ("gpt_neox", 0), ("phi3", 1)])
def test_a_damaged_head_is_found_and_no_other_one(make_model, kind, number, tokenizer):
    """It has no queries any more, so that it attends to all tokens alike."""
    model = make_model(kind)
    anatomy = Anatomy(model)
    rows = anatomy.shape(1, "q")[0] // anatomy.n_heads(1)

    def change(masks):
        masks[1, "q"][number * rows : (number + 1) * rows] = False

    damage = DamagedModel(DenseModel(model), planted_variant(model, change))
    frame = diagnosed(model, tokenizer, damage, skip_first=False, confirm=EVERYTHING)
    assert first_cause(frame) == ("weights", 1, "q")
    heads = exactly(frame, "head")
    assert heads.pop((1, f"head.{number}")) == pytest.approx(1, abs=1e-4)
    before = {place: value for place, value in heads.items() if place[0] <= 1}
    assert len(before) == 2 * anatomy.n_heads(1) - 1
    assert list(before.values()) == pytest.approx([0] * len(before), abs=1e-4)
    estimated = {p: v for p, v in exactly(frame, "head", "attributed_recovery").items() if p[0] == 1}
    assert max(estimated, key=estimated.get) == (1, f"head.{number}")
    assert f"head {number} in block 1" in [describe(row) for row in frame.to_dict("records")]
    assert plots.recovery.heads(frame)


def test_a_removed_projection_is_found_by_attribution_alone(model, tokenizer):
    """A mask and an output are confirmed, beside the parts of the stream: which they are is what gradients say."""
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[1, "down"].fill_(False)))
    frame = diagnosed(model, tokenizer, damage, confirm=2)
    assert first_cause(frame) == ("weights", 1, "down")
    assert frame["position"].max() == 2 + ADDED
    estimated = exactly(frame, "weights", "attributed_recovery")
    assert estimated.pop((1, "down")) > 0.2
    assert set(estimated.values()) == {0.0}
    ranked = frame[(frame["component"] == "weights") & (frame["position"] == 1) & (frame["direction"] == RESTORE)]
    ranked = ranked[(ranked["metric"] == "margin_restored") & (ranked["estimated_on"] != "both")]
    assert len(ranked) == 2
    found = importance(frame)
    assert found.pop("1.down") == pytest.approx(
        ranked["value"].sum() / 2 / frame[frame["metric"] == "margin_lost"]["value"].iloc[0]
    )
    assert set(found.values()) == {0.0}


class Noisy(DamagedModel):
    """A Llama with all its weights, and one direction of the residual stream after a block shifted."""

    projections, biases = (), ()

    def differentiable_biases(self):
        return nullcontext()

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
    draws = frame[(frame["component"] == "random") & (frame["layer"] == layer) & (frame["metric"] == "margin_recovery")]
    assert draws[["low", "high"]].abs().max().max() < 1e-4
    assert parts == pytest.approx({"specific": 1, "agnostic": 0, "random": 0, "residual": 1}, abs=1e-4)
    assert not exactly(frame, "weights")
    assert importance(frame) == {}
    specific = exactly(frame, "specific", direction=DAMAGE)
    assert specific[layer, None] == pytest.approx(1, abs=1e-4)


def outside(basis, direction):
    return direction - basis @ (basis.T @ direction)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_damage_in_the_language_agnostic_part_is_named_with_its_block(model, tokenizer, layer):
    """The specific part recovers nothing, nor do random subspaces with as little of the damage."""
    subspaces = subspaces_of(model)
    shift = 0.3 * outside(subspaces[layer].basis_, np.random.default_rng(layer).normal(size=32))
    errors = [np.tile(shift, (6, 1)) * (block == layer) for block in range(3)]
    session = Session(model, tokenizer)
    components = components_of(session.anatomy, (), subspaces, errors=errors, draws=4)
    damage = Noisy(model, layer, shift)
    frame = diagnosed(model, tokenizer, damage, components=components, skip_first=False, confirm=EVERYTHING)
    assert first_cause(frame)[:2] == (AGNOSTIC_ADDED, layer)
    parts = {kind: exactly(frame, kind)[layer, None] for kind in ("specific", "agnostic", "residual", AGNOSTIC_ADDED)}
    expected = {"specific": 0, "agnostic": 1, "residual": 1, AGNOSTIC_ADDED: 1}
    assert parts == pytest.approx(expected, abs=1e-4)
    assert exactly(frame, AGNOSTIC_ADDED, direction=DAMAGE)[layer, None] == pytest.approx(1, abs=1e-4)
    draws = frame[(frame["component"] == "random") & (frame["layer"] == layer)]
    draws = draws[draws["metric"].isin(["margin_recovery", "margin_restored"])]
    assert set(draws["estimated_on"]) == {"all", "first", "second"}
    assert draws[["low", "high"]].abs().max().max() < 1e-4
    assert (draws["n"] == 4).all()
    said = diagnosis_findings(frame)
    sentence = next(line for line in said if line.startswith("Chosen by both halves"))
    assert f"estimates: what block {layer} does to the language-agnostic part, 100 % [" in sentence
    place = f"After block {layer}, restoring the language-agnostic part alone recovers 100 % "
    (beside,) = (line for line in said if line.startswith(place))
    assert "the language-specific part 0 % " in beside
    assert beside.endswith("4 random subspaces of the same rank between 0 and 0 %.")


@pytest.mark.parametrize("seed", [3, 5])
def test_a_role_that_did_all_the_damage_comes_before_the_block_that_it_is_in(make_model, tokenizer, seed):
    """Even in models in which restoring the agnostic part alone recovers more than everything."""
    model = make_model("llama", seed)
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[1, "down"].fill_(False)))
    components = components_of(Anatomy(model), damage.projections, subspaces_of(model, rank=3), draws=1)
    frame = diagnosed(model, tokenizer, damage, components=components, skip_first=False, confirm=2)
    assert exactly(frame, "agnostic")[1, None] > 1.005
    assert first_cause(frame) == ("weights", 1, "down")


def test_what_a_block_adds_is_the_difference_of_two_patches_on_the_same_questions(pruned_model):
    session, damage, asked, components, frame = pruned_model
    seen = 0
    for direction in (RESTORE, DAMAGE):
        stream = [residual(block) for block in range(3)]
        agnostic = [c for c in components if c.kind == "agnostic"]
        patched = patch(session, asked.questions, damage, [*stream, *agnostic], direction=direction)
        for layer in range(3):
            for on, rows in {"all": list(range(16)), **asked.halves}.items():
                found = of(frame, Component(AGNOSTIC_ADDED, layer), direction, on)
                after = metrics_by_hand(some(patched.exact[3 + layer], rows))
                clean = patched.pruned if direction == RESTORE else patched.dense
                before = metrics_by_hand(some(patched.exact[layer - 1] if layer else clean, rows))
                for metric in ("margin", "accuracy", "loss") if found else ():
                    change = (after[metric] - before[metric]) / len(rows) * (1 if direction == RESTORE else -1)
                    assert found[f"{metric}_restored"]["value"] == pytest.approx(change, abs=1e-5)
                    seen += 1
    assert seen >= 12
    assert not frame[(frame["direction"] == DAMAGE) & frame["component"].isin(["residual", "agnostic"])].size


def firing_rates(model, session, layers=3):
    """How often each neuron's gate is positive, on some text, from plain hooks."""
    fired = [[] for _ in range(layers)]
    handles = [
        model.model.layers[layer].mlp.act_fn.register_forward_hook(
            lambda module, inputs, output, layer=layer: fired[layer].append((output > 0).double().flatten(0, -2))
        )
        for layer in range(layers)
    ]
    with torch.no_grad():
        for text in ("abcdefghijklm", "the quick brown fox jumps", "zyxwvu tsrqpo nmlkj", "habari ya asubuhi"):
            model(torch.tensor([session.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return np.stack([torch.cat(own).mean(dim=0).numpy() for own in fired])


@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_damaged_neurons_of_a_firing_rate_are_named_and_random_ones_that_fire_as_often_are_not(
    make_model, tokenizer, rate
):
    """Both halves choose the neurons first; the controls recover nothing, since nothing is wrong with them."""
    model = make_model("llama", intermediate_size=400)
    session = Session(model, tokenizer)
    rates = firing_rates(model, session)
    chosen = {1: np.argsort(np.abs(rates[1] - rate), kind="stable")[:8].tolist()}
    with torch.no_grad():  # so that much is lost without them
        model.model.layers[1].mlp.down_proj.weight[:, chosen[1]] *= 10

    def change(masks):
        for layer, own in chosen.items():
            masks[layer, "gate"][own] = False
            masks[layer, "up"][own] = False

    damage = DamagedModel(DenseModel(model), planted_variant(model, change))
    components = components_of(session.anatomy, damage.projections, subspaces_of(model), chosen, rates=rates, draws=4)
    for control in (c for c in components if c.kind == "random_neurons"):
        for place in control.places:
            own = rates[place.layer]
            assert own[place.columns].mean() == pytest.approx(own[chosen[place.layer]].mean(), abs=0.05)
    frame = diagnosed(model, tokenizer, damage, components=components, skip_first=False, confirm=2)
    kind, layer, role = first_cause(frame)
    assert (kind, layer, role) == ("neurons", None, None)
    rows = frame[(frame["metric"] == "margin_recovery") & frame["component"].isin(["neurons", "random_neurons"])]
    own, controls = (rows[rows["component"] == kind] for kind in ("neurons", "random_neurons"))
    for direction in (RESTORE, DAMAGE):
        assert set(own[own["direction"] == direction]["estimated_on"]) == {"all", "first", "second", "both"}
    assert own["value"].tolist() == pytest.approx([1] * len(own), abs=1e-3)
    assert set(controls["estimated_on"]) == {"all", "first", "second"}
    assert controls[["value", "low", "high"]].abs().max().max() < 1e-3
    assert (controls["n"] == 4).all()
    said = diagnosis_findings(frame)
    sentence = next(line for line in said if line.startswith("The language-specific neurons"))
    assert "as many random neurons of the same blocks that fire as often" in sentence
    assert "between 0 and 0 % (4 draws)" in sentence
    assert "neurons recover 100 % " in sentence
    named = next(line for line in said if line.startswith("Chosen by both halves"))
    assert "estimates: the language-specific neurons, 100 % (" in named


def test_controls_are_never_named_even_where_they_recover_most(model, tokenizer):
    """The damage lies in one random subspace: it brings everything back, and is no cause."""
    session = Session(model, tokenizer)
    components = components_of(session.anatomy, (), subspaces_of(model), {1: [3]}, draws=3)
    (control,) = (c for c in components if c.label == "random 1 draw 2")
    damage = Noisy(model, 1, 0.5 * control.places[0].basis[:, 0].double().numpy())
    frame = diagnosed(model, tokenizer, damage, components=components, skip_first=False, confirm=EVERYTHING)
    controls = frame["component"].isin(CONTROLS)
    assert frame[controls & (frame["metric"] == "attributed_restored")]["high"].max() > 0.1
    assert frame[controls]["position"].isna().all()
    assert not set(frame[frame["direction"] == DAMAGE]["component"]) & set(CONTROLS)
    assert not set(named_causes(frame)["component"]) & set(CONTROLS)
    assert not set(CAUSES) & set(CONTROLS)


def test_a_pruned_model_that_computes_the_same_has_no_causes(model, tokenizer):
    """Weights are gone, but only those of neurons that never had an effect."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, [2, 9]] = 0

    def change(masks):
        masks[1, "gate"][[2, 9]] = False
        masks[1, "up"][[2, 9]] = False

    damage = DamagedModel(DenseModel(model), planted_variant(model, change))
    frame = diagnosed(model, tokenizer, damage)
    assert frame["position"].isna().all()
    assert set(frame["component"]) == {"everything"}
    assert diagnosis_findings(frame)[-1] == "There is no drop to explain, so no causes are named."


# -- where there is nothing to explain ------------------------------------------------------------------------------


def test_a_model_that_lost_nothing_has_no_causes(model, tokenizer):
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: None))
    frame = diagnosed(model, tokenizer, damage)
    assert frame["metric"].tolist() == 3 * ["margin_lost", "accuracy_lost", "loss_added"]
    assert (frame["value"] == 0).all()
    assert not (frame["low"] > 0).any()
    assert frame["position"].isna().all()
    assert importance(frame) == {}
    assert diagnosis_findings(frame) == [
        "Pruning changed the margin of the right choice (reasoning in Swahili, n = 16) by +0.00 nats "
        "(no interval): no significant drop.",
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
    frame = diagnosed(model, tokenizer, damage, Asked("mine", "reasoning", "sw", gains, suffers.templates))
    row = frame[frame["estimated_on"].astype(str) == "all"].set_index("metric").loc["margin_lost"]
    assert row["high"] < 0
    assert len(frame) == 9
    gained = f"by {-row['value']:+.2f} nats [{-row['high']:+.2f}, {-row['low']:+.2f}]: no significant drop"
    assert gained in diagnosis_findings(frame)[0]
    assert "by +" in diagnosis_findings(frame)[0]


# -- the numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned_model():
    return pruned_and_diagnosed({1: [4, 5]}, draws=3, confirm=6, sample=5)


def metrics_by_hand(scores):
    """Sums over items of what is better if higher, an item at a time."""
    found = {"margin": 0.0, "accuracy": 0.0, "loss": 0.0}
    for values, answer in zip(scores.values, scores.answers, strict=True):
        best = max(value for choice, value in enumerate(values) if choice != answer)
        found["margin"] += values[answer] - best
        found["accuracy"] += values[answer] > best
        found["loss"] += values[answer]
    return found


def of(frame, component, direction, on):
    """Metric to row of one component, not what gradients say of it."""
    rows = frame[
        (frame["component"] == component.kind)
        & (frame["direction"] == direction)
        & (frame["layer"].isna() if component.layer is None else frame["layer"] == component.layer)
        & (frame["role"].isna() if component.role is None else frame["role"] == component.role)
        & (frame["estimated_on"].astype(str) == on)
        & ~frame["metric"].astype(str).str.startswith("attributed")
    ]
    return {row["metric"]: row for row in rows.to_dict("records")}


def some(scores, rows):
    return ChoiceScores(scores.values[rows], scores.answers[rows])


@pytest.mark.parametrize("direction", [RESTORE, DAMAGE])
@pytest.mark.parametrize("on", ["all", "first", "second"])
def test_what_is_restored_equals_that_by_hand(pruned_model, direction, on):
    session, damage, asked, components, frame = pruned_model
    single = [c for c in components if c.draw is None]
    patched = patch(session, asked.questions, damage, single, direction=direction)
    rows = {"all": list(range(16)), **asked.halves}[on]
    dense, pruned = (metrics_by_hand(some(own, rows)) for own in (patched.dense, patched.pruned))
    lost = frame[(frame["component"] == "everything") & (frame["estimated_on"].astype(str) == on)].set_index("metric")
    names = {"margin": "margin_lost", "accuracy": "accuracy_lost", "loss": "loss_added"}
    seen = 0
    for number, component in enumerate(single):
        found = of(frame, component, direction, on)
        if not found:
            continue
        seen += 1
        got = metrics_by_hand(some(patched.exact[number], rows))
        for metric, drop in names.items():
            back = got[metric] - pruned[metric] if direction == RESTORE else dense[metric] - got[metric]
            assert found[f"{metric}_restored"]["value"] == pytest.approx(back / len(rows), abs=1e-5), component.label
            assert found[f"{metric}_restored"]["n"] == len(rows)
            significant = lost.loc[drop, "low"] > 0
            assert (f"{metric}_recovery" in found) == significant
            if significant:
                share = back / (dense[metric] - pruned[metric])
                assert found[f"{metric}_recovery"]["value"] == pytest.approx(share, abs=1e-5)
    assert seen >= (6 if direction == DAMAGE and on == "all" else 4)


def test_causes_are_chosen_on_one_half_and_estimated_on_the_other(pruned_model):
    session, damage, asked, components, frame = pruned_model
    assert not {asked.templates[i] for i in asked.halves["first"]} & {
        asked.templates[i] for i in asked.halves["second"]
    }
    causes = [c for c in components if c.kind in CAUSES]
    for own, other in (("first", "second"), ("second", "first")):
        estimate = attribute(session, asked.half(own), damage, causes).attributed
        order = sorted(range(len(causes)), key=lambda i: -estimate[i].sum())
        masks = [i for i in order if causes[i].kind == "weights"][:3]
        wanted = {causes[i].label for i in [*masks, *[i for i in order if causes[i].kind != "weights"][:3]]} | {
            "neurons"
        }
        found = {
            c.label: rows["margin_restored"]["position"]
            for c in causes
            if "margin_restored" in (rows := of(frame, c, RESTORE, other))
            and np.isfinite(rows["margin_restored"]["position"])
        }
        assert set(found) == wanted
        exact = patch(session, asked.half(own), damage, [c for c in causes if c.label in found])
        restored = {
            c.label: scores.margin.sum()
            for c, scores in zip([c for c in causes if c.label in found], exact.exact.values(), strict=True)
        }
        assert sorted(found, key=found.get) == sorted(restored, key=lambda label: -restored[label])


def test_what_both_halves_chose_is_averaged_with_a_narrower_interval(pruned_model):
    *_, components, frame = pruned_model
    averaged = [c for c in components if of(frame, c, RESTORE, "both")]
    assert averaged
    for component in averaged:
        first, second, both = (of(frame, component, RESTORE, on) for on in ("first", "second", "both"))
        for metric, row in both.items():
            value = (first[metric]["value"] + second[metric]["value"]) / 2
            assert row["value"] == pytest.approx(value)
            widths = [one[metric]["high"] - one[metric]["low"] for one in (first, second)]
            assert not row["high"] - row["low"] > max(widths)
        shares = {metric for metric in both if metric.endswith("_recovery")}
        assert shares == {m for m in first if m.endswith("_recovery")} & {m for m in second if m.endswith("_recovery")}


def test_no_share_is_given_of_a_drop_that_is_not_significant(pruned_model):
    *_, frame = pruned_model
    assert frame[(frame["metric"] == "margin_lost") & (frame["estimated_on"] == "first")]["low"].iloc[0] < 0
    own = frame[frame["estimated_on"].isin(["first", "both"])]
    assert not (own["metric"] == "margin_recovery").any()
    assert (own["metric"] == "margin_restored").any()
    said = " ".join(diagnosis_findings(frame))
    assert "On the first half of the questions the drop is not significant" in said
    assert "is given in nats, not as a share" in said


def test_questions_of_one_template_are_resampled_together(pruned_model):
    session, damage, asked, components, frame = pruned_model
    alone = dataclasses.replace(asked, templates=[str(i) for i in range(16)])
    scores = attribute(session, asked.questions, damage, components[:1])
    wide = Drop(asked.questions, asked.templates, (), scores.dense, scores.pruned).lost()
    narrow = Drop(asked.questions, alone.templates, (), scores.dense, scores.pruned).lost()
    row = frame[(frame["metric"] == "margin_lost") & (frame["estimated_on"] == "all")].iloc[0]
    assert (row["value"], row["low"], row["high"]) == pytest.approx(tuple(part[0, 0] for part in wide))
    change = (scores.dense.margin - scores.pruned.margin).reshape(8, 2).mean(axis=1)
    margin = t.ppf(0.975, 7) * change.std(ddof=1) / np.sqrt(8)
    assert row["high"] - row["value"] == pytest.approx(margin)
    assert wide.low[0, 0] != pytest.approx(narrow.low[0, 0])


def test_estimates_are_what_attribution_gives(pruned_model):
    session, damage, asked, components, frame = pruned_model
    single = [c for c in components if c.draw is None]
    whole = attribute(session, asked.questions, damage, single)
    lost = metrics_by_hand(whole.dense)["margin"] - metrics_by_hand(whole.pruned)["margin"]
    controls = 3 + 1
    for on, rows in {"all": list(range(16)), **asked.halves}.items():
        own = frame[(frame["metric"] == "attributed_restored") & (frame["estimated_on"].astype(str) == on)]
        assert len(own) == len(single) + controls
        part = attribute(session, [asked.questions[i] for i in rows], damage, single).attributed
        expected = [part[i].sum() / len(rows) for i in range(len(single))]
        assert own["value"].tolist()[: len(single)] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    shares = frame[(frame["metric"] == "attributed_recovery") & (frame["estimated_on"].astype(str) == "all")]
    expected = [whole.attributed[i].sum() / lost for i in range(len(single))]
    assert shares["value"].tolist()[: len(single)] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_larger_random_sample_contains_the_smaller_one(pruned_model):
    session, damage, asked, components, _ = pruned_model
    estimates = {half: attribute(session, asked.half(half), damage, components) for half in asked.halves}
    few, more = (to_confirm(asked, components, estimates, 2, number) for number in (3, 6))
    kinds = [[components[i].kind for i in plan.sampled] for plan in (few, more)]
    wanted = [["weights"] * n + ["output"] * n + ["head"] * n for n in (3, 6)]
    assert [sorted(own, key=["weights", "output", "head"].index) for own in kinds] == wanted
    assert set(few.sampled) < set(more.sampled)
    assert set(more.sampled) <= set(more.exact[RESTORE])


@pytest.mark.parametrize(
    "settings",
    [{"batch_tokens": 8}, {"batch_tokens": 150}, {"batch_tokens": 150, "padding": "left"}],
    ids=["one at a time", "a few at a time", "padded on the left"],
)
def test_batches_and_padding_change_no_diagnosis(pruned_model, settings):
    session, damage, asked, components, frame = pruned_model
    frame = frame.copy()
    other = Session(session.model, session.tokenizer, **settings)
    again = diagnose(other, damage, asked, components, COLUMNS, confirm=6, sample=5)
    values = ["value", "low", "high"]
    pd.testing.assert_frame_equal(again.drop(columns=values), frame.drop(columns=values))
    for one in (again, frame):  # of what hardly varies the interval is empty, or has hardly any width
        for end in ("low", "high"):
            one[end] = one[end].where(one[end].notna(), one["value"])
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
    lost = frame[(frame["component"] == "everything") & (frame["estimated_on"].astype(str) == "all")]
    lost = lost.set_index("metric")
    assert lost.index.tolist() == ["loss_added"]
    assert lost.loc["loss_added", "value"] == pytest.approx(np.sort(change)[-10:].mean(), rel=1e-5)
    assert lost.loc["loss_added", "low"] > 0
    estimates = {"attributed_recovery", "attributed_restored"}
    assert set(frame["metric"]) == {"loss_added", "loss_recovery", "loss_restored", "beyond_sum"} | estimates
    assert exactly(frame, "residual", "loss_recovery")[2, None] == pytest.approx(1, abs=1e-4)
    said = diagnosis_findings(frame)
    row = lost.loc["loss_added"]
    assert said[0] == (
        f"Pruning lowers the log-likelihood of a segment by {row['value']:.2f} nats [{row['low']:.2f}, "
        f"{row['high']:.2f}] (the text in German, n = 10)."
    )
    assert any("restoring the language-agnostic part alone recovers" in sentence for sentence in said)


# -- in words -------------------------------------------------------------------------------------------------------


def planted_frame(*rows):
    place = {**COLUMNS, "language": "sw", "task": "bundled", "category": "reasoning"}
    keys = ("direction", "component", "layer", "role", "estimated_on", "position", "sample")
    keys += ("metric", "value", "low", "high", "n")
    return tidy("recovery", [{**place, **dict(zip(keys, row, strict=True))} for row in rows])


def share(component, layer, role, on, position, value, spread=0.1, sample=None):
    """Recovery, and what is restored of a drop of two nats."""
    where = RESTORE, component, layer, role, on, position, sample
    yield *where, "margin_recovery", value, value - spread, value + spread, 64
    yield *where, "margin_restored", 2 * value, 2 * (value - spread), 2 * (value + spread), 64


def control(component, layer, low, high):
    for metric, scale in (("margin_recovery", 1), ("margin_restored", 2)):
        middle = scale * (low + high) / 2
        yield RESTORE, component, layer, None, "all", None, None, metric, middle, scale * low, scale * high, 20


def estimate(component, layer, role, value, sample=None):
    return (RESTORE, component, layer, role, "all", None, sample, "attributed_restored", value, None, None, None)


def lost(on, low=1.5):
    yield None, "everything", None, None, on, None, None, "margin_lost", 2.0, low, 2.5, 64
    yield None, "everything", None, None, on, None, None, "accuracy_lost", 0.125, 0.05, 0.2, 64


PLANTED = (
    *lost("all"),
    *lost("first"),
    *lost("second"),
    *share("residual", 0, None, "first", None, 0.2),
    *share("residual", 1, None, "first", None, 0.55),
    *share("residual", 0, None, "second", None, 0.3),
    *share("residual", 1, None, "second", None, 0.65),
    *share("agnostic", 1, None, "all", None, 0.5),
    *share("specific", 1, None, "all", None, 0.07),
    *control("random", 1, -0.03, 0.04),
    (RESTORE, "random", 1, None, None, None, None, "error_ratio", 0.97, 0.95, 1.0, 20),
    *share("weights", 1, "down", "second", 1, 0.3),
    *share("weights", 1, "down", "first", 1, 0.4),
    *share("weights", 1, "down", "both", 1, 0.35, 0.07),
    *share("output", 0, "o", "first", 2, 0.2),
    *share("neurons", None, None, "all", None, 0.04),
    *control("random_neurons", None, -0.05, 0.01),
)


def test_sentences_say_what_the_frame_says():
    assert diagnosis_findings(planted_frame(*PLANTED)) == [
        "Pruning lowers the margin of the right choice by 2.00 nats [1.50, 2.50] (reasoning in Swahili, n = 64), and "
        "accuracy by 12.5 points [5.0, 20.0].",
        "Restoring the whole residual stream recovers 65 % [55, 75] after block 1 (on the second half) and 55 % "
        "[45, 65] after block 1 (on the first half): after the first block that brings half of the drop back on the "
        "other half, or else the one that brings back most. Blocks are numbered from 0.",
        "After block 1, restoring the language-agnostic part alone recovers 50 % [40, 60], the language-specific part "
        "7 % [-3, 17], 20 random subspaces of the same rank, with 0.97 times its pruning error, between -3 and 4 %.",
        "Chosen on the first half of the questions, estimated on the second: the weights of down in block 1, 30 % "
        "[20, 40].",
        "Chosen on the second half of the questions, estimated on the first: the weights of down in block 1, 40 % "
        "[30, 50]; the output of o in block 0, 20 % [10, 30].",
        "Chosen by both halves, average of both estimates: the weights of down in block 1, 35 % [28, 42].",
        "The language-specific neurons recover 4 % [-6, 14], as many random neurons of the same blocks that fire as "
        "often between -5 and 1 % (20 draws).",
    ]


def test_a_cause_that_only_one_half_finds_is_not_named():
    rows = [row for row in PLANTED if row[4] != "both"]
    said = diagnosis_findings(planted_frame(*rows))
    assert (
        "No single component is chosen by both halves and recovers significantly, so none is named as the cause."
        in said
    )


def test_agreement_is_within_kinds_and_apart_for_what_was_drawn_at_random():
    rows = [*lost("all")]
    for i in range(12):  # masks: the drawn ones agree the other way round, the chosen ones wholly
        drawn = i < 6
        rows += share("weights", i, "q", "all", None, i / 20, sample="random" if drawn else None)
        rows.append(estimate("weights", i, "q", -i if drawn else i, "random" if drawn else None))
        if not drawn:
            rows += share("weights", i, "q", "first", i, i / 20)
    for layer in range(5):
        rows += [*share("residual", layer, None, "all", None, layer / 5), estimate("residual", layer, None, layer)]
    rows += [*share("specific", 0, None, "all", None, 0.3), estimate("specific", 0, None, 1)]
    found = {(one.kind, one.over): one for one in agreement(planted_frame(*rows))}
    assert {place: (one.n, round(one.rho, 6)) for place, one in found.items()} == {
        ("weights", "drawn at random"): (6, -1),
        ("weights", "chosen by attribution"): (6, 1),
        ("residual", "of all blocks"): (5, 1),
    }
    drawn = found["weights", "drawn at random"]
    assert (drawn.shared, drawn.top) == (0, 3)
    assert drawn.low <= drawn.rho < drawn.high < 0.5
    assert found["weights", "chosen by attribution"].low < 0.99  # six that agree do not prove that all do
    said = diagnosis_findings(planted_frame(*rows))[-1]
    assert "weights drawn at random ρ = -1.00 [-1.00, " in said
    assert "(n = 6, 0 of the first 3 shared)" in said


@pytest.mark.parametrize("plot", [plots.recovery.heatmap, plots.recovery.curves, plots.recovery.causes])
def test_figures_are_drawn_of_every_diagnosis(pruned_model, tmp_path, plot):
    *_, frame = pruned_model
    drawn = plot(frame)
    assert "reasoning, Swahili" in drawn.texts[0].get_text()
    assert min(file.stat().st_size for file in plots.save(drawn, tmp_path, "f")) > 2000


def test_causes_are_drawn_in_nats_where_a_half_has_no_significant_drop(pruned_model):
    *_, frame = pruned_model
    panels = [axes for axes in plots.recovery.causes(frame).axes if axes.get_visible()]
    assert {axes.get_xlabel() for axes in panels} - {""} == {"nats"}
    assert all(len(axes.get_yticklabels()) == len(named_causes(frame)) for axes in panels[:1])
    planted = [*PLANTED]
    for row in PLANTED:
        if row[0] == RESTORE and row[5] is not None:
            planted.append((DAMAGE, *row[1:5], None, *row[6:]))
    drawn = plots.recovery.causes(planted_frame(*planted))
    assert {axes.get_xlabel() for axes in drawn.axes} - {""} == {"share of the drop"}
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == ["output 0.o (first half)", "weights 1.down"]
