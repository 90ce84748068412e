"""The norms through which projections read the residual stream: their gains, their shift, and whether they centre."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ModelError

#: Size of the vectors that a norm is tried with: its epsilon is nothing beside it.
_LARGE = 1000.0
#: Largest difference from what a norm is taken for, relative to its output.
_ALIKE = 1e-3


@dataclass(frozen=True)
class Norm:
    """A norm as a function of the stream: ``gain * h / scale + shift``, h centred first if `centred`.

    Attributes
    ----------
    gain, shift
        Float32 ``[hidden]``.
    centred
        Whether the mean over the dimensions is subtracted, as by LayerNorm; RMSNorm does not.
    """

    gain: Tensor
    shift: Tensor
    centred: bool

    def __call__(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Apply it, without its epsilon."""
        hidden = hidden - hidden.mean(dim=-1, keepdim=True) if self.centred else hidden
        return self.gain * hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt() + self.shift


@torch.no_grad()
def norm_of(module: nn.Module, size: int, device: torch.device) -> Norm:
    """Return what a norm does, found by trying it: architectures store gains differently (Gemma's are 1 + weight).

    Parameters
    ----------
    module
        The norm; its parameters must be loaded.
    size
        Its number of inputs.
    device
        Where they are.

    Raises
    ------
    ModelError
        If it is not such a norm.
    """
    if isinstance(module, nn.LayerNorm):  # would not take float32 with 16-bit weights
        gain = torch.ones(size, device=device) if module.weight is None else module.weight.float()
        shift = torch.zeros(size, device=device) if module.bias is None else module.bias.float()
        return Norm(gain.clone(), shift.clone(), centred=True)
    if isinstance(module, nn.RMSNorm):  # nor does this one like to
        gain = torch.ones(size, device=device) if module.weight is None else module.weight.float()
        return Norm(gain.clone(), torch.zeros(size, device=device), centred=False)
    signs = torch.ones(size, device=device)
    signs[1::2] = -1
    if size % 2:
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0])  # their mean is 0 in any case
    shift = module(torch.zeros(1, 1, size, device=device)).float()[0, 0]
    spread = (signs.square().mean()).sqrt()
    gain = (module(_LARGE * signs[None, None]).float()[0, 0] - shift) / signs * spread
    level = module(torch.full((1, 1, size), _LARGE, device=device)).float()[0, 0] - shift
    found = Norm(gain, shift, centred=bool(level.norm() < gain.norm() / 2))
    trial = _LARGE * torch.arange(1, size + 1, device=device).float().sin() + _LARGE / 3
    expected = module(trial[None, None]).float()[0, 0]
    if not torch.isfinite(expected).all() or (found(trial) - expected).norm() > _ALIKE * expected.norm():
        raise ModelError(
            f'"{type(module).__name__}" is no norm with one scale per token, so that the part of its output that is '
            "language-specific is not known; leave specific out"
        )
    return found
