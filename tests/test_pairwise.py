"""What is tested by default misses no two values together, and with what is marked `full` no combination."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import all_pairs, pairwise

AXES = {"kind": list("abcdefg"), "method": ["wanda", "snip", "random"], "pattern": [1, 2, 3, 4]}


def cases(marked: pytest.MarkDecorator, *, full: bool) -> list[tuple]:
    """Return the values of a test's parameters: of all cases, or of those that always run."""
    return [case.values for case in marked.mark.args[1] if full or not case.marks]


@pytest.mark.parametrize("lengths", [(19, 8, 5), (2, 4, 17), (7, 3, 4), (3, 3, 3, 3), (4, 1, 6), (5, 2)])
def test_any_two_values_meet(lengths):
    axes = [[f"{letter}{i}" for i in range(length)] for letter, length in zip("abcd", lengths, strict=False)]
    chosen = all_pairs(*axes)
    for (i, one), (j, other) in combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in chosen} == set(product(one, other))
    most = sorted(lengths)[-2:]
    assert most[0] * most[1] <= len(chosen) <= 1.4 * most[0] * most[1]
    assert len(set(chosen)) == len(chosen)


def test_what_always_runs_holds_all_pairs_and_the_rest_all_combinations():
    every = pairwise(AXES)
    assert every.mark.args[0] == list(AXES)
    assert sorted(cases(every, full=True)) == sorted(product(*AXES.values()))
    assert set(cases(every, full=False)) == set(all_pairs(*AXES.values()))
    assert {mark.name for case in every.mark.args[1] for mark in case.marks} == {"full"}


@pytest.mark.parametrize("full", [False, True])
def test_tests_that_share_a_product_leave_nothing_of_it_out(full):
    several, one = pairwise(AXES, method=["wanda", "snip"]), pairwise(AXES, method="random")
    assert one.mark.args[0] == ["kind", "pattern"]
    shared = cases(several, full=full) + [(kind, "random", pattern) for kind, pattern in cases(one, full=full)]
    assert sorted(shared) == sorted(cases(pairwise(AXES), full=full))
