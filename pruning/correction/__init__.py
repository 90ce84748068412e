"""What may follow the choice of a mask: refining it, and correcting the kept weights. Both look at the inputs only.

A refiner exchanges kept and pruned weights whose values stay the dense ones; a corrector then updates the kept weights,
or the biases of neurons.
"""

from __future__ import annotations

from ..errors import RecipeError, unknown
from ..parameters import NONE
from .admm import ADMM
from .dsnot import DSNOT
from .firing import FIRING
from .least_squares import LEAST_SQUARES
from .registry import Corrected, Corrector, Refiner
from .swaps import SWAPS

_AS_IT_IS = Corrector(NONE, "kept weights have their dense values")
_CORRECTORS = {c.name: c for c in (_AS_IT_IS, ADMM, LEAST_SQUARES, FIRING)}
_REFINERS = {r.name: r for r in (Refiner(NONE, "the method's mask"), SWAPS, DSNOT)}


def corrector_named(name: str) -> Corrector:
    """Return the corrector called `name`; that called ``none`` does nothing.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name not in _CORRECTORS:
        raise RecipeError(unknown("correction", name, _CORRECTORS))
    return _CORRECTORS[name]


def refiner_named(name: str) -> Refiner:
    """Return the refiner called `name`; that called ``none`` does nothing.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name not in _REFINERS:
        raise RecipeError(unknown("refinement", name, _REFINERS))
    return _REFINERS[name]


__all__ = ["NONE", "Corrected", "Corrector", "Refiner", "corrector_named", "refiner_named"]
