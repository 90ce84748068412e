"""Derivatives of the calibration loss of a whole dense model, for SNIP, GraSP and GBLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError
from ..models.anatomy import Anatomy
from ..projections import Key
from ..statistics import CURVATURE, GRADIENT, SLOPES
from .choosing import Derivatives, finite
from .loss import GRADIENT_TOKENS, checked_finite, differentiable, predicted_tokens, token_loss
from .streams import Progress

#: Smallest loss scale; a float16 model whose derivatives still overflow is refused.
_LOWEST = 2.0**-12


def derivatives_of(
    anatomy: Anatomy, pieces: Sequence[Tensor], needs: frozenset[str], *, progress: Progress = lambda tokens: None
) -> Derivatives:
    """Return the derivatives of the loss on some text that methods need.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model, which must be entirely in memory.
    pieces
        Token ids of the text, ``[sequences, length]`` each.
    needs
        Any of ``gradient``, ``curvature`` and ``slopes``.
    progress
        Called with the number of tokens after each batch, in every pass.

    Raises
    ------
    ModelError
        If the loss is not finite, or its derivatives overflow float16 at every scale.
    """
    found = Derivatives(sequences=sum(map(len, pieces)))
    if needs & {GRADIENT, CURVATURE}:
        batches = [batch for ids in pieces for batch in ids.split(max(1, GRADIENT_TOKENS // ids.shape[1]))]
        both = differentiate(anatomy, batches, curvature=CURVATURE in needs, progress=progress)
        found = replace(found, gradient=both.gradient, curvature=both.curvature)
    if SLOPES in needs:
        sequences = [sequence for ids in pieces for sequence in ids.split(1)]
        found = replace(found, slopes=slopes(anatomy, sequences, progress=progress))
    return found


def passes(needs: frozenset[str]) -> int:
    """Return how often text passes through the model for some derivatives."""
    return bool(needs & {GRADIENT, CURVATURE}) + (CURVATURE in needs) + (SLOPES in needs)


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
    tokens = sum(predicted_tokens(anatomy, ids) for ids in batches)
    scale = _Scale(parameters.values(), len(batches))

    def loss(ids: Tensor) -> Tensor:
        """Return a batch's share of the mean, scaled."""
        return checked_finite(_loss(anatomy, ids, twice=True)) * (scale.loss * predicted_tokens(anatomy, ids) / tokens)

    with differentiable(parameters):
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


def slopes(
    anatomy: Anatomy, sequences: Sequence[Tensor], *, progress: Progress = lambda tokens: None
) -> dict[Key, Tensor]:
    """Return the root mean square over sequences of the gradient of a sequence's mean token loss.

    Every sequence takes a backward pass of its own; one float32 sum per weight is held.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model, which must be entirely in memory.
    sequences
        Token ids, ``[1, length]`` each.
    progress
        Called with the number of tokens after each sequence.

    Returns
    -------
    dict
        ``(layer, role)`` to float32 ``[outputs, inputs]``.

    Raises
    ------
    ModelError
        If the loss is not finite, or its gradient overflows float16 at every scale.
    """
    parameters = anatomy.block_parameters()
    scale = _Scale(parameters.values(), 1)
    with differentiable(parameters):
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for ids in sequences:

            def slope(ids: Tensor = ids) -> dict[str, Tensor]:
                return _grad(checked_finite(_loss(anatomy, ids, twice=False)) * scale.loss, parameters)

            for name, part in scale.derived(slope).items():
                unscaled = part.float().mul_(1 / scale.loss)
                total[name].addcmul_(unscaled, unscaled)
            progress(ids.numel())
    with torch.no_grad():
        for value in total.values():
            value.div_(len(sequences)).sqrt_()
    return anatomy.by_projection(total)


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
        for name, part in self.derived(derive).items():
            total[name].add_(part, alpha=1 / (self.loss * self.direction))

    def derived(self, derive: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Compute derivatives, lowering the factors until none overflows; they are still scaled by both."""
        parts = derive()
        while self._narrow and not all(map(finite, parts.values())):
            if self.loss < _LOWEST:
                raise ModelError("the derivatives of the loss overflow float16; load the model with dtype bfloat16")
            self.loss, self.direction = self.loss / 2, min(self.direction, max(self.direction / 2, 1.0))
            parts = derive()
        return parts


def _grad(value: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    parts = torch.autograd.grad(value, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    return {name: part for name, part in zip(parameters, parts, strict=True) if part is not None}


def _loss(anatomy: Anatomy, ids: Tensor, *, twice: bool) -> Tensor:
    """Return the mean token loss, as a function that can be differentiated, or differentiated twice."""
    backend = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()  # the only one with second derivatives
    with torch.enable_grad(), backend:
        return token_loss(anatomy, ids)
