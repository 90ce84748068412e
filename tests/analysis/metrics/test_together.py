"""Masks that are undone together: which ones, on which questions, and what they recover beyond their sum."""

from __future__ import annotations

import numpy as np
import pytest
from planted import diagnosed, planted_variant, pruned_and_diagnosed, questions_that_suffer

from analysis import plots
from analysis.metrics.together import RANDOM_TOGETHER, TOGETHER, mask_groups
from analysis.report import diagnosis_findings
from probes import Session
from probes.patching import DamagedModel, attribute, role_weights
from probes.scoring import score
from pruning import Anatomy
from pruning.variants.owner import DenseModel


@pytest.fixture(scope="module")
def pruned_model():
    return pruned_and_diagnosed(confirm=8, sample=1)


def rows_of(frame, kind, metric="margin_restored", on="both"):
    rows = frame[(frame["component"] == kind) & (frame["metric"] == metric)]
    return rows[rows["estimated_on"].astype(str) == on].set_index("masks").sort_index()


def undone(session, damage, questions, masks):
    """Margins of some questions by a model that was written by hand: pruned, but for these masks."""
    dense = {key: session.anatomy.weight(*key).clone() for key in masks}
    with damage.damaged():
        for key in masks:
            session.anatomy.set_weight(*key, dense[key])
        return score(session, questions).margin


def test_the_masks_that_one_half_ranks_highest_are_undone_on_the_other(pruned_model):
    session, damage, asked, _, frame = pruned_model
    masks = [role_weights(*key) for key in damage.projections]
    found = {}
    for own, other in (("first", "second"), ("second", "first")):
        effects = attribute(session, asked.half(own), damage, masks).attributed
        order = sorted(range(len(masks)), key=lambda i: -effects[i].sum())
        questions = asked.half(other)
        with damage.damaged():
            pruned = score(session, questions).margin
        for size in (1, 2, 4, 8, 16, 21):
            after = undone(session, damage, questions, [masks[i].weights[0] for i in order[:size]])
            found[other, size] = float((after - pruned).mean())
        assert rows_of(frame, TOGETHER, on=other).index.tolist() == [1, 2, 4, 8, 16, 21]
        for size, value in rows_of(frame, TOGETHER, on=other)["value"].items():
            assert value == pytest.approx(found[other, size], abs=1e-4)
    for size, value in rows_of(frame, TOGETHER)["value"].items():
        assert value == pytest.approx((found["first", size] + found["second", size]) / 2, abs=1e-4)


def test_all_masks_together_are_the_dense_model(pruned_model):
    *_, frame = pruned_model
    lost = frame[(frame["metric"] == "margin_lost") & (frame["estimated_on"] == "second")]["value"].iloc[0]
    row = rows_of(frame, TOGETHER, on="second").loc[21]
    assert row["value"] == pytest.approx(lost, abs=1e-4)
    assert row["weight_share"] == 1
    share = rows_of(frame, TOGETHER, "margin_recovery", on="second").loc[21]
    assert share["value"] == pytest.approx(1, abs=1e-4)


def test_controls_have_the_same_roles_in_other_blocks(pruned_model):
    _, damage, _, components, frame = pruned_model
    effects = {i: float(i % 7) for i in range(len(components))}
    groups = mask_groups(components, effects, draws=6)
    ranked = {len(group.masks): group.masks for group in groups if group.draw is None}
    assert sorted(ranked) == [1, 2, 4, 8, 16, 21]
    assert set(ranked[21]) == set(damage.projections)
    drawn = [group for group in groups if group.draw is not None]
    assert len(drawn) == 6 * 5  # all masks together are the same in any order
    for group in drawn:
        assert [role for _, role in group.masks] == [role for _, role in ranked[len(group.masks)]]
        assert len(set(group.masks)) == len(group.masks)
    assert len({group.masks for group in drawn if len(group.masks) == 8}) > 3
    controls, own = (rows_of(frame, kind) for kind in (RANDOM_TOGETHER, TOGETHER))
    assert controls.index.tolist() == [1, 2, 4, 8, 16]
    assert controls["weight_share"].tolist() == pytest.approx(own["weight_share"].tolist()[:-1])
    assert (controls["n"] == 5).all()
    assert (controls["low"] < controls["high"]).all()


def test_what_goes_beyond_the_sum_is_that_by_hand(pruned_model):
    session, damage, asked, _, frame = pruned_model
    masks = [role_weights(*key) for key in damage.projections]
    beyond = {}
    for own, other in (("first", "second"), ("second", "first")):
        effects = attribute(session, asked.half(own), damage, masks).attributed
        first = [masks[i].weights[0] for i in sorted(range(len(masks)), key=lambda i: -effects[i].sum())[:4]]
        questions = asked.half(other)
        with damage.damaged():
            pruned = score(session, questions).margin
        alone = sum(undone(session, damage, questions, [key]) - pruned for key in first)
        beyond[other] = float((undone(session, damage, questions, first) - pruned - alone).mean())
    for on, value in beyond.items():
        assert rows_of(frame, TOGETHER, "beyond_sum", on).loc[4, "value"] == pytest.approx(value, abs=1e-4)
    both = rows_of(frame, TOGETHER, "beyond_sum")
    assert both.loc[4, "value"] == pytest.approx(sum(beyond.values()) / 2, abs=1e-4)
    assert both.loc[1, "value"] == pytest.approx(0, abs=1e-4)
    assert both.index.tolist() == [1, 2, 4]  # of more, not every single one was patched: half of confirm are masks


def test_two_masks_that_matter_only_together_go_beyond_their_sum(make_model, tokenizer):
    """Both ways into the same neurons are gone: to undo one alone brings nothing back."""
    model = make_model("llama")

    def change(masks):
        masks[1, "gate"].fill_(False)
        masks[1, "up"].fill_(False)

    damage = DamagedModel(DenseModel(model), planted_variant(model, change))
    asked = questions_that_suffer(Session(model, tokenizer), damage, 40)
    frame = diagnosed(model, tokenizer, damage, asked, skip_first=False, confirm=1000)
    alone = frame[(frame["component"] == "weights") & (frame["metric"] == "margin_restored")]
    alone = alone[alone["direction"] == "restore"]
    assert alone["value"].abs().max() < 1e-4
    whole = rows_of(frame, TOGETHER, "margin_recovery").loc[21, "value"]
    assert whole == pytest.approx(1, abs=1e-3)
    beyond = rows_of(frame, TOGETHER, "beyond_sum").loc[21]
    lost = frame[(frame["metric"] == "margin_lost") & (frame["estimated_on"] != "all")]["value"].mean()
    assert beyond["value"] == pytest.approx(lost, rel=1e-3)
    assert beyond["low"] > 0


def test_one_mask_that_did_it_all_needs_no_other(make_model, tokenizer):
    model = make_model("llama")
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: masks[1, "down"].fill_(False)))
    asked = questions_that_suffer(Session(model, tokenizer), damage, 40)
    frame = diagnosed(model, tokenizer, damage, asked, skip_first=False, confirm=8)
    own = rows_of(frame, TOGETHER, "margin_recovery")
    assert own["value"].tolist() == pytest.approx([1] * 6, abs=1e-4)
    assert rows_of(frame, TOGETHER, "beyond_sum")["value"].abs().max() < 1e-4
    weights = {key: Anatomy(model).weight(*key).numel() for key in Anatomy(model)}
    assert own.loc[1, "weight_share"] == pytest.approx(weights[1, "down"] / sum(weights.values()))
    said = next(line for line in diagnosis_findings(frame) if line.startswith("Undone together"))
    assert "1 of 21 masks" in said
    assert "recover 100 % [" in said or "recover 100 % (" in said
    figure = plots.recovery.together(frame)
    assert figure.axes[0].get_title() == "margin"
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), 1, atol=1e-3)


def test_without_a_drop_nothing_is_undone(model, tokenizer):
    damage = DamagedModel(DenseModel(model), planted_variant(model, lambda masks: None))
    frame = diagnosed(model, tokenizer, damage)
    assert set(frame["component"]) == {"everything"}
