"""Where units run: in this process, one after the other."""

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
        Of the study.
    progress
        Told what is running and how much is done.
    shares
        Of the whole time, by stage, for units that know no multiply-adds.
    """

    def __init__(self, context: Context, progress: WorkProgress, shares: Mapping[str, float]) -> None:
        self._context = context
        self._progress = progress
        self._shares = shares

    def run(self, stage: Stage, units: Sequence[Unit]) -> None:
        """Carry out units of one stage, in their order."""
        for number, unit in enumerate(units):
            more = f" and {len(units) - 1} more" if len(units) > 1 and not unit.work else ""
            self._progress.stage(unit.title, more, said=bool(unit.work) or not number)
            stage.run(self._context, unit, self._progress.advance)
            if not unit.work:
                self._progress.advance(self._progress.total * self._shares.get(stage.name, 0.0) / len(units))
