"""Running units sequentially in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .context import Context
from .progress import WorkProgress
from .units import Stage, Unit


class ThisProcess:
    """Runs units in this process.

    Parameters
    ----------
    context
        Context of the study.
    progress
        Shows what is running and how much is done.
    shares
        Share of the total time by stage, for units whose work is not measured in multiply-adds.
    """

    def __init__(self, context: Context, progress: WorkProgress, shares: Mapping[str, float]) -> None:
        self._context = context
        self._progress = progress
        self._shares = shares

    def run(self, stage: Stage, units: Sequence[Unit]) -> None:
        """Run units of one stage, in the given order."""
        for number, unit in enumerate(units):
            more = f" and {len(units) - 1} more" if len(units) > 1 and not unit.work else ""
            self._progress.stage(unit.title, more, said=bool(unit.work) or not number)
            stage.run(self._context, unit, self._progress.advance)
            if not unit.work:
                self._progress.advance(self._progress.total * self._shares.get(stage.name, 0.0) / len(units))
