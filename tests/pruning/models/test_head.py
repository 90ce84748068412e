"""Logits for a loss are not rounded to 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model

from probes.readers.loss import log_likelihood
from pruning import Anatomy

DTYPES = [torch.bfloat16, torch.float16]
#: Plain, scaled, capped, divided, with scaled states, with a bias.
HEADS = ["llama", "cohere", "gemma2", "granite", "umt5", "phi"]


def anatomies(kind: str, dtype: torch.dtype) -> tuple[Anatomy, Anatomy, torch.Tensor]:
    """Return a 16-bit model, the same in float64, and final states whose logits are large."""
    settings = {"logits_scaling": 8.0} if kind == "granite" else {}
    narrow = tiny_model(kind, **settings).to(dtype)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 40
    return Anatomy(narrow), Anatomy(copy.deepcopy(narrow).double()), hidden.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_logits_for_a_loss_are_those_of_float64(kind, dtype):
    narrow, exact, hidden = anatomies(kind, dtype)
    wanted = exact.logits(hidden.double())
    assert narrow.precise_logits(hidden).dtype == torch.float32
    for vocabulary in (slice(None), slice(7, 90)):
        found = narrow.precise_logits(hidden, vocabulary).double()
        torch.testing.assert_close(found, wanted[:, vocabulary], rtol=1e-5, atol=1e-5)
    assert float((narrow.logits(hidden).double() - wanted).abs().max()) > 1e-4  # the model's own are rounded


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_a_float32_model_has_its_own_logits(kind):
    narrow, _, hidden = anatomies(kind, torch.float32)
    assert torch.equal(narrow.precise_logits(hidden), narrow.logits(hidden))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_likelihood_and_its_derivative_are_those_of_float64(dtype):
    narrow, exact, hidden = anatomies("llama", dtype)
    index, tokens = torch.tensor([0, 0, 3, 4]), torch.tensor([1, 299, 17, 0])
    found, wanted = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    likely = log_likelihood(narrow, found, index, tokens)
    expected = log_likelihood(exact, wanted, index, tokens)
    reference = exact.logits(wanted).log_softmax(dim=1)[index, tokens]
    torch.testing.assert_close(likely.double(), reference, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(log_likelihood(narrow, found, index, tokens), likely)
    likely.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-2, atol=1e-3)  # it is 16-bit


def test_products_elsewhere_keep_their_precision():
    before = torch.backends.mkldnn.matmul.fp32_precision
    narrow, _, hidden = anatomies("llama", torch.bfloat16)
    narrow.precise_logits(hidden)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
