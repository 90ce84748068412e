"""Derivatives of the loss in float16, where most of them are below what it can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model

from pruning import Anatomy
from pruning.engine.gradients import derivatives_of, differentiate, passes
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


@pytest.mark.parametrize("kind", ["llama", "mixtral", "mt5"])
def test_slopes_are_those_of_every_sequence_by_itself(kind):
    model = tiny_model(kind).double()
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    anatomy = Anatomy(model)
    found = derivatives_of(anatomy, BATCHES[:2], frozenset({"slopes"}))
    assert found.sequences == 8
    parameters = anatomy.block_parameters()
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for row in torch.cat(BATCHES[:2]):
        inputs = (
            {"input_ids": row[None, :8], "labels": row[None, 8:]}
            if kind == "mt5"
            else {"input_ids": row[None], "labels": row[None]}
        )
        model.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2 / 8
    for key, expected in anatomy.by_projection(squares).items():
        torch.testing.assert_close(found.slopes[key].double(), expected.sqrt(), rtol=1e-4, atol=1e-9)


def test_slopes_in_float16_are_those_of_float64():
    """The gradient of this loss, times 1e-5, underflows in float16 unless it is scaled."""
    narrow, exact = (
        derivatives_of(Anatomy(quiet(tiny_model().to(torch.float16).to(dtype))), BATCHES, frozenset({"slopes"}))
        for dtype in (torch.float16, torch.float64)
    )
    for key, value in exact.slopes.items():
        assert narrow.slopes[key].dtype == torch.float32
        assert float((narrow.slopes[key] - value).norm() / value.norm()) < 0.02, key


def quiet(model: Any) -> Any:
    model.lm_head.weight.data *= 1e-3
    return model


def test_text_passes_once_for_every_derivative_needed():
    anatomy, passed = Anatomy(tiny_model()), []
    for needs in ({"gradient"}, {"curvature"}, {"slopes"}, {"gradient", "slopes"}, {"curvature", "slopes"}):
        found = derivatives_of(anatomy, BATCHES, frozenset(needs), progress=passed.append)
        assert sum(passed) == passes(frozenset(needs)) * 8 * 4 * 16
        assert bool(found.slopes) == ("slopes" in needs)
        assert bool(found.curvature) == ("curvature" in needs)
        passed.clear()


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
