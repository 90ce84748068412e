"""The table of scoring methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..errors import RecipeError, did_you_mean
from ..statistics import InputStatistics

Score = Callable[
    [Float[Tensor, "outputs inputs"], InputStatistics | None],
    Float[Tensor, "outputs inputs"],
]


@dataclass(frozen=True)
class Method:
    """A scoring method.

    Attributes
    ----------
    name
        As written in a recipe.
    score
        ``score(weight, statistics)`` gives a float32 score for every weight; the lowest go first.
    calibrated
        Whether `score` needs statistics of the calibration text (else it is called with ``None``).
    pattern
        The native pattern, used when a recipe names none.
    source
        The publication that defines it.
    """

    name: str
    score: Score
    calibrated: bool
    pattern: str
    source: str


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the table.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    if method.name in _METHODS:
        raise ValueError(f"a method named {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def method_named(name: str) -> Method:
    """Return the method called `name`.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name not in _METHODS:
        raise RecipeError(f'unknown method "{name}"; {did_you_mean(name, _METHODS)}')
    return _METHODS[name]


def known_methods() -> tuple[str, ...]:
    """Return the names of all registered methods."""
    return tuple(sorted(_METHODS))
