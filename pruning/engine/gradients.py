"""Derivatives of the calibration loss of a whole dense model, for SNIP and GraSP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError
from ..models.anatomy import Anatomy
from .choosing import Derivatives, finite
from .streams import Progress, decoder_labels, encoder_ids

#: Smallest loss scale; a float16 model whose derivatives still overflow is refused.
_LOWEST = 2.0**-12


def differentiate(
    anatomy: Anatomy, batches: Sequence[Tensor], *, curvature: bool, progress: Progress = lambda tokens: None
) -> Derivatives:
    """Return the gradient of the mean token loss and, if requested, the Hessian-gradient product.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model, which must be entirely in memory.
    batches
        Token ids, ``[blocks, length]`` each; keep them small, since full logits are held.
    curvature
        Whether to make a second pass over the text for ``H g``, by double backward.
    progress
        Called with the number of tokens after each batch, in both passes.

    Raises
    ------
    ModelError
        If the loss is not finite, or its derivatives overflow float16 at every scale.
    """
    parameters = anatomy.block_parameters()
    tokens = sum(_predicted(anatomy, ids) for ids in batches)
    scale = _Scale(parameters.values(), len(batches))

    def loss(ids: Tensor) -> Tensor:
        """Return a batch's share of the mean, scaled."""
        mean = _loss(anatomy, ids)
        if not bool(torch.isfinite(mean)):
            raise ModelError("the loss on the calibration text is not finite; check the checkpoint or its dtype")
        return mean * (scale.loss * _predicted(anatomy, ids) / tokens)

    with _differentiable(parameters):
        gradient = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

        def slope(ids: Tensor) -> dict[str, Tensor]:
            return _grad(loss(ids), parameters)

        def bend(ids: Tensor) -> dict[str, Tensor]:
            with_graph = _grad(loss(ids), parameters, create_graph=True)
            flow = torch.stack([(g.float() * gradient[name]).sum() for name, g in with_graph.items()]).sum()
            return _grad(flow * scale.direction, parameters)

        for ids in batches:
            scale.add(gradient, partial(slope, ids))
            progress(ids.numel())
        product = {name: torch.zeros_like(g) for name, g in gradient.items()} if curvature else {}
        if curvature:
            scale.adapt(gradient.values())
        for ids in batches if curvature else ():
            scale.add(product, partial(bend, ids))
            progress(ids.numel())
    return Derivatives(anatomy.by_projection(gradient), anatomy.by_projection(product))


class _Scale:
    """Loss scaling for float16, in which most derivatives would otherwise underflow to zero.

    The loss is multiplied by a power of two, which is divided out again in float32; so is the direction along which
    GraSP differentiates the gradient. Whenever a derivative overflows, both factors are lowered. Other dtypes have the
    range of float32 and are not scaled.

    Attributes
    ----------
    loss, direction
        The current factors.
    """

    def __init__(self, parameters: Iterable[Tensor], batches: int) -> None:
        self._narrow = any(parameter.dtype == torch.float16 for parameter in parameters)
        self.loss = 2.0 ** (12 + batches.bit_length()) if self._narrow else 1.0  # a batch has a share of the mean
        self.direction = 1.0

    def adapt(self, direction: Iterable[Tensor]) -> None:
        """Scale a direction so that its largest value is close to 1."""
        if self._narrow:
            largest = float(torch.stack([part.abs().amax() for part in direction]).amax())
            self.direction = 2.0 ** -math.frexp(largest)[1]

    def add(self, total: Mapping[str, Tensor], derive: Callable[[], Mapping[str, Tensor]]) -> None:
        """Compute derivatives under the current factors, and add them to float32 sums."""
        parts = derive()
        while self._narrow and not all(map(finite, parts.values())):
            if self.loss < _LOWEST:
                raise ModelError("the derivatives of the loss overflow float16; load the model with dtype bfloat16")
            self.loss, self.direction = self.loss / 2, min(self.direction, max(self.direction / 2, 1.0))
            parts = derive()
        for name, part in parts.items():
            total[name].add_(part, alpha=1 / (self.loss * self.direction))


def _grad(value: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    parts = torch.autograd.grad(value, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    return {name: part for name, part in zip(parameters, parts, strict=True) if part is not None}


def _loss(anatomy: Anatomy, ids: Tensor) -> Tensor:
    model: Any = anatomy.model
    ids = ids.to(anatomy.device)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only backend that can be differentiated twice
        if anatomy.encoder_decoder:
            output = model(input_ids=encoder_ids(ids), labels=decoder_labels(ids), use_cache=False)
        else:
            output = model(input_ids=ids, labels=ids, use_cache=False)
    loss: Tensor = output.loss
    return loss.float()


def _predicted(anatomy: Anatomy, ids: Tensor) -> int:
    """Return the number of tokens that the loss averages over."""
    if anatomy.encoder_decoder:
        return decoder_labels(ids).numel()
    return ids.shape[0] * (ids.shape[1] - 1)


@contextmanager
def _differentiable(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
