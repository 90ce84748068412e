"""A sweep's tensors are on the model's device, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import CORPUS, SHORT
from conftest import tiny_model
from standin import StandIn, on_standin

from pruning import Anatomy, Recipe, known_methods
from pruning.engine import Workspace, planned_jobs, sweep, workspace
from pruning.methods import method_named
from pruning.text.calibration import CalibrationSet, CalibrationText

MIX = CalibrationSet(name="en+sw", languages=("en", "sw"), samples=SHORT.samples, length=SHORT.length)
RECIPES = [
    *(
        Recipe(method=method, **({"bits": 4, "group": 8} if method_named(method).quantize else {"sparsity": 0.5}))
        for method in known_methods()
    ),
    *(Recipe(method="wanda", sparsity=0.5, pattern=pattern) for pattern in ("matrix", "model", "2:4")),
    Recipe(method="sparsegpt", pattern="2:4"),
    Recipe(method="sparsegpt", sparsity=0.5, pattern="model"),
    Recipe(method="wanda", sparsity=0.5, refinement="swaps", correction="admm"),
    Recipe(
        method="snip",
        sparsity=0.5,
        pattern="2:4",
        refinement="swaps",
        correction="least-squares",
        parameters={"ridge": 0.001},
    ),
    Recipe(method="wanda", sparsity=0.5, allocation="owl"),
    Recipe(method="wanda", sparsity=0.5, allocation="cross-lingual", propagation="dense"),
]


def eager(kind: str) -> Any:
    model = tiny_model(kind)
    model.config._experts_implementation = "eager"  # the other ones look at the kind of device
    return model


FEW = [recipe for recipe in RECIPES if recipe.method in ("wanda", "sparsegpt", "snip")][:3]


@pytest.mark.parametrize(
    ("kind", "recipes"),
    [("llama", RECIPES), ("gpt_neox", FEW), ("mixtral", FEW), ("mt5", FEW)],
    ids=lambda x: str(x)[:8],
)
def test_methods_prune_on_the_models_device_as_on_the_cpu(kind, recipes, tokenizer):
    text = CalibrationText.draw(tokenizer, CORPUS, [MIX])
    jobs = planned_jobs(recipes, [MIX])
    expected = sweep(Anatomy(eager(kind)), jobs, text, batch_tokens=64)
    with StandIn():
        found = sweep(Anatomy(on_standin(eager(kind))), jobs, text, batch_tokens=64)
    assert not found.set_aside
    for job in jobs:
        assert found(job).masks == expected(job).masks, job.id
        values, wanted = found(job).values, expected(job).values
        assert values.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(values[key], wanted[key], rtol=1e-3, atol=1e-4)
        codes, wanted_codes = found(job).codes, expected(job).codes
        assert set(codes) == set(wanted_codes)
        for key in wanted_codes:
            weights = (of[key].unpacked().weight() for of in (codes, wanted_codes))
            torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mt5"])
def test_a_killed_sweep_goes_on_on_the_models_device(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "CHECKPOINT_SECONDS", 0)
    text = CalibrationText.draw(tokenizer, CORPUS, [SHORT])
    jobs = planned_jobs([Recipe(method="wanda", sparsity=0.5)], [SHORT])
    calls: list[int] = []
    expected = sweep(Anatomy(tiny_model(kind)), jobs, text, batch_tokens=32, progress=calls.append)

    def kill(tokens: int) -> None:
        calls.pop()
        if len(calls) == 1:  # in the last block
            raise KeyboardInterrupt

    with StandIn():
        anatomy = Anatomy(on_standin(tiny_model(kind)))
        with pytest.raises(KeyboardInterrupt):
            sweep(anatomy, jobs, text, batch_tokens=32, workspace=Workspace(tmp_path / "w", "key"), progress=kill)
        again = Workspace(tmp_path / "w", "key")
        assert again.resumed() is not None
        found = sweep(anatomy, jobs, text, batch_tokens=32, workspace=again)
    assert all(found(job).masks == expected(job).masks for job in jobs)


@pytest.mark.parametrize("states", ["device", "host", "disk"])
def test_states_wait_where_they_are_told_to(states, tmp_path):
    place = Workspace(tmp_path / "w", "key", states=states)
    with StandIn():
        shelf = place.shelf(1, "en", "hidden", 2)
        batches = [torch.randn(2, 3), torch.randn(1, 3)]
        for batch in batches:
            shelf.add(batch.to("standin"))
        waiting = shelf.done()
        assert {batch.device.type for batch in waiting} == {"standin" if states == "device" else "cpu"}
        assert all(torch.equal(one.cpu(), other) for one, other in zip(waiting, batches, strict=True))
