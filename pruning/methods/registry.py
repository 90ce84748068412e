"""The registry of pruning methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..errors import MethodError, RecipeError, unknown
from ..parameters import Parameter
from ..statistics import OF_INPUTS, OF_THE_LOSS, STATISTICS

#: ``score(weight, statistics, **parameters)`` returns a float32 score for every weight; the lowest are pruned.
Score = Callable[..., Tensor]


@dataclass(frozen=True)
class Solved:
    """Result of a weight-updating method for matrices that read the same input.

    Attributes
    ----------
    masks
        Mask of each matrix, ``True`` = kept.
    weights
        Updated weights, zero where pruned, in the dtype of the dense ones.
    remarks
        Notes for the record, such as raised damping.
    """

    masks: list[Tensor]
    weights: list[Tensor]
    remarks: tuple[str, ...] = ()


#: ``solve(weights, statistics, pattern, budgets, **parameters)`` prunes matrices that read the same input, each by its
#: budget, and updates the remaining weights.
Solve = Callable[..., Solved]


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes
    ----------
    name
        As written in a recipe.
    score
        ``score(weight, statistics, **parameters)`` returns a float32 score for every weight; the lowest are pruned.
        If it scores ``channels``, it returns one for every input of a projection that reads neurons or heads.
    source
        The publication that defines it.
    needs
        Statistics it requests: ``squares``, ``positive`` or ``gram`` of the inputs, ``gradient``, ``curvature`` or
        ``slopes`` of the loss; none if it needs no calibration text.
    pattern, allocation
        Native pattern and allocation, used when a recipe names none.
    solve
        For methods that also update the remaining weights; `score` then only serves comparisons between matrices.
    parameters
        What a recipe may set.
    scores
        What `score` scores: ``weights``; or the ``channels`` that ``o`` and ``down`` read, for methods that remove
        whole neurons and heads.
    """

    name: str
    score: Score
    source: str
    needs: frozenset[str] = frozenset()
    pattern: str = "matrix"
    allocation: str = "uniform"
    solve: Solve | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    scores: Literal["weights", "channels"] = "weights"

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration text."""
        return bool(self.needs)

    @property
    def differentiates(self) -> bool:
        """Whether it needs derivatives of the whole model's loss."""
        return bool(self.needs & set(OF_THE_LOSS))

    @property
    def of_inputs(self) -> frozenset[str]:
        """The statistics of a projection's inputs that it needs, for which text passes through block by block."""
        return self.needs & set(OF_INPUTS)


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Register a method.

    Raises
    ------
    MethodError
        If the name is taken, or the method needs an unknown statistic.
    """
    if method.name in _METHODS:
        raise MethodError(f'a method named "{method.name}" is already registered; choose another name')
    for need in sorted(set(method.needs) - set(STATISTICS)):
        raise MethodError(f'method "{method.name}": {unknown("statistic", need, STATISTICS)}')
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
        raise RecipeError(unknown("method", name, _METHODS))
    return _METHODS[name]


def known_methods() -> tuple[str, ...]:
    """Return the names of all registered methods."""
    return tuple(sorted(_METHODS))
