"""Derivatives of the loss in float16, where most of them are below what it can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model

from pruning import Anatomy
from pruning.engine.gradients import differentiate
from pruning.errors import ModelError

BATCHES = list(torch.randint(3, 250, (8, 4, 16), generator=torch.Generator().manual_seed(3)))


def derivatives(kind: str, dtype: torch.dtype, *, alter: Any = lambda model: None) -> Any:
    model = tiny_model(kind).to(torch.float16).to(dtype)  # the same weights in any dtype
    alter(model)
    return differentiate(Anatomy(model), BATCHES, curvature=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mt5"])
def test_float16_has_the_derivatives_of_float64(kind):
    narrow, exact = derivatives(kind, torch.float16), derivatives(kind, torch.float64)
    for found, wanted, tolerance in (
        (narrow.gradient, exact.gradient, 0.01),
        (narrow.curvature, exact.curvature, 0.03),
    ):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == torch.float32
            assert float((found[key] - value).norm() / value.norm()) < tolerance, key
            assert int((found[key] == 0).sum()) <= int((value == 0).sum()), key


def steep(model: Any) -> None:
    """Make the loss change so fast with the last block's weights that float16 overflows at the first scale."""
    model.lm_head.weight.data *= 60


def test_the_scale_is_lowered_where_derivatives_overflow():
    narrow, exact = (derivatives("llama", dtype, alter=steep) for dtype in (torch.float16, torch.float64))
    for key, value in exact.gradient.items():
        assert float((narrow.gradient[key] - value).norm() / value.norm()) < 0.05, key


def test_a_model_whose_derivatives_are_beyond_float16_is_refused(monkeypatch):
    monkeypatch.setattr("pruning.engine.gradients.finite", lambda values: False)
    with pytest.raises(ModelError, match="derivatives of the loss overflow float16; load the model"):
        derivatives("llama", torch.float16)
