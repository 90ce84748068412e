"""Which units wait for which."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from analysis.study import run
from analysis.study.order import LEVELS, levels, waits
from analysis.study.units import Output, Unit


@dataclass(frozen=True)
class Step:
    stage: str
    makes: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()


VARIANTS = st.frozensets(st.sampled_from("abcd"), max_size=3)
STEPS = st.lists(
    st.one_of(
        st.builds(Step, st.just("prune"), VARIANTS),
        st.builds(Step, st.sampled_from(["read", "benchmark"]), st.just(frozenset()), VARIANTS),
        st.builds(Step, st.sampled_from(["frames", "diagnose", "figures", "tables", "report"])),
    ),
    max_size=8,
    unique_by=lambda step: step.makes or object(),
)


def waits_for(step: Step, other: Step) -> bool:
    """Say pair by pair what :func:`waits` works out for all."""
    if step.stage in ("read", "benchmark"):
        return bool(step.uses & other.makes)
    before = {
        "prune": [],
        "frames": ["prune", "read", "benchmark"],
        "diagnose": ["prune", "read", "benchmark", "frames"],
        "figures": ["prune", "read", "benchmark", "frames", "diagnose"],
        "tables": ["prune", "read", "benchmark", "frames", "diagnose"],
        "report": ["prune", "read", "benchmark", "frames", "diagnose", "figures", "tables"],
    }
    return other.stage in before[step.stage]


@given(STEPS)
def test_units_wait_for_what_they_use_and_for_earlier_levels(steps):
    made: set[str] = set()
    steps = [step for step in steps if made.isdisjoint(step.makes) and not made.update(step.makes)]
    expected = [frozenset(n for n, other in enumerate(steps) if waits_for(step, other)) for step in steps]
    assert waits(steps) == expected


def test_every_stage_has_a_place_and_keeps_its_order():
    stages = [*run._MEASURING, *run._REPORTING]
    assert [stage.name for level in levels(stages) for stage in level] == [stage.name for stage in stages]
    assert {stage.name for stage in stages} | {"diagnose"} == {name for level in LEVELS for name in level}


def test_results_say_which_variants_a_unit_makes_or_uses():
    def unit(stage: str, *names: str) -> Unit:
        return Unit(stage, "", tuple(Output(name, "key") for name in names))

    assert unit("prune", "variants/a", "variants/b").makes == {"a", "b"}
    reading = unit("read", "readings/dense/en", "readings/a/en", "fitting/dense/en", "questions/b/en")
    assert (reading.makes, reading.uses) == (frozenset(), {"a", "b"})
    assert unit("benchmark", "benchmark/a/group/task").uses == {"a"}
    assert not unit("frames", "frames/perplexity").uses


def test_what_waits_for_a_failed_unit_is_left_out_and_the_rest_goes_on():
    def unit(stage: str, *names: str) -> Unit:
        return Unit(stage, "", tuple(Output(name, "key") for name in names))

    pruning = [unit("prune", "variants/a"), unit("prune", "variants/b")]
    asking = [unit("benchmark", "benchmark/a/task"), unit("benchmark", "benchmark/b/task")]
    assert run._able(pruning, [pruning[0]]) == [pruning[1]]
    assert run._able(asking, [pruning[0]]) == [asking[1]]
    assert run._able([unit("frames", "frames/perplexity")], [pruning[0]]) == []
    assert run._able(asking, []) == asking
