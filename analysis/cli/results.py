"""Commands on the folder of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pruning.errors import StudyError, did_you_mean, shortened
from pruning.files import disk_errors, write_text

from .app import AFTER, DeviceMemory, Memory, StudyFolder, app, bytes_of, check_study_in, command, ends, examples

_VariantId = Annotated[str, typer.Option(help="Id of the variant: a folder below DIR/variants.")]


@app.command(
    rich_help_panel=AFTER,
    epilog=examples(
        "prunescope diagnose runs/demo --variant wanda-0.5-row-pruned-sw-s0 --language en --category text",
        "prunescope diagnose runs/demo --variant wanda-0.5-row-pruned-sw-s0 --language all --category text",
        "prunescope diagnose runs/demo --variant wanda-0.5-row-pruned-sw-s0 --language sw --half first",
    ),
)
def diagnose(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study (or of prunescope look).")],
    variant: _VariantId,
    language: Annotated[
        list[str], typer.Option(help='One of the study\'s languages; several times, or "all", for several of them.')
    ],
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
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from", help='Put states of items asked in this language into these; several times, or "all" languages.'
        ),
    ] = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
) -> None:
    """Find the components of a pruned model that recover its drop when they are restored.

    The study is completed first, if necessary; the diagnosis becomes part of its report.
    """
    from ..study.diagnosis_request import DiagnosisRequest
    from ..study.run import diagnose_study

    check_study_in(folder)
    settings: dict[str, Any] = {"half": half, "confirm": confirm, "sample": sample, "positions": positions}
    settings["sources"] = tuple(sources or ())
    requests = [DiagnosisRequest(variant=variant, language=own, category=category, **settings) for own in language]
    report, found = diagnose_study(
        folder, requests, memory=bytes_of("--memory", memory), device_memory=bytes_of("--device-memory", device_memory)
    )
    for heading, sentences in found.items():
        if len(found) > 1:
            typer.echo(heading)
        for sentence in sentences:
            typer.echo(f"- {sentence}")
    ends("report", report, ("export", folder, f"{variant}-checkpoint", "--variant", variant))


@app.command(
    rich_help_panel=AFTER,
    epilog=examples(
        "prunescope subspaces runs/demo",
        "prunescope subspaces runs/mine --out control.safetensors --random 1",
    ),
)
def subspaces(
    folder: StudyFolder,
    out: Annotated[Path | None, typer.Option(help="The file; DIR/subspaces.safetensors by default.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Dimensions; those of the study by default (languages less one).")
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(min=0, help="Write random subspaces of the same rank instead, with this seed: a control."),
    ] = None,
) -> None:
    """Write the language-specific subspaces of a study's dense model, for recipes with the parameter "specific"."""
    from ..study.subspaces import write_subspaces

    check_study_in(folder)
    found = write_subspaces(folder, out, rank, random)
    typer.echo(
        f"subspaces: {found.path} (rank {max(found.ranks)}, {len(found.ranks)} blocks, {', '.join(found.languages)})"
    )
    typer.echo(f'Next: add subspaces = "{found.path}" and parameters = {{ specific = [1, 0] }} to a recipe of a study')


@app.command(
    rich_help_panel=AFTER,
    epilog=examples(
        "prunescope power runs/mine --effect 0.05",
        "prunescope power runs/mine --effect 0.1 --metric accuracy_drop --comparison category",
    ),
)
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
    from rich.console import Console

    from ..study.power import power_table, study_power
    from ..study.run import STUDY_FILE

    check_study_in(folder)
    rows = study_power(folder, effect=effect, metric=metric, comparison=comparison, category=category, runs=runs)
    for table, words in power_table(rows, target):
        Console().print(table)
        typer.echo(words)
    if csv:
        csv.parent.mkdir(parents=True, exist_ok=True)
        write_text(csv, rows.to_csv(index=False))
        typer.echo(f"table: {csv}")
    typer.echo(
        f"Next: set the draws in {folder / STUDY_FILE}, then {command('run', folder / STUDY_FILE, '--out', folder)}"
    )


@app.command(
    rich_help_panel=AFTER,
    epilog=examples(
        "prunescope figures runs/demo --out paper/figures --width 3.25 --font-size 8 --kind mask-overlap",
        "prunescope figures runs/demo --out slides --width 10 --font-size 14 --format png",
    ),
)
def figures(
    folder: StudyFolder,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")],
    width: Annotated[float, typer.Option(min=1, max=40, help="In inches: 3.1 is a column, 6.5 a page.")] = 6.5,
    font_size: Annotated[float, typer.Option(min=3, max=40, help="Of labels, in points; all text in proportion.")] = 7,
    kind: Annotated[
        list[str] | None, typer.Option(help="A kind of figure, or one figure's name; all by default. Several times.")
    ] = None,
    form: Annotated[Literal["pdf", "png", "svg"], typer.Option("--format", help="Of the files.")] = "pdf",
) -> None:
    """Draw the figures of a finished study again, in the size that a paper or a talk needs."""
    from .. import plots
    from ..interactive import Study

    check_study_in(folder)
    there = Study.open(folder).figures
    known = list(dict.fromkeys(figure.kind for figure in there.values()))
    for name in kind or []:
        if name not in known and name not in there:
            raise StudyError(f'there is no figure "{shortened(name)}" in {folder}; {did_you_mean(name, known)}')
    if out.resolve() == (folder / "figures").resolve():
        raise StudyError(f"{out} has the figures of the study itself, as its report shows them; choose another folder")
    wanted = [figure for figure in there.values() if not kind or {figure.kind, figure.name} & {*kind}]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with plots.font_size(font_size):
        for figure in wanted:
            plots.save(figure.draw(width=width), out, figure.name, [form])
    ends(f"{len(wanted)} figure{'s' * (len(wanted) != 1)}", out)


@app.command(
    rich_help_panel=AFTER,
    epilog=examples(
        "prunescope combine runs/llama runs/aya --out runs/both",
        "prunescope combine runs/mc4 runs/flores runs/wiki --out runs/texts",
    ),
)
def combine(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR DIR...", help="Folders of finished studies.")],
    out: Annotated[Path, typer.Option(help="Folder for the page, the data and the figures.")],
) -> None:
    """Show several studies side by side, and pool the effects that they have in common."""
    from ..study.combine import combine_studies

    for folder in folders:
        check_study_in(folder)
    ends("report", combine_studies(folders, out, lambda words: typer.echo(words, err=True)))


@app.command(
    rich_help_panel=AFTER,
    epilog=examples("prunescope export runs/demo checkpoint --variant wanda-0.5-row-pruned-sw-s0"),
)
def export(
    folder: StudyFolder,
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the checkpoint.")],
    variant: _VariantId,
    stream: Annotated[bool, typer.Option(help="Write block by block, for models larger than memory.")] = False,
) -> None:
    """Write a pruned variant as an ordinary checkpoint that from_pretrained loads."""
    from pruning import Variant, load_model
    from pruning.files import is_folder

    from ..study.run import STUDY_FILE
    from ..study.study_file import load_study

    resolved = load_study(folder / STUDY_FILE)
    place = folder / "variants" / variant
    if not is_folder(place):
        known = sorted(p.name for p in (folder / "variants").glob("*") if p.is_dir())
        raise StudyError(f'there is no variant "{shortened(variant)}" in {folder}; {did_you_mean(variant, known)}')
    opened = Variant.open(place)
    model, tokenizer = load_model(resolved.model, dtype="checkpoint", device="cpu", stream=stream)
    said = opened.export(model, tokenizer, target)
    ends("checkpoint", f"{target}" + (f" ({said})" if said else ""), ("look", resolved.model, target))
