"""Carrying out a study: its stages one after the other, each unit by unit; and what is left of it after a kill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from pruning.errors import StudyError
from pruning.files import disk_errors, remove_partials, write_text
from pruning.runner import VARIANTS

from ..frames import read_frame
from ..report import diagnosis_findings
from .benchmark import Benchmark
from .configuration import Study
from .context import Context
from .diagnose import Diagnose, Diagnosis
from .diagnosis_request import DiagnosisRequest, check
from .executor import ThisProcess
from .figures import DrawFigures
from .frames import MakeFrames
from .progress import WorkProgress
from .provenance import write_provenance
from .prune import Prune
from .read import Read
from .report import REPORT_FILE, WriteReport
from .study_file import load_study
from .units import Stage, Unit

STUDY_FILE = "study.toml"


def run_study(
    study: Study,
    folder: Path,
    console: Console | None = None,
    *,
    memory: int | None = None,
    device_memory: int | None = None,
    only_prune: bool = False,
) -> Path:
    """Carry out a study, or what is left of it, and return the path of its report.

    Parameters
    ----------
    study
        What to do.
    folder
        Where to put everything; made if need be. What another study left there is used where it is the same.
    console
        Where to show progress; standard error by default.
    memory, device_memory
        Caps in bytes on resident memory, and on that of the device that the model is on; what is free by default. A
        model that is larger is read from its checkpoint, a block at a time.
    only_prune
        Make the variants and nothing else, and return their folder.

    Raises
    ------
    PrunescopeError
        If text, model, recipe or folder cannot be used; what was finished stays.
    """
    whole = _needing_the_whole(study, only_prune)
    with _opened(study, folder, console, memory, device_memory, whole) as (context, console):
        if only_prune:
            _carry_out(context, [Prune()], console)
            return folder / VARIANTS
        _carry_out(context, [*_MEASURING, *_REPORTING], console)
        return folder / REPORT_FILE


def diagnose_study(
    folder: Path,
    request: DiagnosisRequest,
    console: Console | None = None,
    *,
    memory: int | None = None,
    device_memory: int | None = None,
) -> tuple[Path, list[str]]:
    """Diagnose one variant of a study, and return the report's path and what was found, in words.

    Parameters
    ----------
    folder
        Of a study; what is left of it is done first.
    request
        What to diagnose.
    console, memory, device_memory
        As for :func:`run_study`.

    Raises
    ------
    PrunescopeError
        If there is no such study, variant, language or category, or no room for the model.
    """
    study = load_study(folder / STUDY_FILE)
    request = check(study, request)
    with _opened(study, folder, console, memory, device_memory, "a diagnosis takes") as (context, console):
        diagnosis = Diagnosis(context, request)
        diagnosis.write_request()
        _carry_out(context, [*_MEASURING, Diagnose(request), *_REPORTING], console)
        return folder / REPORT_FILE, diagnosis_findings(read_frame(diagnosis.frame))


#: What every study does, before and after a diagnosis.
_MEASURING: tuple[Stage, ...] = (Prune(), Read(), Benchmark(), MakeFrames())
_REPORTING: tuple[Stage, ...] = (DrawFigures(), WriteReport())
#: Shares of a run's time that stages take whose work is no multiplying.
_SHARES = {"frames": 0.04, "figures": 0.04, "report": 0.005}


def _carry_out(context: Context, stages: Sequence[Stage], console: Console) -> None:
    began = time.monotonic()
    only_variants = len(stages) == 1
    context.model.check_device()
    context.texts.check(calibration_only=only_variants)
    work = sum(unit.work for stage in stages for unit in stage.units(context))
    write_text(context.folder / STUDY_FILE, context.study.to_toml())
    with WorkProgress(work / (1 - sum(_SHARES.values())), console) as progress:
        executor = ThisProcess(context, progress, _SHARES)
        for stage in stages:
            for units in _rounds(context, stage):
                executor.run(stage, units)
    write_provenance(context, time.monotonic() - began, only_variants=only_variants)
    for name, reason in context.variants.set_aside.items():
        console.print(f"set aside: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)


def _needing_the_whole(study: Study, only_prune: bool) -> str:
    """Return what needs the whole model in memory, in words; nothing if nothing does."""
    methods = [job.recipe.method for job in study.jobs() if job.recipe.scoring.differentiates]
    if methods:
        return f"{methods[0]} differentiates the loss, which takes"
    return "tasks of the evaluation harness take" if study.tasks.harness and not only_prune else ""


def _rounds(context: Context, stage: Stage) -> Iterator[Sequence[Unit]]:
    """Yield a stage's units until none is left; what comes next may depend on what was found."""
    before: Sequence[Unit] = ()
    while units := stage.units(context):
        assert units != before, f"{stage.name} is never finished"
        yield units
        before = units


@contextmanager
def _opened(
    study: Study, folder: Path, console: Console | None, memory: int | None, device_memory: int | None, whole: str
) -> Iterator[tuple[Context, Console]]:
    """Give a study in its folder, which no other run writes into, cleared of what a killed one left half-written."""
    console = console or Console(stderr=True)

    def tell(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file; give a folder for the study (--out)")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):
                remove_partials(folder)
                yield Context(study, folder, memory, device_memory, whole, tell), console
        except Timeout as error:
            raise StudyError(
                f"another run is writing into {folder}; wait for it, or choose another folder (--out)"
            ) from error
