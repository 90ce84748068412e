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

#: A float16 model whose derivatives overflow even with so small a loss is refused.
_LOWEST = 2.0**-12


def differentiate(
    anatomy: Anatomy, batches: Sequence[Tensor], *, curvature: bool, progress: Progress = lambda tokens: None
) -> Derivatives:
    """Return the gradient of the mean token loss, and if asked the Hessian times that gradient.

    Parameters
    ----------
    anatomy
        Of the dense model, which must be in memory as a whole.
    batches
        Token ids, ``[blocks, length]`` each; small ones, since whole logits are held.
    curvature
        Whether to go over the text once more for ``H g``, by double backward.
    progress
        Told of the tokens, twice with `curvature`.

    Raises
    ------
    ModelError
        If the loss is not finite, or its derivatives are not within the range of float16 in any scale.
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
    """Keeps derivatives within the range of float16, where most of them would be zero.

    The loss is multiplied by a power of two, which is divided out again in float32; so is the direction along which
    GraSP differentiates the gradient. Whenever a derivative overflows, both are lowered. Other dtypes have the range
    of float32 and are left alone.

    Attributes
    ----------
    loss, direction
        The present factors.
    """

    def __init__(self, parameters: Iterable[Tensor], batches: int) -> None:
        self._narrow = any(parameter.dtype == torch.float16 for parameter in parameters)
        self.loss = 2.0 ** (12 + batches.bit_length()) if self._narrow else 1.0  # a batch has a share of the mean
        self.direction = 1.0

    def adapt(self, direction: Iterable[Tensor]) -> None:
        """Bring the largest value of a direction near 1."""
        if self._narrow:
            largest = float(torch.stack([part.abs().amax() for part in direction]).amax())
            self.direction = 2.0 ** -math.frexp(largest)[1]

    def add(self, total: Mapping[str, Tensor], derive: Callable[[], Mapping[str, Tensor]]) -> None:
        """Add derivatives by every parameter, worked out under the present factors, to float32 sums."""
        parts = derive()
        while self._narrow and not all(map(finite, parts.values())):
            if self.loss < _LOWEST:
                raise ModelError("the loss has no derivatives within the range of float16; load the model as bfloat16")
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
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        if anatomy.encoder_decoder:
            output = model(input_ids=encoder_ids(ids), labels=decoder_labels(ids), use_cache=False)
        else:
            output = model(input_ids=ids, labels=ids, use_cache=False)
    loss: Tensor = output.loss
    return loss.float()


def _predicted(anatomy: Anatomy, ids: Tensor) -> int:
    """Return over how many tokens the loss is a mean."""
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
