"""Statistics of sets that share text: summed as it comes, the same as afterwards, with no more held than is planned."""

from __future__ import annotations

import operator
import weakref
from functools import reduce

import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from pruning import Anatomy, CalibrationSet, Recipe
from pruning.engine import Job
from pruning.engine.flow import StatisticsOf
from pruning.engine.jobs import Schedule, most_held
from pruning.statistics import GRAM, SQUARES, InputStatistics
from pruning.text.calibration import CalibrationText, Piece

PIECES = [Piece(language, 8, 0, 1) for language in ("ar", "de", "en", "sw", "zh")]
ANATOMY = Anatomy(tiny_model("llama"))
SETS = st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5, unique=True), min_size=1, max_size=5)


def schedule_of(sets: list[list[Piece]]) -> tuple[Schedule, list[Job]]:
    named = {
        CalibrationSet(name=f"set{i}", languages=tuple(p.language for p in own), samples=len(own), length=8): own
        for i, own in enumerate(sets)
    }
    jobs = [Job(Recipe(method="sparsegpt", sparsity=0.5), calibration) for calibration in named]
    text = CalibrationText({piece: torch.zeros(1, 8, dtype=torch.int64) for piece in PIECES}, named)
    return Schedule(ANATOMY, jobs, text), jobs


def statistics_of(piece: Piece) -> InputStatistics:
    found = InputStatistics(6, frozenset({SQUARES, GRAM}))
    found.add(torch.randn(9, 6, generator=torch.Generator().manual_seed(PIECES.index(piece))), piece.language)
    return found


@given(SETS)
def test_sums_are_those_of_the_pieces_in_the_order_of_each_set(sets):
    schedule, jobs = schedule_of(sets)
    found = StatisticsOf(schedule, 0)
    for piece in schedule.pieces(0):
        found.take(piece, {"q": statistics_of(piece)})
    for job, own in zip(jobs, sets, strict=True):
        expected = reduce(operator.add, map(statistics_of, own))
        assert torch.equal(found(job)["q"].gram, expected.gram)  # to the last bit
        assert torch.equal(found(job)["q"].squares, expected.squares)
        assert found(job)["q"].tokens == expected.tokens


@given(SETS)
def test_no_more_are_held_than_planned(sets):
    schedule, _ = schedule_of(sets)
    found = StatisticsOf(schedule, 0)
    alive: list[weakref.ref[InputStatistics]] = []
    most = 0

    def held() -> int:
        return sum(reference() is not None for reference in alive)

    add = InputStatistics.__add__

    def counted(one: InputStatistics, other: InputStatistics) -> InputStatistics:
        nonlocal most
        total = add(one, other)
        alive.append(weakref.ref(total))
        most = max(most, held())
        return total

    InputStatistics.__add__ = counted  # type: ignore[method-assign]
    try:
        for piece in schedule.pieces(0):
            own = {"q": statistics_of(piece)}
            alive.append(weakref.ref(own["q"]))
            most = max(most, held())
            found.take(piece, own)
            del own
    finally:
        InputStatistics.__add__ = add  # type: ignore[method-assign]
    planned = most_held(schedule.pieces(0), schedule.pieces_by_set(0).values())
    assert most <= planned <= most + 1


def test_a_set_of_all_languages_holds_three_whatever_their_number():
    every = [Piece(f"l{i}", 8, 0, 1) for i in range(40)]
    assert most_held(every, [every]) == 3
    assert most_held(every, [[piece] for piece in every]) == 40
    assert most_held(every, [*([piece] for piece in every), every]) == 42


def test_inputs_that_only_another_set_reads_are_left_out():
    schedule, jobs = schedule_of([[PIECES[0]], PIECES[:2]])
    found = StatisticsOf(schedule, 0)
    found.take(PIECES[0], {"q": statistics_of(PIECES[0]), "o": statistics_of(PIECES[0])})
    found.take(PIECES[1], {"q": statistics_of(PIECES[1])})
    assert list(found(jobs[0])) == ["q", "o"]
    assert list(found(jobs[1])) == ["q"]
