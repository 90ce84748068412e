"""Derivatives of the calibration loss of a whole dense model, for SNIP and GraSP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError
from ..models.anatomy import Anatomy
from .choosing import Derivatives
from .streams import Progress, decoder_labels, encoder_ids


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
        If the loss is not finite.
    """
    parameters = anatomy.block_parameters()
    tokens = sum(_predicted(anatomy, ids) for ids in batches)
    with _differentiable(parameters):
        gradient = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for ids in batches:
            loss = _loss(anatomy, ids) * (_predicted(anatomy, ids) / tokens)
            if not bool(torch.isfinite(loss)):
                raise ModelError("the loss on the calibration text is not finite; check the checkpoint or its dtype")
            for name, part in _grad(loss, parameters).items():
                gradient[name] += part
            progress(ids.numel())
        product = {name: torch.zeros_like(g) for name, g in gradient.items()} if curvature else {}
        for ids in batches if curvature else ():
            loss = _loss(anatomy, ids) * (_predicted(anatomy, ids) / tokens)
            with_graph = _grad(loss, parameters, create_graph=True)
            flow = torch.stack([(g.float() * gradient[name]).sum() for name, g in with_graph.items()]).sum()
            for name, part in _grad(flow, parameters).items():
                product[name] += part
            progress(ids.numel())
    return Derivatives(anatomy.by_projection(gradient), anatomy.by_projection(product))


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
