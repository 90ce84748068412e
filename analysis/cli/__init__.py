"""The command line interface; one file for each group of commands."""

from __future__ import annotations

import sys

from rich.console import Console

from pruning.errors import PrunescopeError

from . import looks, results, studies
from .app import app

__all__ = ["app", "looks", "main", "results", "studies"]

_STOPPED = 130


def main() -> None:
    """Run the command line; user errors print one line and exit with status 2."""
    try:
        app(prog_name="prunescope")
    except PrunescopeError as error:
        Console(stderr=True, soft_wrap=True).print(f"prunescope: {error}", markup=False, highlight=False)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == _STOPPED:  # typer has turned a KeyboardInterrupt into this
            print("prunescope: stopped; run the same command again to resume", file=sys.stderr)
        raise
