"""Tests of several parameters at once: every pair of values is tested always, every combination with ``-m full``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest


def pairs_of(case: Sequence[Any]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    """Return every two values of one combination, each with the number of its axis."""
    return set(combinations(enumerate(case), 2))


def all_pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations in which any two values of different axes meet; always the same ones.

    Each is the one with the most pairs that have not met yet. Among equals it is the first.
    """
    return _all_pairs(tuple(map(tuple, axes)))


@cache
def _all_pairs(axes: tuple[tuple[Any, ...], ...]) -> list[tuple[Any, ...]]:
    cases = list(product(*axes))
    left = set().union(*map(pairs_of, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(pairs_of(case) & left))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def pairwise(axes: Mapping[str, Sequence[Any]], **only: Any) -> pytest.MarkDecorator:
    """Parametrize a test with all combinations; those that add no pair of values are marked `full`.

    Tests that share the axes of a product take their part of it by naming the values of an axis in `only`: a list of
    them, or the one value, which is then no parameter of the test.
    """
    chosen = set(all_pairs(*axes.values()))
    names = [name for name in axes if isinstance(only.get(name, []), list)]
    cases = []
    for case in product(*axes.values()):
        values = dict(zip(axes, case, strict=True))
        if all(values[name] in (part if isinstance(part, list) else [part]) for name, part in only.items()):
            marks = [] if case in chosen else [pytest.mark.full]
            asked = [values[name] for name in names]
            cases.append(pytest.param(*asked, marks=marks, id="-".join(map(str, asked))))
    return pytest.mark.parametrize(names, cases)
