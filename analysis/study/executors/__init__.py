"""Where the units of a study run: in this process, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from pruning.errors import StudyError, shortened

from ..context import Context
from ..units import Executor
from .this_process import ThisProcess

__all__ = ["ThisProcess", "executor_named"]


def executor_named(name: str | None) -> Callable[[Context], AbstractContextManager[Executor]]:
    """Return what makes an executor of a study.

    Parameters
    ----------
    name
        ``None``: this process. ``"ray"``: the Ray cluster that this machine belongs to, or else one started here;
        ``"ray:HOST:PORT"``: the cluster whose head is at this address.

    Raises
    ------
    StudyError
        If there is no such executor, or Ray is not installed.
    """
    if name is None:
        return ThisProcess
    kind, _, address = name.partition(":")
    if kind != "ray":
        raise StudyError(f'--on "{shortened(name)}" is unknown; use --on ray, or --on ray:HOST:PORT')
    try:
        from .ray_workers import RayWorkers
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise StudyError("--on ray needs Ray; install it with: pip install 'prunescope[cluster]'") from error
    return lambda context: RayWorkers(context, address)
