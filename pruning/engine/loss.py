"""The loss of a whole model in memory, as what follows differentiates it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..models.anatomy import Anatomy
from .streams import decoder_labels, encoder_ids

#: Tokens per batch when the loss is differentiated: their full logits are held.
GRADIENT_TOKENS = 256
#: Time of a forward and a backward pass relative to a forward pass alone.
BACKWARD = 3


def token_loss(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """Return the mean token loss of some sequences, in float32.

    Parameters
    ----------
    anatomy
        Anatomy of the model.
    ids
        Token ids, ``[sequences, length]``. An encoder-decoder reads the first half of each and predicts the second.
    """
    model: Any = anatomy.model
    ids = ids.to(anatomy.device)
    if anatomy.encoder_decoder:
        output = model(input_ids=encoder_ids(ids), labels=decoder_labels(ids), use_cache=False)
    else:
        output = model(input_ids=ids, labels=ids, use_cache=False)
    loss: Tensor = output.loss
    return loss.float()


def predicted_tokens(anatomy: Anatomy, ids: Tensor) -> int:
    """Return the number of tokens that the loss averages over."""
    if anatomy.encoder_decoder:
        return decoder_labels(ids).numel()
    return ids.shape[0] * (ids.shape[1] - 1)


def checked_finite(loss: Tensor, advice: str = "check the checkpoint or its dtype") -> Tensor:
    """Return a loss, or raise ``ModelError`` with some advice if it is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise ModelError(f"the loss on the calibration text is not finite; {advice}")
    return loss


@contextmanager
def differentiable(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager in which parameters require gradients."""
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
