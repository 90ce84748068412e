"""A worker of a cluster: a process of its own that keeps a loaded model and runs unit after unit.

Nothing here knows what cluster it is. All workers share the study's folder, and nothing else.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from pruning.code_version import code_version
from pruning.errors import PrunescopeError

from ..context import Context
from ..model import ModelFacts
from ..provenance import machine
from ..units import Stage, Unit

#: Seconds between two messages about the work done.
_OFTEN = 0.5


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes
    ----------
    value
        The result, if all went well.
    error
        What the user can do something about.
    log
        Traceback of any error.
    """

    value: Any = None
    error: PrunescopeError | None = None
    log: str = ""


@dataclass(frozen=True)
class Ready:
    """What a worker says once it is ready: which code it runs, and facts about its model and its machine."""

    code: str
    facts: ModelFacts
    machine: dict[str, Any]


def own_code() -> str:
    """Return the version of this code."""
    return code_version("pruning", "probes", "analysis")


class Worker:
    """Runs units of a study, one after the other.

    Parameters
    ----------
    context
        The study and its folder, as this worker should see them.
    threads
        How many threads it uses.
    send
        Sends a message to whoever started it: ``("told", words)`` or ``("done", unit's number, work)``.
    """

    def __init__(self, context: Context, threads: int, send: Callable[[tuple[Any, ...]], None]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries that are loaded later
        torch.set_num_threads(threads)
        threadpool_limits(threads)
        self._send = send
        self._context = Context(
            context.study,
            context.folder,
            context.memory,
            context.device_memory,
            context.whole,
            lambda words: send(("told", words)),
            workers=context.workers,
        )

    def start(self) -> Answer:
        """Return what is known of the model, which is loaded unless it is on record, and of this machine."""

        def started() -> Ready:
            self._context.model.check_device()
            return Ready(own_code(), self._context.model.facts, machine(self._context))

        return _answered(started)

    def ask(self, question: Callable[[Context], Any]) -> Answer:
        """Return the answer to a question about the study."""
        self._context.records.forget()
        return _answered(lambda: question(self._context))

    def run(self, stage: Stage, unit: Unit, number: int) -> Answer:
        """Run a unit."""
        self._context.records.forget()
        done, sent = 0.0, time.monotonic()

        def advance(work: float) -> None:
            nonlocal done, sent
            done += work
            if time.monotonic() - sent >= _OFTEN:
                self._send(("done", number, done))
                sent = time.monotonic()

        return _answered(lambda: stage.run(self._context, unit, advance))


def _answered(request: Callable[[], Any]) -> Answer:
    """Return what comes of a request; whatever goes wrong is reported where the study was started."""
    try:
        return Answer(request())
    except PrunescopeError as error:
        return Answer(error=error, log=traceback.format_exc())
    except Exception:  # noqa: BLE001
        return Answer(log=traceback.format_exc())
