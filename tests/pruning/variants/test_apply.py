"""A pruned weight is the dense one where it is kept, bit for bit, and positive zero elsewhere, whatever the storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import StandIn

from pruning.variants import apply
from pruning.variants.apply import write_pruned
from pruning.variants.masks import pack_bits, unpack_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def case(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0):
    """A weight with values of every kind, its mask, and the corrected values of what is kept."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(outputs, inputs, generator=generator).to(dtype)
    dense.view(-1)[:: max(1, dense.numel() // 5)] = torch.tensor(-0.0)
    dense[0, -1] = torch.inf
    mask = torch.rand(outputs, inputs, generator=generator) < 0.5
    return dense, mask, torch.randn(int(mask.sum()), generator=generator).to(dtype)


def bits(weight: torch.Tensor) -> np.ndarray:
    return weight.contiguous().view(torch.uint8).numpy()


def expected(dense, mask, values=None):
    result = torch.zeros_like(dense)
    result[mask] = dense[mask] if values is None else values
    return result


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that tiny matrices are cut, too, and not evenly."""
    monkeypatch.setattr(apply, "_PIECE", 7)
    monkeypatch.setattr(apply, "_UNPACKED", 50)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_a_pruned_weight_is_the_dense_one_where_it_is_kept(outputs, inputs, dtype, corrected, seed):
    dense, mask, values = case(outputs, inputs, dtype, seed)
    given_values = values if corrected else None
    out = torch.full_like(dense, 7)
    write_pruned(dense, pack_bits(mask).numpy(), out, given_values)
    assert np.array_equal(bits(out), bits(expected(dense, mask, given_values)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("place", ["transposed", "rows of a larger one", "columns of a larger one", "itself"])
def test_a_weight_may_be_written_to_any_storage(place, corrected, dtype):
    dense, mask, values = case(6, 16, dtype)
    large = torch.full((20, 20), 7, dtype=dtype)
    out = {
        "transposed": large[:16, :6].T,
        "rows of a larger one": large.view(-1)[: 12 * 16].view(12, 16)[3:9],
        "columns of a larger one": large[:6, 2:18],
        "itself": dense.clone(),
    }[place]
    source = out if place == "itself" else dense
    given_values = values if corrected else None
    wanted = expected(dense, mask, given_values)
    write_pruned(source, pack_bits(mask).numpy(), out, given_values)
    assert np.array_equal(bits(out), bits(wanted))
    if place != "itself":
        assert int((large == 7).sum()) == large.numel() - out.numel() + int((wanted == 7).sum())


def test_a_live_parameter_is_written_in_place():
    dense, mask, _ = case(6, 16, torch.float32)
    parameter = torch.nn.Parameter(torch.zeros(6, 16))
    write_pruned(dense, pack_bits(mask).numpy(), parameter)
    assert torch.equal(parameter, expected(dense, mask))
    assert parameter.requires_grad
    assert parameter.grad_fn is None


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_bits_are_packed_and_unpacked_alike_on_every_device(outputs, inputs, seed):
    _, mask, _ = case(outputs, inputs, torch.float32, seed)
    packed = pack_bits(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1))
    assert torch.equal(pack_bits_of_another_device(mask), packed)
    assert torch.equal(unpack_bits(packed, inputs), mask)


def pack_bits_of_another_device(mask: torch.Tensor) -> torch.Tensor:
    from pruning.variants import masks

    return masks._pack_there(mask)


@pytest.mark.parametrize("shape", [(6, 16), (5, 13)])
@pytest.mark.parametrize("corrected", [False, True])
def test_on_another_device_bits_travel_and_nothing_comes_back(shape, corrected):
    dense, mask, values = case(*shape, torch.float32)
    packed, given_values = pack_bits(mask).numpy(), values if corrected else None
    with StandIn() as device:
        there, out = dense.to("standin"), torch.full(shape, 7.0, device="standin")
        device.syncs.clear()
        write_pruned(there, packed, out, given_values)
        assert not device.syncs
        assert torch.equal(pack_bits(mask.to("standin")), torch.from_numpy(packed))
        assert np.array_equal(bits(out.cpu()), bits(expected(dense, mask, given_values)))
