"""What a recovery is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..parameters import Parameter

#: What every recovery has, besides its own parameters and the learning rate.
SHARED = {
    "steps": Parameter(200, 1, 1_000_000, "steps of AdamW", whole=True),
    "batch": Parameter(8, 1, 100_000, "sequences a step", whole=True),
    "decay": Parameter(0, 0, 1, "AdamW's weight decay"),
}


@runtime_checkable
class Trained(Protocol):
    """What is trained of one projection, and the weight that it stands for.

    Masks are given anew each time, so that they can be stored with eight weights per byte.
    """

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves, in float32."""

    def weight(self, mask: Bool[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """Return the weight that the model computes with, in float32, zero where it was removed."""

    def take(self, gradient: Float[Tensor, "outputs inputs"], mask: Bool[Tensor, "outputs inputs"]) -> None:
        """Add to the parameters' gradients what the gradient of the loss for the weight makes of them."""


@dataclass(frozen=True)
class Recovery:
    """A way of fine-tuning the kept weights.

    Attributes
    ----------
    name
        As written in a recipe.
    source
        The publication that defines it.
    start
        ``start(weight, mask, seed, **parameters)`` returns a :class:`Trained` for a projection, given its kept weights
        (whatever the removed ones are), its mask, and a seed for what is drawn at random.
    parameters
        What a recipe may set, all with their defaults.
    own
        Names of the parameters that `start` takes.
    """

    name: str
    source: str
    start: Callable[..., Trained] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    own: tuple[str, ...] = ()


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to a parameter's gradient."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
