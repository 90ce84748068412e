"""Which kernels multiply float32 matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

#: Rounding inputs to bfloat16 makes an error of about 2e-3; a sum in another order less than 2e-6.
_ROUNDING = 1e-5


@contextmanager
def bfloat16_allowed(allowed: bool = True) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on a CPU, and convert them to bfloat16 where it has instructions for that.

    Without such instructions (AMX) they stay in float32. Does nothing if not `allowed`, or without oneDNN.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    if not allowed or before == "bf16" or not torch.backends.mkldnn.is_available():
        yield
        return
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices with oneDNN where that is as precise as PyTorch's default.

    By default PyTorch calls MKL, which does not use AVX-512 on AMD processors: there oneDNN is about twice as fast.
    The sums have another order, so results differ by rounding (6e-7 of a product at width 4096). Where oneDNN would
    convert to bfloat16, the default is kept. What is chosen depends on the processor only, never on a timing, so that
    a run that is continued computes as it did before.
    """
    with bfloat16_allowed(multiplies_with_onednn(device)):
        yield


def multiplies_with_onednn(device: torch.device) -> bool:
    """Whether :func:`fast_float32` changes anything on a device."""
    return device.type == "cpu" and _onednn_keeps_float32()


@cache
def _onednn_keeps_float32() -> bool:
    """Whether oneDNN multiplies float32 matrices on this machine without rounding them first."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 512, generator=generator)
    exact = linear(left.double(), right.double())
    with bfloat16_allowed():
        error = linear(left, right).double() - exact
    return bool(error.norm() < _ROUNDING * exact.norm())
