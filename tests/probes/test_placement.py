"""What reads and patches a model keeps its tensors on the model's device, whatever it is."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CORPUS, checkpoint
from conftest import tiny_model
from standin import DEVICE, StandIn, on_standin

from probes import (
    DENSE,
    FittingStream,
    HeldoutStream,
    Item,
    QuestionStream,
    Session,
    item_questions,
    plan_reading,
    read_streams,
)
from probes.batches import Batch
from probes.patching import (
    DAMAGE,
    RESTORE,
    DamagedModel,
    attribute,
    neurons,
    patch,
    residual,
    role_output,
    role_weights,
    stream_part,
)
from probes.readers.firing import NeuronFiring, neuron_places
from probes.readers.hidden_states import PooledStates
from probes.readers.routing import KeepAdded, RouterChoices
from probes.readers.signal import SIGNAL_SITES, SignalError, SignalPower
from probes.routing import Routed
from pruning import Anatomy, CalibrationSet, Recipe, prune
from pruning.models.checkpoint import Shards, checked_plan
from pruning.models.streaming import open_streamed

ITEMS = [
    Item(id="1", prompt="The cat sat on the", choices=(" mat", " hat"), answer=0),
    Item(id="2", prompt="Bei Nacht sind alle Katzen", choices=(" grau.", " rot.", " g"), answer=0),
]
RECIPES = [Recipe(method="magnitude", sparsity=0.5), Recipe(method="sparsegpt", sparsity=0.5)]
EN = CalibrationSet.named("en", samples=4, length=16)


def variants(kind, tokenizer):
    return prune(tiny_model(kind), tokenizer, RECIPES, CORPUS, EN)


def read(
    model: Any, tokenizer: Any, made: Any, segments: Any, *, states_on_host: bool = False, **settings: Any
) -> dict[str, Any]:
    session = Session(model, tokenizer, batch_tokens=64, **settings)
    ids = [variant.id for variant in made]
    heldout, fitting = HeldoutStream(session, segments, ids), FittingStream(session, segments)
    asked = QuestionStream(session, item_questions(session, ITEMS), [DENSE, *ids])
    streams = [heldout, fitting, asked]
    plan = replace(plan_reading(session, streams, trial=False), states_on_host=states_on_host)
    read_streams(session, streams, {one.id: one for one in made}, plan)
    found: dict[str, Any] = {"means": fitting.means} | {
        f"{model} scores": torch.from_numpy(score.values) for model, score in asked.scores.items()
    }
    for name, readings in heldout.readings.items():
        found |= {f"{name} {field.name}": getattr(readings, field.name) for field in fields(readings)}
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "opt", "mt5"])
def test_reading_on_the_models_device_is_reading_on_the_cpu(kind, padding, tokenizer, segments):
    made = variants(kind, tokenizer)
    expected = read(tiny_model(kind), tokenizer, made, segments, padding=padding)
    with StandIn():
        there = on_standin(tiny_model(kind))
        found = read(there, tokenizer, made, segments, padding=padding, states_on_host=padding == "left")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_readers_of_blocks_do_not_make_a_device_wait():
    batch = Batch((0, 1), *(torch.ones(2, 5, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float32)))
    readers = {
        "activation": [NeuronFiring(torch.zeros(8, 3, 48, dtype=torch.int32))],
        "residual": [
            PooledStates(torch.zeros(3, 2, 48)),
            SignalPower([torch.zeros(2, 3, len(SIGNAL_SITES), dtype=torch.float64)]),
            SignalError([torch.zeros(2, 3, len(SIGNAL_SITES), dtype=torch.float64)]),
        ],
    }
    with StandIn() as device:
        there = replace(batch, **{name: getattr(batch, name).to(DEVICE) for name in ("ids", "real", "counted")})
        value = torch.randn(2, 5, 48, device=DEVICE)
        for site, some in readers.items():
            for reader in some:
                reader.read(0, site, value, there, value * 2)
                reader.read(1, site, value, there, value * 2)
        assert not device.syncs
        for some in readers.values():
            for reader in some:
                reader.flush()
        assert device.syncs.total() == 5  # one for each, and one more for the counts of the second block


def test_readers_of_experts_make_a_device_wait_once():
    batch = Batch((0, 1), *(torch.ones(2, 5, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float32)))
    with StandIn() as device:
        there = replace(batch, **{name: getattr(batch, name).to(DEVICE) for name in ("ids", "real", "counted")})
        anatomy = Anatomy(on_standin(tiny_model("mixtral")))
        chosen = (torch.arange(20) % 4).view(10, 2).to(DEVICE)
        routed = Routed(anatomy, 0, torch.randn(10, 32, device=DEVICE), chosen, torch.ones(10, 2, device=DEVICE))
        places = neuron_places(anatomy)
        counts, agreed = torch.zeros(2, 3, 4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
        readers = [
            NeuronFiring(torch.zeros(8, 3, 4 * 48, dtype=torch.int32), places),
            RouterChoices(counts, agreed, {}, reference=True),
            KeepAdded({0}),
        ]
        device.syncs.clear()
        for reader in readers:
            reader.read(0, "routing", routed, there)
        assert device.syncs.total() == 1  # how many tokens each expert has
        for reader in readers:
            reader.flush()
        assert device.syncs.total() == 3
    assert counts[:, 0].tolist() == [[3, 3, 2, 2], [2, 2, 3, 3]]  # of five tokens each, that take turns
    assert agreed[:, 0].tolist() == [10, 10]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mt5"])
def test_a_streamed_model_is_pruned_and_read_on_its_device_as_on_the_cpu(kind, tmp_path, tokenizer, segments):
    shards = Shards(checkpoint(tmp_path, kind))

    def run(place: torch.device) -> dict[str, Any]:
        model = open_streamed(shards, checked_plan(shards), torch.float32, place)
        model.config._experts_implementation = "eager"
        made = prune(model, tokenizer, RECIPES, CORPUS, EN)
        return read(model, tokenizer, made, segments)

    expected = run(torch.device("cpu"))
    with StandIn():
        found = run(DEVICE)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)


def components(anatomy: Any) -> list[Any]:
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(0))).Q
    return [
        residual(1),
        stream_part("specific", 0, basis),
        stream_part("agnostic", 0, basis, outside=True),
        role_output(1, "down"),
        role_output(1, "q"),
        role_weights(2, "gate" if anatomy.has_gate(2) else "up"),
        neurons("neurons", anatomy, {0: torch.tensor([3, 5]), 2: torch.tensor([1])}),
    ]


@pytest.mark.parametrize("direction", [RESTORE, DAMAGE])
@pytest.mark.parametrize("measure", [patch, attribute])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "mt5"])
def test_patching_on_the_models_device_is_patching_on_the_cpu(kind, measure, direction, tokenizer):
    made = variants(kind, tokenizer)[1]

    def run(model: Any) -> Any:
        session = Session(model, tokenizer, batch_tokens=64)
        questions = item_questions(session, ITEMS)
        damage = DamagedModel(session.owner, made)
        return measure(session, questions, damage, components(session.anatomy), direction=direction)

    expected = run(tiny_model(kind))
    with StandIn():
        found = run(on_standin(tiny_model(kind)))
    np.testing.assert_allclose(found.pruned.values, expected.pruned.values, rtol=1e-4)
    assert found.exact.keys() == expected.exact.keys()
    assert found.attributed.keys() == expected.attributed.keys()
    for i, scores in expected.exact.items():
        np.testing.assert_allclose(found.exact[i].values, scores.values, rtol=1e-4)
    for i, effect in expected.attributed.items():
        np.testing.assert_allclose(found.attributed[i], effect, rtol=1e-3, atol=1e-4)
