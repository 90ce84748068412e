"""The stand-in for a GPU refuses what a GPU refuses, and says what makes one wait."""

from __future__ import annotations

import pytest
import torch
from standin import DEVICE, StandIn


@pytest.fixture
def device():
    with StandIn() as device:
        yield device


MIXED = {
    "add": lambda there, here: there + here,
    "cat": lambda there, here: torch.cat([there, here]),
    "in place": lambda there, here: here.add_(there),
    "where": lambda there, here: torch.where(there > 0, there, here),
    "masked fill": lambda there, here: there.masked_fill(here > 0, 0),
    "product": lambda there, here: there[None] @ here[:, None],
    "index by a tensor there": lambda there, here: here[there.long()],
    "numpy": lambda there, here: there.numpy(),
}


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(device, name):
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    with pytest.raises((RuntimeError, TypeError), match="standin"):
        MIXED[name](there, here)


def test_what_is_made_there_or_of_what_is_there_is_there(device):
    there = torch.arange(4.0, device=DEVICE)
    for tensor in (
        there[1:],
        there * torch.tensor(2.0),  # a number may be anywhere
        there[torch.tensor([0, 2])],
        torch.tensor([1, 2], device=DEVICE),
        torch.ones(2).to(there),
        torch.zeros_like(there),
        there.new_zeros(2),
    ):
        assert tensor.device == DEVICE
    there[1:].add_(1)  # views share their memory
    assert there.cpu().tolist() == [0, 2, 3, 4]
    assert there.cpu().device.type == "cpu"


def test_what_makes_the_host_wait_is_counted(device):
    there = torch.ones(3, device=DEVICE)
    there * 2 + there.sum()
    assert not device.syncs
    assert float(there.sum()) == 3
    there.cpu()
    there[there > 0]
    assert device.syncs.total() == 3
