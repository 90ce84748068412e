"""A sweep's tensors are on the model's device, whatever it is."""

from __future__ import annotations

import pytest
import torch
from checkpoints import CORPUS, SHORT
from conftest import tiny_model
from standin import StandIn

from pruning import Anatomy, Recipe
from pruning.engine import Workspace, planned_jobs, sweep, workspace
from pruning.text.calibration import CalibrationText


@pytest.fixture
def text(tokenizer):
    return CalibrationText.draw(tokenizer, CORPUS, [SHORT])


def on_standin(kind):
    model = tiny_model(kind)
    model.config._experts_implementation = "eager"
    return model.to("standin")


@pytest.mark.parametrize("kind", ["llama", "mt5"])
def test_a_killed_sweep_goes_on_on_the_models_device(kind, text, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "CHECKPOINT_SECONDS", 0)
    jobs = planned_jobs([Recipe(method="wanda", sparsity=0.5)], [SHORT])
    calls: list[int] = []
    expected = sweep(Anatomy(tiny_model(kind)), jobs, text, batch_tokens=32, progress=calls.append)

    def kill(tokens: int) -> None:
        calls.pop()
        if len(calls) == 1:  # in the last block
            raise KeyboardInterrupt

    with StandIn(), torch.no_grad():
        anatomy = Anatomy(on_standin(kind))
        with pytest.raises(KeyboardInterrupt):
            sweep(anatomy, jobs, text, batch_tokens=32, workspace=Workspace(tmp_path / "w", "key"), progress=kill)
        again = Workspace(tmp_path / "w", "key")
        assert again.resumed() is not None
        found = sweep(anatomy, jobs, text, batch_tokens=32, workspace=again)
        for job in jobs:
            assert found(job).masks == expected(job).masks


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
