"""Float32 products on a CPU: oneDNN where it is precise, and the default everywhere else."""

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

from probes import Session
from probes.readers.keep import Keep
from pruning import Segment
from pruning.models import arithmetic
from pruning.models.arithmetic import bfloat16_allowed, fast_float32, multiplies_with_onednn

PRODUCTS = torch.backends.mkldnn.matmul
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def decide_anew():
    arithmetic._onednn_keeps_float32.cache_clear()
    yield
    arithmetic._onednn_keeps_float32.cache_clear()


def test_products_are_as_precise_as_by_default():
    left, right = torch.randn(64, 4096), torch.randn(128, 4096)
    exact = left.double() @ right.double().T
    with fast_float32(CPU):
        error = (left @ right.T).double() - exact
    assert error.norm() / exact.norm() < 2e-6


def test_onednn_is_not_used_where_it_rounds(monkeypatch, decide_anew):
    def rounding(left, right):
        if PRODUCTS.fp32_precision == "bf16" and left.dtype == torch.float32:
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return torch.nn.functional.linear(left, right)

    monkeypatch.setattr(arithmetic, "linear", rounding)
    assert not multiplies_with_onednn(CPU)
    before = PRODUCTS.fp32_precision
    with fast_float32(CPU):
        assert PRODUCTS.fp32_precision == before


def test_onednn_is_used_where_it_keeps_float32(monkeypatch, decide_anew):
    monkeypatch.setattr(
        arithmetic,
        "linear",
        lambda left, right: (
            left @ right.T if left.dtype == torch.float64 else (left.double() @ right.double().T).float()
        ),
    )
    with fast_float32(CPU):
        assert PRODUCTS.fp32_precision == "bf16"


def test_other_devices_keep_their_arithmetic():
    before = PRODUCTS.fp32_precision
    assert not multiplies_with_onednn(torch.device("cuda"))
    with fast_float32(torch.device("cuda")):
        assert PRODUCTS.fp32_precision == before


def test_the_setting_is_restored_after_an_error():
    before = PRODUCTS.fp32_precision
    with pytest.raises(KeyError), bfloat16_allowed():
        assert PRODUCTS.fp32_precision == "bf16"
        raise KeyError
    assert PRODUCTS.fp32_precision == before


def test_a_model_is_read_with_fast_products(monkeypatch):
    monkeypatch.setattr(arithmetic, "_onednn_keeps_float32", lambda: True)
    session = Session(tiny_model("llama"), tiny_tokenizer())
    [batch] = session.batches([Segment("one", "some words to read")])
    seen = []

    class Looking(Keep):
        def read(self, *arguments):
            seen.append(PRODUCTS.fp32_precision)
            super().read(*arguments)

    session.read(batch, [Looking({"residual"})])
    with session.differentiable():
        seen.append(PRODUCTS.fp32_precision)
    assert seen
    assert set(seen) == {"bf16"}
    assert PRODUCTS.fp32_precision != "bf16"
