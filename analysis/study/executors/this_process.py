"""Running units sequentially in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from ..context import Context
from ..progress import WorkProgress
from ..provenance import machine
from ..units import SHARES, Stage, Unit

_Answer = TypeVar("_Answer")


class ThisProcess:
    """Runs units in this process; whatever fails is raised.

    Parameters
    ----------
    context
        Context of the study.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def failed(self) -> Mapping[Unit, str]:
        """Nothing, since a failure is raised."""
        return {}

    def __enter__(self) -> ThisProcess:
        """Return itself: there is nothing to start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to stop."""

    def machines(self) -> Sequence[Mapping[str, Any]]:
        """The only one, which this is."""
        return [machine(self._context)]

    def ask(self, question: Callable[[Context], _Answer]) -> _Answer:
        """Return the answer to a question about the study."""
        return question(self._context)

    def run(self, stages: Sequence[Stage], units: Sequence[Unit], progress: WorkProgress) -> None:
        """Run units stage by stage, in the given order."""
        for stage in stages:
            own = [unit for unit in units if unit.stage == stage.name]
            for number, unit in enumerate(own):
                more = f" and {len(own) - 1} more" if len(own) > 1 and not unit.work else ""
                progress.stage(unit.title, more, said=bool(unit.work) or not number)
                stage.run(self._context, unit, progress.advance)
                if not unit.work:
                    progress.advance(progress.total * SHARES.get(stage.name, 0.0) / len(own))
