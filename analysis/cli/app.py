"""The application, options that several commands share, and how every command ends."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from pruning.errors import StudyError, shortened
from pruning.files import is_file

#: Headings of ``prunescope --help``.
START, STUDIES, LOOK, AFTER = "Start here", "Studies", "Without a study file", "With results"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look inside pruned multilingual language models: what did pruning break, and how did the language of the "
    "calibration text decide it?",
    epilog="First steps: prunescope run demo (a whole study), or prunescope new (a study of your own). "
    "Each command has examples: prunescope COMMAND --help.",
)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"prunescope {version('prunescope')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def examples(*commands: str) -> str:
    """Return the end of a command's help."""
    return "\n\n".join([f"Example{'s' * (len(commands) > 1)}:", *(f"  {one}" for one in commands)])


def study_names(incomplete: str) -> list[str]:
    """Complete the name of a study."""
    from ..study.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """Complete the name of a method."""
    from pruning import known_methods

    return [name for name in known_methods() if name.startswith(incomplete)]


def language_list(incomplete: str) -> list[str]:
    """Complete the last tag of a list of languages."""
    from pruning.text.sources import BUNDLED_LANGUAGES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{tag}" for tag in BUNDLED_LANGUAGES if tag.startswith(last)]


Memory = Annotated[
    str | None,
    typer.Option(help="Memory cap, such as 6GiB; free memory by default. A larger model is read from its shards."),
]
DeviceMemory = Annotated[str | None, typer.Option(help="GPU memory cap, such as 20GiB; free GPU memory by default.")]
On = Annotated[
    str | None,
    typer.Option(
        help='Where units run: "ray" (the Ray cluster of this machine, or one started here) or "ray:HOST:PORT"; '
        "in this process by default."
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(
        help='A study file (TOML), or the name of a study that "prunescope studies" lists.', autocompletion=study_names
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the study; runs/NAME by default. Run again to resume."),
]
StudyFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study.")]
Languages = Annotated[
    str | None,
    typer.Option(
        help="Evaluation languages, BCP-47 tags with commas between; those of the bundled text by default.",
        autocompletion=language_list,
    ),
]
Text = Annotated[str, typer.Option(help='"bundled", "hub:PRESET" or "file:PATH/{lang}.jsonl".')]


def bytes_of(option: str, amount: str | None) -> int | None:
    """Return an amount of memory in bytes.

    Raises
    ------
    StudyError
        If it is none.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return None if amount is None else int(TypeAdapter(ByteSize).validate_python(amount))
    except ValidationError as error:
        raise StudyError(
            f'{option} "{shortened(amount)}" is not an amount of memory; use a form such as 6GiB or 500MB'
        ) from error


def listed(words: str) -> list[str]:
    """Return the parts of a list with commas.

    >>> listed("en, sw,")
    ['en', 'sw']
    """
    return [word.strip() for word in words.split(",") if word.strip()]


def ends(what: str, where: object, *following: Sequence[object]) -> None:
    """Print what a command did, where, and what to type next.

    Parameters
    ----------
    what, where
        What was made, and its place.
    *following
        The words of commands that may follow.
    """
    typer.echo(f"{what}: {where}")
    for words in following:
        typer.echo(f"Next: {command(*words)}")


def command(*words: object) -> str:
    """Return a command as it is typed.

    >>> command("export", "my runs", "out")
    "prunescope export 'my runs' out"
    """
    return shlex.join(["prunescope", *map(str, words)])


def check_study_in(folder: Path) -> None:
    """Check that a folder has a study.

    Raises
    ------
    StudyError
        If it has not.
    """
    from ..study.run import STUDY_FILE

    if not is_file(folder / STUDY_FILE):
        raise StudyError(f"there is no study in {folder}; run one first: prunescope run STUDY.toml --out {folder}")


def check_written(study: str) -> None:
    """Look for mistakes in a study file that can be seen at once, before what takes seconds to load is imported.

    Raises
    ------
    StudyError
        If there is no such study, or its file is not TOML or has an unknown key.
    """
    from ..study.written import study_named

    study_named(study)
