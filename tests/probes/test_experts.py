"""What is read of mixtures of experts: how tokens are routed, neurons that fire there, what each expert adds."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch

from probes import DENSE, Reader, Session, read_against_dense
from probes.readers.firing import FOLDS
from pruning import Anatomy, Recipe, prune

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
    assert (routed.sum(dim=2)[:, sparse] == 2 * read.tokens[:, None]).all()
    assert torch.equal(read.agreed[:, sparse].long(), 2 * read.tokens[:, None].expand(-1, len(sparse)))


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
