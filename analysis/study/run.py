"""Running a study stage by stage, each unit by unit, and resuming it after a kill."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from pruning.errors import StudyError
from pruning.files import disk_errors, remove_partials, write_json, write_text
from pruning.runner import VARIANTS

from ..frames import read_frame
from ..report import crossing_findings, diagnosis_findings
from .benchmark import Benchmark
from .configuration import StudyConfig
from .context import Context
from .diagnose import Diagnose, Diagnosis
from .diagnosis_request import DiagnosisRequest, check, in_each_language
from .executors import ThisProcess, executor_named
from .figures import FOLDER as FIGURES
from .figures import DrawFigures, DrawFirstFigures, figure_keys
from .frames import OF_VARIANTS, MakeFrames
from .order import levels, waits
from .progress import WorkProgress
from .provenance import provenance
from .prune import Prune
from .read import Read
from .records import PROVENANCE, RECORDS
from .report import REPORT_FILE, WriteReport
from .study_file import load_study
from .tables import FOLDER as TABLES
from .tables import WriteTables, table_keys
from .units import SHARES, Executor, Stage, Unit

STUDY_FILE, LOCK, MODEL_RECORD = "study.toml", ".lock", "model.json"


def run_study(
    study: StudyConfig,
    folder: Path,
    console: Console | None = None,
    *,
    memory: int | None = None,
    device_memory: int | None = None,
    only_prune: bool = False,
    on: str | None = None,
) -> Path:
    """Run a study, or what is left of it, and return the path of its report.

    Parameters
    ----------
    study
        The study.
    folder
        Folder for all results, created if necessary. Results of a previous study there are reused if unchanged.
    console
        Console for progress; standard error by default.
    memory, device_memory
        Caps in bytes on resident memory, and on the memory of the model's device; free memory by default. A larger
        model is read from its checkpoint, one block at a time.
    only_prune
        Only make the variants, and return their folder.
    on
        Where units run, as :func:`~analysis.study.executors.executor_named` takes it; in this process by default.

    Raises
    ------
    PrunescopeError
        If text, model, recipe or folder cannot be used; finished results are kept.
    """
    whole = needing_the_whole(study, only_prune)
    executor_on = executor_named(on)
    stages: list[Stage] = [Prune()] if only_prune else [*_MEASURING, *_REPORTING]
    with _opened(study, folder, console, memory, device_memory, whole) as (context, console):
        with executor_on(context) as executor:
            _carry_out(context, stages, executor, console)
        return folder / (VARIANTS if only_prune else REPORT_FILE)


def diagnose_study(
    folder: Path,
    requests: Sequence[DiagnosisRequest],
    console: Console | None = None,
    *,
    memory: int | None = None,
    device_memory: int | None = None,
) -> tuple[Path, dict[str, list[str]]]:
    """Diagnose variants of a study, and return the path of the report and the findings of each in sentences.

    Parameters
    ----------
    folder
        Folder of the study, which is completed first if necessary.
    requests
        What to diagnose; a request with the language ``"all"`` stands for one in each language of the study.
    console, memory, device_memory
        As for :func:`run_study`.

    Raises
    ------
    PrunescopeError
        If there is no such study, variant, language or category, or the model does not fit into memory.
    """
    study = load_study(folder / STUDY_FILE)
    several = [check(study, one) for request in requests for one in in_each_language(study, request)]
    several = list(dict.fromkeys(several))
    with _opened(study, folder, console, memory, device_memory, "a diagnosis needs") as (context, console):
        each = [Diagnosis(context, request) for request in several]
        for diagnosis in each:
            diagnosis.write_request()
        _carry_out(context, [*_MEASURING, Diagnose(*several), *_REPORTING], ThisProcess(context), console)
        return folder / REPORT_FILE, {one.request.title: _said(one) for one in each}


def _said(diagnosis: Diagnosis) -> list[str]:
    crossed = crossing_findings(read_frame(diagnosis.crossing)) if diagnosis.request.sources else []
    return [*diagnosis_findings(read_frame(diagnosis.frame)), *crossed]


#: Stages of every study, before and after a diagnosis.
_MEASURING: tuple[Stage, ...] = (
    Prune(),
    MakeFrames(OF_VARIANTS),  # something to look at while the rest is read
    DrawFirstFigures(),
    Read(),
    Benchmark(),
    MakeFrames(),
)
_REPORTING: tuple[Stage, ...] = (DrawFigures(), WriteTables(), WriteReport())


def _carry_out(context: Context, stages: Sequence[Stage], executor: Executor, console: Console) -> None:
    began = time.monotonic()
    only_variants = len(stages) == 1
    work = executor.ask(partial(_work, stages=stages))
    write_text(context.folder / STUDY_FILE, context.study.to_toml())
    with WorkProgress(work / (1 - sum(SHARES.values())), console) as progress:
        for level in levels(stages):
            for units in _rounds(executor, level):
                executor.run(level, units, progress)
    if not only_variants and not executor.failed:
        executor.ask(_remove_stale)
    seconds = time.monotonic() - began
    told = executor.ask(partial(provenance, seconds=seconds, machines=executor.machines(), only_variants=only_variants))
    write_json(context.folder / PROVENANCE, told)
    left_out = executor.ask(_left_out)  # which was said at the beginning
    for name, reason in told["set_aside"].items():
        if name in left_out:
            continue
        console.print(f"set aside: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if executor.failed:
        raise StudyError(_of_failures(executor.failed))


def _work(context: Context, stages: Sequence[Stage]) -> float:
    """Check all that can be checked before anything expensive starts, and return the work that is left."""
    context.model.check_device()
    context.texts.check(calibration_only=len(stages) == 1)
    return sum((unit.work for unit in _units(context, stages)), 0.0)


def _units(context: Context, stages: Sequence[Stage]) -> list[Unit]:
    return [unit for stage in stages for unit in stage.units(context)]


def _left_out(context: Context) -> set[str]:
    return set(context.variants.imports.left_out)


def _remove_stale(context: Context) -> None:
    """Remove the figures and tables that a study had before its file was changed, and no longer has."""
    wanted = {FIGURES: figure_keys(context), TABLES: table_keys(context)}
    gone = [
        file for kind, keys in wanted.items() for file in context.records.retire(kind, {f"{kind}/{n}" for n in keys})
    ]
    if gone:
        context.tell(f"removed {len(gone)} files of figures and tables that this study no longer has")


def needing_the_whole(study: StudyConfig, only_prune: bool) -> str:
    """Return what needs the whole model in memory, as the start of an error message; empty if nothing does."""
    reasons = [job.recipe.whole for job in study.jobs() if job.recipe.whole]
    if reasons:
        return f"{reasons[0]}, which needs"
    return "tasks of the evaluation harness need" if study.tasks.harness and not only_prune else ""


def _rounds(executor: Executor, stages: Sequence[Stage]) -> Iterator[Sequence[Unit]]:
    """Yield units until none is left that can run: later ones may depend on the results of earlier ones."""
    before: Sequence[Unit] = ()
    while units := _able(executor.ask(partial(_units, stages=stages)), list(executor.failed)):
        assert units != before, f"{units[0].stage} made no progress"
        yield units
        before = units


def _able(units: Sequence[Unit], failed: Sequence[Unit]) -> list[Unit]:
    """Return the units that neither failed for good nor wait for one that did."""
    lost = {output for unit in failed for output in unit.outputs}
    waiting = waits([*failed, *units])[len(failed) :]
    return [
        unit
        for unit, waited in zip(units, waiting, strict=True)
        if lost.isdisjoint(unit.outputs) and not any(number < len(failed) for number in waited)
    ]


def _of_failures(failed: Mapping[Unit, str]) -> str:
    """Return what is said of units that failed for good, in one line."""
    first, said = next(iter(failed.items()))
    more = f" (and {len(failed) - 1} more unit{'s' * (len(failed) > 2)})" if len(failed) > 1 else ""
    return f"{first.title}{more} failed: {said}; what does not depend on it is finished; run again to resume"


@contextmanager
def _opened(
    study: StudyConfig, folder: Path, console: Console | None, memory: int | None, device_memory: int | None, whole: str
) -> Iterator[tuple[Context, Console]]:
    """Lock a study's folder, and remove files that a killed run left incomplete."""
    console = console or Console(stderr=True)

    def tell(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file; choose a folder for the study (--out)")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    before = set() if missing else {path.name for path in folder.iterdir()}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK, timeout=0), _nothing_left_of_nothing(folder, before, missing):
                remove_partials(folder)
                yield Context(study, folder, memory, device_memory, whole, tell), console
        except Timeout as error:
            raise StudyError(
                f"another run is writing into {folder}; wait for it, or choose another folder (--out)"
            ) from error


@contextmanager
def _nothing_left_of_nothing(folder: Path, before: Collection[str], missing: Sequence[Path]) -> Iterator[None]:
    """Context manager that removes what a failed run put into a folder that was new to it, if there are no results.

    That is its lock, the study's file and what model it is of, and folders that are then empty.

    Parameters
    ----------
    folder
        The folder, which this run has locked.
    before
        Names of what was in it.
    missing
        Folders that were not there, the innermost first.
    """
    try:
        yield
    except BaseException:
        new = [path for path in folder.iterdir() if path.name not in before]
        new += [path for place in new if _is_folder(place) for path in place.rglob("*")]
        files = {path.relative_to(folder).as_posix() for path in new if not _is_folder(path)}
        if LOCK in files and files <= {LOCK, STUDY_FILE, f"{RECORDS}/{MODEL_RECORD}"}:
            with suppress(OSError):
                for path in sorted(new, reverse=True):  # what is in a folder comes before it
                    path.rmdir() if _is_folder(path) else path.unlink()
                for place in missing:
                    place.rmdir()
        raise


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
