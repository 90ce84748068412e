"""The registry of pruning methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..errors import MethodError, RecipeError, unknown
from ..extensions import Extension, extensions
from ..parameters import Parameter
from ..quantization import Quantized
from ..statistics import GRAM, OF_INPUTS, OF_THE_LOSS, SQUARES, STATISTICS

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


#: ``compensate(weight, statistics, removed, **parameters)`` returns what to add to the bias of a projection that reads
#: neurons or heads, if these inputs are removed; or ``None``.
Compensate = Callable[..., Tensor | None]


@dataclass(frozen=True)
class Coded:
    """Result of a quantizing method for matrices that read the same input.

    Attributes
    ----------
    weights
        Each matrix, quantized.
    remarks
        Notes for the record, such as raised damping.
    """

    weights: list[Quantized]
    remarks: tuple[str, ...] = ()


#: ``quantize(weights, statistics, grid, roles, **parameters)`` quantizes matrices that read the same input.
Quantize = Callable[..., Coded]


@dataclass(frozen=True)
class Method:
    """A method that prunes or quantizes.

    Attributes
    ----------
    name
        As written in a recipe.
    score
        ``score(weight, statistics, **parameters)`` returns a float32 score for every weight; the lowest are pruned.
        If it scores ``channels``, it returns one for every input of a projection that reads neurons or heads.
        Every method has it but those that quantize.
    source
        The publication that defines it.
    needs
        Statistics it requests: ``squares``, ``positive``, ``absolute``, ``moments`` or ``gram`` of the inputs,
        ``similarity`` of a block's input and output, ``gradient``, ``curvature`` or ``slopes`` of the loss; none if it
        needs no calibration text.
    pattern, allocation, propagation
        Native pattern, allocation and propagation, used when a recipe names none.
    solve
        For methods that also update the remaining weights; `score` then only serves comparisons between matrices.
    quantize
        For methods that quantize instead of pruning.
    parameters
        What a recipe may set.
    scores
        What `score` scores: ``weights``; or the ``channels`` that ``o`` and ``down`` read, for methods that remove
        whole neurons and heads; or ``blocks``, each with a single number.
    compensate
        For methods that score channels: what biases make up for.
    search
        Multiply-adds of its search, whatever the amount of text, as a multiple of outputs · inputs² of a matrix.
    """

    name: str
    score: Score | None = None
    source: str = ""
    needs: frozenset[str] = frozenset()
    pattern: str = "matrix"
    allocation: str = "uniform"
    solve: Solve | None = None
    quantize: Quantize | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    propagation: str = "pruned"
    scores: Literal["weights", "channels", "blocks"] = "weights"
    compensate: Compensate | None = None
    search: float = 0.0

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration text."""
        return bool(self.needs)

    @property
    def weighs_parts(self) -> bool:
        """Whether it chooses single weights by nothing but sums of squares, or the Gram matrix, of their inputs.

        Then a part of the inputs can be given less weight; see :meth:`pruning.statistics.InputStatistics.weighted`.
        """
        return self.calibrated and self.needs <= {SQUARES, GRAM} and self.scores == "weights" and not self.quantize

    @property
    def solves(self) -> bool:
        """Whether it computes new weights, rather than only choosing among those there are."""
        return self.solve is not None or self.quantize is not None

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
    """Register a method. Other packages name theirs in an entry point instead (docs/extending.md).

    Raises
    ------
    MethodError
        If the name is taken, the method needs an unknown statistic, or it neither scores nor quantizes, or both.
    """
    _check(method)
    _METHODS[method.name] = method
    return method


def _check(method: Method) -> None:
    if method.name in _METHODS:
        raise MethodError(f'a method named "{method.name}" is already registered; choose another name')
    if (method.score is None) == (method.quantize is None):
        raise MethodError(f'method "{method.name}" should have either a score, by which it prunes, or quantize')
    for need in sorted(set(method.needs) - set(STATISTICS)):
        raise MethodError(f'method "{method.name}": {unknown("statistic", need, STATISTICS)}')


def method_named(name: str) -> Method:
    """Return the method called `name`.

    Raises
    ------
    RecipeError
        If there is none.
    """
    if name in _METHODS:
        return _METHODS[name]
    if name in _added():
        method: Method = _added()[name].found
        return method
    raise RecipeError(unknown("method", name, known_methods()))


def known_methods() -> tuple[str, ...]:
    """Return the names of all methods, those that other packages add among them."""
    return tuple(sorted({*_METHODS, *_added()}))


def added_code(name: str) -> str | None:
    """Return a hash of the code of a method that another package adds; ``None`` for any other method."""
    return _added()[name].code if name in _added() else None


def _added() -> dict[str, Extension]:
    return extensions("methods", _check_added)


def _check_added(name: str, found: object) -> None:
    if not isinstance(found, Method) or found.name != name:
        raise MethodError(f'it should be a pruning.Method with the name "{name}"')
    if found is not _METHODS.get(name):  # unless its module has registered it
        _check(found)
