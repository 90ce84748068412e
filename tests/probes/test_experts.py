"""What is read of mixtures of experts: how tokens are routed, neurons that fire there, what each expert adds."""

from __future__ import annotations

from contextlib import nullcontext
from operator import attrgetter

import numpy as np
import pytest
import torch
from disturbed import Disturbed

from probes import DENSE, Item, Reader, Session, item_questions, read_against_dense, text_questions
from probes.patching import DAMAGE, RESTORE, DamagedModel, attribute, expert_output, experts_output, patch
from probes.readers.firing import FOLDS
from probes.readers.keep import Keep
from probes.routing import Routed
from pruning import Anatomy, Recipe, prune
from pruning.variants.owner import DenseModel

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe"]


def routed_by_hand(model, tokenizer, segments):
    """What reaches the experts, and the router's own choices: ``(segment, block)`` to hidden states and experts.

    Seen by plain hooks, one segment at a time, without the first token.
    """
    anatomy = Anatomy(model)
    seen = {}
    for index, segment in enumerate(segments):
        handles = []
        for layer in range(3):
            if anatomy.experts(layer) is None:
                continue

            def keep(module, given, output, key=(index, layer)):
                seen[key] = (given[0].reshape(-1, given[0].shape[-1])[1:].double(), output[2][1:])

            handles.append(anatomy.module(layer, "mlp.gate").register_forward_hook(keep))
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(segment.text)["input_ids"]]))
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_firing_and_routing_are_those_of_a_loop_over_tokens(make_model, kind, tokenizer, segments, padding):
    model = make_model(kind)
    anatomy = Anatomy(model)
    read = read_against_dense(Session(model, tokenizer, batch_tokens=60, padding=padding), segments)[DENSE]
    fired = torch.zeros_like(read.fired)
    routed = torch.zeros_like(read.routed)
    size = 48 if kind == "mixtral" else 24
    for (index, layer), (hidden, chosen) in routed_by_hand(model, tokenizer, segments).items():
        for x, experts in zip(hidden, chosen.tolist(), strict=True):
            for expert in experts:
                routed[index, layer, expert] += 1
                gate = anatomy.experts(layer).gate_up_proj.data[expert, :size].double()
                for neuron in torch.nonzero(gate @ x > 0).flatten().tolist():
                    fired[index % FOLDS, layer, expert * size + neuron] += 1
    assert torch.equal(read.routed, routed)
    sparse = [layer for layer in range(3) if anatomy.experts(layer) is not None]
    assert torch.equal(read.fired[:, sparse, : 4 * size], fired[:, sparse, : 4 * size])
    assert (routed.sum(dim=2)[:, sparse] == 2 * read.tokens[sparse].T).all()
    assert torch.equal(read.agreed[:, sparse].long(), 2 * read.tokens[sparse].T)


@pytest.mark.parametrize(
    ("kind", "layer", "path"), [("qwen2_moe", 1, "mlp.shared_expert.act_fn"), ("qwen3_moe", 1, "mlp.act_fn")]
)
def test_neurons_that_all_tokens_pass_through_are_counted_beside_those_of_experts(
    make_model, kind, layer, path, tokenizer, segments
):
    model = make_model(kind)
    read = read_against_dense(Session(model, tokenizer), segments)[DENSE]
    fired = torch.zeros(read.fired.shape[2])
    start = 4 * 24 if kind == "qwen2_moe" else 0
    for segment in segments:
        values = []
        handle = attrgetter(path)(Anatomy(model).blocks[layer]).register_forward_hook(
            lambda module, given, output, values=values: values.append(output.reshape(-1, output.shape[-1])[1:])
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(segment.text)["input_ids"]]))
        handle.remove()
        fired[start : start + values[0].shape[1]] += (values[0] > 0).sum(dim=0)
    assert torch.equal(read.fired[:, layer].sum(dim=0)[start:].float(), fired[start:])
    assert (
        read.neurons.tolist()
        == {
            "qwen2_moe": [[0, 0, 0, 0, 48], [24, 24, 24, 24, 40], [24, 24, 24, 24, 40]],
            "qwen3_moe": [[24, 24, 24, 24, 0], [0, 0, 0, 0, 48], [24, 24, 24, 24, 0]],
        }[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_counts_the_experts_that_both_models_choose_for_a_token(make_model, kind, tokenizer, segments):
    model = make_model(kind)
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.6))
    read = read_against_dense(Session(model, tokenizer, batch_tokens=60), segments, [variant])[variant.id]
    before = routed_by_hand(model, tokenizer, segments)
    with variant.applied(model):
        after = routed_by_hand(model, tokenizer, segments)
    changed = 0
    for (index, layer), (_, chosen) in before.items():
        pairs = list(zip(chosen.tolist(), after[index, layer][1].tolist(), strict=True))
        assert int(read.agreed[index, layer]) == sum(len(set(one) & set(other)) for one, other in pairs)
        changed += sum(set(one) != set(other) for one, other in pairs)
        counts = torch.bincount(after[index, layer][1].flatten(), minlength=4)
        assert torch.equal(read.routed[index, layer].long(), counts)
    assert changed > 0


class Experts(Reader):
    """Keeps what each expert adds, what all do, and how tokens are routed."""

    sites = frozenset({"routing", "experts", *(f"expert.{e}" for e in range(4))})

    def __init__(self):
        self.seen = {}

    def read(self, layer, site, value, batch, dense=None):
        self.seen[layer, site] = value


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_single_experts_add_sums_to_what_all_add(make_model, kind, implementation, tokenizer, segments):
    model = make_model(kind)
    model.config._experts_implementation = implementation
    session = Session(model, tokenizer)
    (batch,) = session.batches(segments)
    reader = Experts()
    session.read(batch, [reader])
    for layer in (0, 2) if kind != "qwen2_moe" else (1, 2):
        parts = [reader.seen[layer, f"expert.{e}"] for e in range(4)]
        torch.testing.assert_close(sum(parts), reader.seen[layer, "experts"], rtol=1e-4, atol=1e-6)
        routed = reader.seen[layer, "routing"]
        slots = routed.contributions()
        torch.testing.assert_close(slots.sum(dim=1).view_as(parts[0]), sum(parts), rtol=1e-4, atol=1e-6)
        for expert, part in enumerate(parts):
            there = (routed.chosen == expert).any(dim=1)
            assert torch.equal(part.flatten(0, 1).any(dim=1), there)


def test_only_the_experts_that_are_wanted_are_run_again(make_model, tokenizer, segments, monkeypatch):
    model = make_model("mixtral")
    session = Session(model, tokenizer)
    (batch,) = session.batches(segments)
    every = Experts()
    session.read(batch, [every])
    run, looked = [], []
    contribution, slots = Routed.contribution, Routed.slots.func
    monkeypatch.setattr(
        Routed, "contribution", lambda self, expert: run.append((self.layer, expert)) or contribution(self, expert)
    )
    monkeypatch.setattr(Routed.slots, "func", lambda self: looked.append(self.layer) or slots(self))
    keep = Keep({(0, "expert.1"), (0, "expert.2"), (2, "expert.3")})
    session.read(batch, [keep])
    assert run == [(0, 1), (0, 2), (2, 3)]
    assert looked == [0, 2]  # which tokens go to which expert, once a block
    for key, value in keep.values.items():
        assert torch.equal(value, every.seen[key])


# -- patching ------------------------------------------------------------------------------------------------------------

ITEM = Item(id="1", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " rot.", " g"), answer=0)


def added_by_hand(module, hidden, chosen, weights, expert):
    """What an expert adds to each token, token by token."""
    found = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, (x, experts, own) in enumerate(zip(hidden.double(), chosen.tolist(), weights.double(), strict=True)):
        if expert in experts:
            gate, up = (module.gate_up_proj.data[expert].double() @ x).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            found[token] = own[experts.index(expert)] * (module.down_proj.data[expert].double() @ inner)
    return found


@pytest.mark.parametrize("direction", [RESTORE, DAMAGE])
@pytest.mark.parametrize("kind", KINDS)
def test_patching_an_expert_replaces_what_it_adds_to_every_token_but_the_first(make_model, kind, direction, tokenizer):
    model = make_model(kind)
    session = Session(model, tokenizer)
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.5))
    components = [expert_output(2, expert) for expert in range(4)]
    damage = DamagedModel(DenseModel(model), variant)
    patched = patch(session, item_questions(session, [ITEM]), damage, components, direction=direction)
    module = session.anatomy.experts(2)

    def run(ids, expert, other=None):
        """The logits, and what the expert adds; or the logits with what it adds taken from there."""
        seen = []

        def hook(module, given, output):
            own = added_by_hand(module, *given, expert)
            seen.append(own)
            if other is not None:
                change = other - own
                change[0] = 0
                return (output.double() + change).to(output.dtype)
            return None

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        handle.remove()
        return logits, seen[0]

    start = len(tokenizer(ITEM.prompt)["input_ids"])
    routed = 0
    for expert in range(4):
        for choice, text in enumerate(ITEM.choices):
            ids = torch.tensor([tokenizer(ITEM.prompt + text)["input_ids"]])
            with nullcontext() if direction == RESTORE else variant.applied(model):
                _, other = run(ids, expert)
            with variant.applied(model) if direction == RESTORE else nullcontext():
                logits, own = run(ids, expert, other)
            routed += bool(torch.count_nonzero(other - own))
            logs = logits[0].log_softmax(dim=-1)
            expected = sum(float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
            assert patched.exact[expert].values[0, choice] == pytest.approx(expected, abs=2e-4)
    assert routed > 3


@pytest.mark.parametrize("skip_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_attribution_to_experts_is_the_derivative_of_exact_patching(make_model, kind, skip_first, tokenizer, segments):
    model = make_model(kind).double()
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    session = Session(model, tokenizer, skip_first=skip_first)
    damage = Disturbed(model, 3e-5)  # so little that no token is routed to another expert
    components = [*(expert_output(2, e) for e in range(4)), experts_output(2)]
    questions = text_questions(session, segments)
    for direction in (RESTORE, DAMAGE):
        exact = patch(session, questions, damage, components, direction=direction)
        estimate = attribute(session, questions, damage, components, direction=direction).attributed
        from_here = exact.pruned if direction == RESTORE else exact.dense
        for number, component in enumerate(components):
            change = exact.exact[number].margin - from_here.margin
            assert np.abs(change).max() > 5e-6 or number < 4  # some expert may get a single token
            # norms compute in float32
            np.testing.assert_allclose(estimate[number], change, rtol=0.01, atol=1e-6, err_msg=component.label)
        np.testing.assert_allclose(sum(estimate[e] for e in range(4)), estimate[4], rtol=1e-6)
