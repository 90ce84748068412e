"""What is left of a study, unit by unit, with what each will need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probes import DENSE

from ..analyses import frame_names
from ..benchmark import Benchmark
from ..context import Context
from ..figures import DrawFigures, figure_keys
from ..frames import MakeFrames, frame_finished
from ..prune import Prune
from ..read import Read
from ..report import WriteReport
from ..tables import WriteTables
from ..units import SHARES, Unit
from .pace import Pace

#: Stages in order.
STAGES = ("prune", "read", "benchmark", "frames", "figures", "tables", "report")


#: Kinds of results of the stages whose time is measured.
_MEASURED = ("variants", "readings", "fitting", "questions", "lens", "margins", "translators", "benchmark")


@dataclass(frozen=True)
class Estimate:
    """One unit, or all units of a stage that cannot be listed before an earlier stage is finished.

    Attributes
    ----------
    stage, title
        Name of its stage, and what it does.
    results
        Names of its results; none if they cannot be listed yet.
    seconds
        How long it takes.
    memory, device_memory
        Peak in bytes on the host and on the device; 0 if unknown or none.
    kept, scratch
        Bytes on disk, for good and for a while.
    makes, uses
        Names of the variants that it makes, and of those that it needs.
    share
        Whether the time is a share of that of a whole run, as such stages usually take.
    """

    stage: str
    title: str
    results: tuple[str, ...] = ()
    seconds: float = 0.0
    memory: int = 0
    device_memory: int = 0
    kept: int = 0
    scratch: int = 0
    makes: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    share: bool = False


def estimates(context: Context, pace: Pace) -> list[Estimate]:
    """Return what is left of a study, in order.

    Raises
    ------
    PrunescopeError
        If a unit cannot run.
    """
    measuring = [*_pruning(context, pace), *_reading(context, pace), *_asking(context, pace)]
    spent = sum(
        record.seconds for name, record in context.records.everything().items() if name.partition("/")[0] in _MEASURED
    )
    whole = (spent + sum(one.seconds for one in measuring)) / (1 - sum(SHARES.values()))
    return [*measuring, *_reporting(context, whole, anything=bool(measuring))]


def _pruning(context: Context, pace: Pace) -> Iterator[Estimate]:
    stage = Prune()
    for unit in stage.units(context):
        names = frozenset(output.name.partition("/")[2] for output in unit.outputs)
        cost = stage.cost(context, unit)
        if cost is not None:
            yield _estimate(
                unit,
                pace.wave(cost),
                memory=cost.memory,
                device_memory=cost.device_memory,
                kept=cost.kept,
                scratch=cost.scratch,
                makes=names,
            )
        elif names & context.variants.imports.found.keys():
            size = context.model.weight_bytes
            yield _estimate(unit, pace.importing(), memory=2 * size, kept=size, makes=names)
        else:
            yield _estimate(unit, 0.0, makes=names)


def _reading(context: Context, pace: Pace) -> Iterator[Estimate]:
    stage = Read()
    for unit in stage.units(context):
        plan = stage.planned(context, unit, trial=pace.trial)
        models = {output.name.split("/")[1] for output in unit.outputs}
        yield _estimate(
            unit,
            pace.reading(unit, plan),
            memory=plan.memory,
            device_memory=plan.device_memory,
            kept=plan.kept,
            scratch=stage.scratch(context, unit),
            uses=frozenset(models - {DENSE}),
        )


def _asking(context: Context, pace: Pace) -> Iterator[Estimate]:
    for unit in Benchmark().units(context):
        model = unit.outputs[0].name.split("/")[1]
        whole = context.model.whole_bytes
        on_device = context.model.facts.device not in ("cpu", "mps")
        yield _estimate(
            unit,
            pace.answering(unit),
            memory=whole,
            device_memory=whole if on_device else 0,
            uses=frozenset({model} - {DENSE}),
        )


def _reporting(context: Context, whole: float, *, anything: bool) -> Iterator[Estimate]:
    """Yield frames, figures, tables and the report; those that cannot be listed yet as one each."""
    listed = MakeFrames().units(context)
    names = {output.name.partition("/")[2] for unit in listed for output in unit.outputs}
    later = [name for name in frame_names() if name not in names and not frame_finished(context, name)]
    a_frame = whole * SHARES["frames"] / len(frame_names())
    for unit in listed:
        yield _estimate(unit, a_frame * len(unit.outputs), share=True)
    for name in later:
        yield Estimate("frames", f"making the frame {name}", (f"frames/{name}",), a_frame, share=True)
    if anything or listed or later:
        yield Estimate("figures", "drawing the figures", seconds=whole * SHARES["figures"], share=True)
        yield Estimate("tables", "writing the tables", seconds=whole * SHARES["tables"], share=True)
        yield Estimate("report", "writing the report", ("report",), whole * SHARES["report"], share=True)
    else:
        yield from _left_to_draw(context, whole)


def _left_to_draw(context: Context, whole: float) -> Iterator[Estimate]:
    """Yield the figures, tables and the report that are left once all frames are there."""
    every = len(figure_keys(context))
    for unit in DrawFigures().units(context):
        yield _estimate(unit, whole * SHARES["figures"] / every, share=True)
    for unit in WriteTables().units(context):
        yield _estimate(unit, whole * SHARES["tables"], share=True)
    for unit in WriteReport().units(context):
        yield _estimate(unit, whole * SHARES["report"], share=True)


def _estimate(unit: Unit, seconds: float, **more: object) -> Estimate:
    results = tuple(output.name for output in unit.outputs)
    return Estimate(unit.stage, unit.title, results, seconds, **more)  # type: ignore[arg-type]


def by_stage(found: Sequence[Estimate]) -> dict[str, list[Estimate]]:
    """Return estimates by stage, in order; stages without any are left out."""
    return {stage: own for stage in STAGES if (own := [one for one in found if one.stage == stage])}
