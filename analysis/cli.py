"""The command line interface."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from pruning.errors import PrunescopeError, StudyError, shortened
from pruning.files import write_text
from pruning.text.sources import BUNDLED_LANGUAGES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look inside pruned multilingual language models.",
)


_STOPPED = 130
_Memory = Annotated[
    str | None,
    typer.Option(help="Memory cap, such as 6GiB; free memory by default. A larger model is read from its shards."),
]
_DeviceMemory = Annotated[str | None, typer.Option(help="GPU memory cap, such as 20GiB; free GPU memory by default.")]
_Study = Annotated[
    str,
    typer.Argument(help='A study file (TOML), or the name of a study that "prunescope studies" lists.'),
]
_Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the study; runs/NAME by default. Run again to resume."),
]


def _bytes(option: str, amount: str | None) -> int | None:
    try:
        return None if amount is None else int(TypeAdapter(ByteSize).validate_python(amount))
    except ValidationError as error:
        raise StudyError(
            f'{option} "{shortened(amount)}" is not an amount of memory; use a form such as 6GiB or 500MB'
        ) from error


@app.command()
def run(
    study: _Study,
    out: _Out = None,
    memory: _Memory = None,
    device_memory: _DeviceMemory = None,
) -> None:
    """Run a study: prune, read, analyze, plot, report. Finished parts are skipped."""
    from .study.run import run_study
    from .study.study_file import resolved_study

    report = run_study(
        resolved_study(study),
        out or Path("runs") / Path(study).stem,
        memory=_bytes("--memory", memory),
        device_memory=_bytes("--device-memory", device_memory),
    )
    typer.echo(f"report: {report}")


@app.command()
def prune(
    study: _Study,
    out: _Out = None,
    memory: _Memory = None,
    device_memory: _DeviceMemory = None,
) -> None:
    """Make only the pruned variants of a study. The model may be larger than memory."""
    from .study.run import run_study
    from .study.study_file import resolved_study

    variants = run_study(
        resolved_study(study),
        out or Path("runs") / Path(study).stem,
        memory=_bytes("--memory", memory),
        device_memory=_bytes("--device-memory", device_memory),
        only_prune=True,
    )
    typer.echo(f"variants: {variants}")


@app.command()
def studies(
    name: Annotated[str | None, typer.Argument(help="Print the file of this study, to save and edit it.")] = None,
) -> None:
    """List the studies that come with prunescope, or print the file of one."""
    from .study.presets import preset_names, preset_summary, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    for known in preset_names():
        typer.echo(f"{known}\n    {preset_summary(known)}")


@app.command()
def plan(
    study: _Study,
    out: _Out = None,
    memory: _Memory = None,
    device_memory: _DeviceMemory = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Schedule the units on this many workers.")] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Effective TFLOPS of one worker, instead of a trial; weights are not loaded."),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of weights from disk to a worker's device; with --tflops.")
    ] = None,
) -> None:
    """Tell what a study, or what is left of it, will cost: units, memory, disk, time. Nothing is run or written."""
    from .study.planning import Figures, plan_study, plan_text
    from .study.planning.tables import command_line, printed
    from .study.study_file import resolved_study

    folder = out or Path("runs") / Path(study).stem
    found = plan_study(
        resolved_study(study),
        folder,
        memory=_bytes("--memory", memory),
        device_memory=_bytes("--device-memory", device_memory),
        figures=Figures.given(tflops, bandwidth),
    )
    options = [("--memory", memory), ("--device-memory", device_memory)]
    printed(Console(), plan_text(found, command_line(study, str(folder), options), workers=workers))


@app.command()
def compare(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model: hub id, folder, or demo.")],
    pruned: Annotated[
        str, typer.Argument(metavar="PRUNED", help="The same model, pruned elsewhere: hub id or folder.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; runs/compare-PRUNED by default. Run again to resume.")
    ] = None,
    languages: Annotated[str, typer.Option(help="Evaluation languages.")] = ",".join(BUNDLED_LANGUAGES),
    text: Annotated[str, typer.Option(help='"bundled", "hub:PRESET" or "file:PATH/{lang}.jsonl".')] = "bundled",
    segments: Annotated[int, typer.Option(help="Held-out and fitting segments per language.")] = 128,
    memory: _Memory = None,
    device_memory: _DeviceMemory = None,
) -> None:
    """Compare a model pruned elsewhere with its dense parent, in every analysis that needs no calibration sets."""
    from .study.comparison import comparison_study
    from .study.run import run_study

    tags = [tag.strip() for tag in languages.split(",")]
    study = comparison_study(dense, pruned, languages=tags, text=text, segments=segments)
    (name,) = study.imported
    report = run_study(
        study,
        out or Path("runs") / f"compare-{name}",
        memory=_bytes("--memory", memory),
        device_memory=_bytes("--device-memory", device_memory),
    )
    typer.echo(f"report: {report}")


@app.command()
def diagnose(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study (or of prunescope compare).")],
    variant: Annotated[str, typer.Option(help="Id of the variant: a folder below DIR/variants.")],
    language: Annotated[str, typer.Option(help="One of the study's languages.")],
    category: Annotated[
        str, typer.Option(help='A category of the items, "all" of them, or "text" for held-out text.')
    ] = "reasoning",
    half: Annotated[
        Literal["all", "first", "second"],
        typer.Option(help="Use only one half of the questions, to judge a remedy on the other."),
    ] = "all",
    confirm: Annotated[int, typer.Option(min=1, help="How many causes each half of the questions chooses.")] = 20,
    sample: Annotated[
        int, typer.Option(min=0, help="How many masks and outputs, drawn at random, to patch exactly as well.")
    ] = 8,
    positions: Annotated[
        Literal["counted", "all"], typer.Option(help="Patch where tokens count, or the first and special ones too.")
    ] = "counted",
    memory: _Memory = None,
    device_memory: _DeviceMemory = None,
) -> None:
    """Find the components of a pruned model that recover its drop when they are restored."""
    from .study.diagnosis_request import DiagnosisRequest
    from .study.run import STUDY_FILE, diagnose_study

    if not (folder / STUDY_FILE).is_file():
        raise StudyError(f"there is no study in {folder}; run one first: prunescope run STUDY.toml --out {folder}")
    request = DiagnosisRequest(
        variant=variant,
        language=language,
        category=category,
        half=half,
        confirm=confirm,
        sample=sample,
        positions=positions,
    )
    report, found = diagnose_study(
        folder, request, memory=_bytes("--memory", memory), device_memory=_bytes("--device-memory", device_memory)
    )
    for sentence in found:
        typer.echo(f"- {sentence}")
    typer.echo(f"report: {report}")


@app.command()
def power(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a finished study, with two draws or more.")],
    effect: Annotated[float, typer.Option(min=0, help="Size of the difference, in the metric's unit (shares: 0-1).")],
    metric: Annotated[
        Literal["log_perplexity", "snr_db", "accuracy_drop", "margin_drop"],
        typer.Option(help="What differs: on held-out text, or between drops on items."),
    ] = "log_perplexity",
    comparison: Annotated[
        Literal["sets", "own", "category"],
        typer.Option(help="Two calibration sets; own languages' sets with the others; two categories of items."),
    ] = "sets",
    category: Annotated[
        str | None, typer.Option(help="Of items; reasoning by default. Compared with fluency, if categories are.")
    ] = None,
    target: Annotated[float, typer.Option("--power", min=0, max=1, help="Power to reach.")] = 0.8,
    runs: Annotated[int, typer.Option(min=100, help="Simulated studies for each number.")] = 1000,
    csv: Annotated[Path | None, typer.Option(help="File for the table.")] = None,
) -> None:
    """Tell how many draws and segments (or templates) it takes to see an effect."""
    from .study.power import power_table, study_power
    from .study.run import STUDY_FILE

    if not (folder / STUDY_FILE).is_file():
        raise StudyError(f"there is no study in {folder}; run one first: prunescope run STUDY.toml --out {folder}")
    rows = study_power(folder, effect=effect, metric=metric, comparison=comparison, category=category, runs=runs)
    for table, words in power_table(rows, target):
        Console().print(table)
        typer.echo(words)
    if csv:
        csv.parent.mkdir(parents=True, exist_ok=True)
        write_text(csv, rows.to_csv(index=False))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the checkpoint.")],
    variant: Annotated[str, typer.Option(help="Id of the variant: a folder below DIR/variants.")],
    stream: Annotated[bool, typer.Option(help="Write block by block, for models larger than memory.")] = False,
) -> None:
    """Write a pruned variant as an ordinary checkpoint that from_pretrained loads."""
    from pruning import Variant, load_model
    from pruning.errors import did_you_mean
    from pruning.files import is_folder

    from .study.run import STUDY_FILE
    from .study.study_file import load_study

    resolved = load_study(folder / STUDY_FILE)
    place = folder / "variants" / variant
    if not is_folder(place):
        known = sorted(p.name for p in (folder / "variants").glob("*") if p.is_dir())
        raise StudyError(f'there is no variant "{shortened(variant)}" in {folder}; {did_you_mean(variant, known)}')
    opened = Variant.open(place)
    model, tokenizer = load_model(resolved.model, dtype="checkpoint", device="cpu", stream=stream)
    said = opened.export(model, tokenizer, target)
    typer.echo(f"checkpoint: {target}" + (f" ({said})" if said else ""))


def main() -> None:
    """Run the command line; user errors print one line and exit with status 2."""
    try:
        app()
    except PrunescopeError as error:
        Console(stderr=True, soft_wrap=True).print(f"prunescope: {error}", markup=False, highlight=False)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == _STOPPED:  # typer has turned a KeyboardInterrupt into this
            print("prunescope: stopped; run the same command again to resume", file=sys.stderr)
        raise
