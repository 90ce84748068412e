"""Fine-tuning of what a mask keeps: the last step of a recipe. All but :mod:`pruning.engine.recovering` is here.

What is trained, given the gradient of the loss for the weight of one projection, and which weight it stands for. Masks
are enforced by construction: removed weights have no value that could move.
"""

from __future__ import annotations

from ..errors import RecipeError, unknown
from ..parameters import NONE
from .fine_tune import FINE_TUNE
from .lora import LORA
from .registry import Recovery, Trained

_RECOVERIES = {r.name: r for r in (Recovery(NONE, "kept weights are not trained"), LORA, FINE_TUNE)}


def recovery_named(name: str) -> Recovery:
    """Return the recovery called `name`; that called ``none`` does nothing.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name not in _RECOVERIES:
        raise RecipeError(unknown("recover", name, _RECOVERIES))
    return _RECOVERIES[name]


__all__ = ["NONE", "Recovery", "Trained", "recovery_named"]
