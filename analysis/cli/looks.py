"""Commands that look at variants and checkpoints without a study file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .app import LOOK, START, DeviceMemory, Languages, Memory, Text, app, bytes_of, ends, examples, listed

_Items = Annotated[
    str | None, typer.Option(help='"bundled", "file:PATH/{lang}.jsonl" or "none"; bundled, if there are any.')
]
_Segments = Annotated[int, typer.Option(help="Held-out and fitting segments per language.")]


@app.command(
    rich_help_panel=START,
    epilog=examples(
        "prunescope look demo runs/wanda-sw",
        "prunescope look demo runs/wanda-sw/variants/wanda-0.5-row-pruned-sw-s0 --languages en,sw --items none",
        "prunescope look owner/model checkpoints/pruned owner/model-awq --out runs/theirs",
    ),
)
def look(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The dense model: hub id, folder, or demo.")],
    variants: Annotated[
        list[str],
        typer.Argument(
            metavar="VARIANT",
            help="Variants of it: folders that prunescope prune wrote (or DIR, for all in it), checkpoints, hub ids.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; runs/look-NAME by default. Run again to resume.")
    ] = None,
    languages: Languages = None,
    text: Text = "bundled",
    segments: _Segments = 128,
    items: _Items = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
) -> None:
    """Read a model and its variants, and write frames, figures and a report, as a study does."""
    _look(model, variants, "look", out, languages, text, segments, items, memory, device_memory)


@app.command(
    rich_help_panel=LOOK,
    epilog=examples("prunescope compare checkpoints/dense checkpoints/pruned --languages ar,sw,zh"),
)
def compare(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The dense model: hub id, folder, or demo.")],
    pruned: Annotated[
        str, typer.Argument(metavar="PRUNED", help="The same model, pruned elsewhere: hub id or folder.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; runs/compare-PRUNED by default. Run again to resume.")
    ] = None,
    languages: Languages = None,
    text: Text = "bundled",
    segments: _Segments = 128,
    items: _Items = None,
    memory: Memory = None,
    device_memory: DeviceMemory = None,
) -> None:
    """Compare a model pruned elsewhere with its dense parent: prunescope look, with a single checkpoint."""
    _look(dense, [pruned], "compare", out, languages, text, segments, items, memory, device_memory)


def _look(
    model: str,
    variants: Sequence[str],
    what: str,
    out: Path | None,
    languages: str | None,
    text: str,
    segments: int,
    items: str | None,
    memory: str | None,
    device_memory: str | None,
) -> None:
    from pruning.text.sources import BUNDLED_LANGUAGES

    from ..study.run import run_study
    from ..study.without_file import check_no_recipes, looking_study

    tags = BUNDLED_LANGUAGES if languages is None else listed(languages)
    study = looking_study(model, variants, languages=tags, text=text, segments=segments, items=items)
    first = next(iter(study.imported))
    folder = out or Path("runs") / f"{what}-{first}"
    check_no_recipes(folder)
    report = run_study(
        study,
        folder,
        memory=bytes_of("--memory", memory),
        device_memory=bytes_of("--device-memory", device_memory),
    )
    diagnose = ("diagnose", folder, "--variant", first, "--language", study.languages[0], "--category", "text")
    ends("report", report, diagnose)
