"""Commands that make and run studies, or only prune."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pruning.errors import StudyError

from .app import (
    START,
    STUDIES,
    DeviceMemory,
    Memory,
    On,
    Out,
    StudyName,
    Text,
    app,
    bytes_of,
    check_written,
    command,
    ends,
    examples,
    language_list,
    listed,
    method_names,
    study_names,
)


@app.command(
    rich_help_panel=START,
    epilog=examples("prunescope run demo", "prunescope run study.toml --out runs/mine --memory 6GiB"),
)
def run(
    study: StudyName,
    out: Out = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    on: On = None,
) -> None:
    """Run a study: prune, read, analyze, plot, report.

    Finished parts are skipped: run the same command again to resume, or after a change to the study file.
    """
    check_written(study)
    from ..study.run import run_study
    from ..study.study_file import resolved_study

    folder, resolved = out or _folder_of(study), resolved_study(study)
    report = run_study(
        resolved,
        folder,
        memory=bytes_of("--memory", memory),
        device_memory=bytes_of("--device-memory", device_memory),
        on=on,
    )
    variant, language = _worth_diagnosing(folder, resolved.languages)
    diagnose = ("diagnose", folder, "--variant", variant, "--language", language, "--category", "text")
    ends("report", report, diagnose)


def _worth_diagnosing(folder: Path, languages: Sequence[str]) -> tuple[str, str]:
    """Return a variant of a finished study and a language: if there is one, one that it was not calibrated on."""
    variants: dict[str, list[str]] = {}
    for path in sorted((folder / "variants").glob("*/recipe.json")):
        calibration = json.loads(path.read_text(encoding="utf-8"))["calibration"]
        variants[path.parent.name] = calibration["languages"] if calibration else []
    calibrated = [name for name, own in variants.items() if own]
    for name in calibrated:
        for language in languages:
            if language not in variants[name]:
                return name, language
    return next(iter(calibrated or variants), "ID"), languages[0]


@app.command(
    rich_help_panel=START,
    epilog=examples(
        "prunescope prune demo --method wanda --sparsity 0.5 --calibration sw --out runs/wanda-sw",
        "prunescope prune owner/model --method sparsegpt --pattern 2:4 --calibration en,en+sw --text hub:mc4",
        "prunescope prune demo --method gptq --bits 3 --calibration all",
        "prunescope prune study.toml --out runs/mine",
    ),
)
def prune(
    what: Annotated[
        str,
        typer.Argument(
            metavar="STUDY|MODEL",
            help="A study file, or the name of a study, of which only the variants are made; or, with --method, a "
            "model: hub id, folder with a checkpoint, or demo.",
            autocompletion=study_names,
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(help="Prune MODEL so; several with commas between.", autocompletion=method_names),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights to remove, 0.5 by default.")] = None,
    pattern: Annotated[str, typer.Option(help='Such as "row", "2:4" or "neurons"; by default the method\'s own.')] = "",
    bits: Annotated[int | None, typer.Option(help="Of a code, for methods that quantize; 4 by default.")] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, 128 by default; 0: the whole row.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help='Calibration sets with commas between: a language, "en+sw" or "all".', autocompletion=language_list
        ),
    ] = "en",
    seed: Annotated[int, typer.Option(min=0, help="Which draw of the calibration text.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Blocks of calibration text ...")] = 32,
    length: Annotated[int, typer.Option(min=8, help="... of this many tokens each.")] = 128,
    text: Text = "bundled",
    languages: Annotated[
        str | None,
        typer.Option(help='What "all" means; by default the languages of the text.', autocompletion=language_list),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the variants; runs/NAME by default. Run again to resume.")
    ] = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    on: On = None,
) -> None:
    """Make pruned (or quantized) variants of a model, or only those of a study. The model may be larger than memory.

    They lie in DIR/variants, one folder each: masks, and weights that were updated. With --method nothing else is
    needed; DIR/study.toml then says what was made, as for any study.
    """
    if method is None:
        _check_study_named(what)
        check_written(what)
    from ..study.run import run_study
    from ..study.study_file import resolved_study
    from ..study.without_file import check_same_study, pruning_study

    if method is None:
        study, folder = resolved_study(what), out or _folder_of(what)
    else:
        study = pruning_study(
            what,
            methods=listed(method),
            sparsity=sparsity,
            pattern=pattern,
            bits=bits,
            group=group,
            calibration=listed(calibration),
            seed=seed,
            samples=samples,
            length=length,
            text=text,
            languages=None if languages is None else listed(languages),
        )
        folder = out or _folder_of(f"{Path(what).name}-pruned.toml")
        check_same_study(folder, study)
    variants = run_study(
        study,
        folder,
        memory=bytes_of("--memory", memory),
        device_memory=bytes_of("--device-memory", device_memory),
        on=on,
        only_prune=True,
    )
    following = ("run", what, "--out", folder) if method is None else ("look", what, folder)
    ends("variants", variants, following)


@app.command(
    rich_help_panel=START,
    epilog=examples(
        "prunescope new",
        "prunescope new mine.toml --model owner/model --languages en,sw,zh --methods wanda,gptq --text hub:flores",
    ),
)
def new(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")] = Path("study.toml"),
    model: Annotated[str | None, typer.Option(help="Hub id, folder with a checkpoint, or demo.")] = None,
    languages: Annotated[
        str | None, typer.Option(help="Evaluation languages with commas between.", autocompletion=language_list)
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help='Calibration sets; by default each language and "all".')
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods with commas between.", autocompletion=method_names)
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="Sparsities with commas between.")] = None,
    text: Annotated[str | None, typer.Option(help='"bundled", "hub:PRESET" or "file:PATH/{lang}.jsonl".')] = None,
) -> None:
    """Write a study file with comments, from options or a few answers.

    What no option says is asked for, or, if nobody is there to answer (input is no terminal), takes its default; only
    the model must be given. An existing file is never overwritten.
    """
    import sys

    from ..study.new_file import DEFAULTS, check_new, study_text, write_new

    check_new(file)
    asked = {
        "model": (model, "Model (hub id, folder with a checkpoint, or demo)"),
        "languages": (languages, "Evaluation languages"),
        "calibration": (calibration, 'Calibration sets (languages, mixes such as en+sw, or "all")'),
        "methods": (methods, "Methods"),
        "sparsity": (sparsity, "Sparsities"),
        "text": (text, "Text (bundled, hub:PRESET or file:PATH/{lang}.jsonl)"),
    }
    answers: dict[str, str] = {}
    for name, (given, question) in asked.items():
        default = answers["languages"] + ",all" if name == "calibration" else DEFAULTS[name]
        if given is None and sys.stdin.isatty():
            given = typer.prompt(question, default=default)
        elif given is None and name == "model":
            raise StudyError("which model? Give --model (a hub id, a folder with a checkpoint, or demo)")
        answers[name] = default if given is None else given
    content = study_text(
        file,
        answers["model"],
        languages=listed(answers["languages"]),
        calibration=listed(answers["calibration"]),
        methods=listed(answers["methods"]),
        sparsity=listed(answers["sparsity"]),
        text=answers["text"],
    )
    write_new(file, content)
    ends("study", file, ("plan", file), ("run", file))


@app.command(
    rich_help_panel=STUDIES,
    epilog=examples("prunescope studies", "prunescope studies demo > study.toml"),
)
def studies(
    name: Annotated[
        str | None,
        typer.Argument(help="Print the file of this study, to save and edit it.", autocompletion=study_names),
    ] = None,
) -> None:
    """List the studies that come with prunescope, or print the file of one."""
    from ..study.presets import preset_names, preset_summary, preset_text

    if name is not None:
        typer.echo(preset_text(name), nl=False)
        return
    for known in preset_names():
        typer.echo(f"{known}\n    {preset_summary(known)}")
    typer.echo(f"Next: {command('run', 'NAME')}, or {command('studies', 'NAME')} > study.toml")


@app.command(
    rich_help_panel=STUDIES,
    epilog=examples("prunescope plan study.toml", "prunescope plan demo --tflops 0.2 --bandwidth 2 --workers 4"),
)
def plan(
    study: StudyName,
    out: Out = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cut the work for this many workers, and schedule it on them.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Effective TFLOPS of one worker, instead of a trial; weights are not loaded."),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of weights from disk to a worker's device; with --tflops.")
    ] = None,
) -> None:
    """Tell what a study, or what is left of it, will cost: units, memory, disk, time. Nothing is run or written."""
    check_written(study)
    from rich.console import Console

    from ..study.planning import Figures, plan_study, plan_text
    from ..study.planning.tables import command_line, printed
    from ..study.study_file import resolved_study

    folder = out or _folder_of(study)
    found = plan_study(
        resolved_study(study),
        folder,
        memory=bytes_of("--memory", memory),
        device_memory=bytes_of("--device-memory", device_memory),
        figures=Figures.given(tflops, bandwidth),
        workers=workers or 1,
    )
    options = [("--memory", memory), ("--device-memory", device_memory)]
    printed(Console(), plan_text(found, command_line(study, str(folder), options), workers=workers))


def _folder_of(study: str) -> Path:
    """Return the default folder of a study."""
    return Path("runs") / Path(study).stem


def _check_study_named(what: str) -> None:
    """Check that what is to be pruned without a method is no model.

    Raises
    ------
    StudyError
        If it is one.
    """
    from pruning.files import is_file, is_folder

    path = Path(what)
    owned = path.suffix != ".toml" and len(path.parts) == 2 and not is_file(path) and not path.is_absolute()
    if is_file(path / "config.json") or (owned and not is_folder(path.parent)):
        raise StudyError(
            f"{what} is a model, not a study; say how to prune it: {command('prune', what, '--method', 'wanda')}"
        )
