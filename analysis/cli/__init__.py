"""The command line interface; one file for each group of commands."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

from pruning.errors import PrunescopeError
from pruning.extensions import ExtensionWarning

from . import looks, results, studies
from .app import app

__all__ = ["app", "looks", "main", "results", "studies"]

_STOPPED = 130


def main() -> None:
    """Run the command line; user errors print one line and exit with status 2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", ExtensionWarning)
            warnings.showwarning = partial(_show, warnings.showwarning)
            app(prog_name="prunescope")
    except PrunescopeError as error:
        _say(error)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == _STOPPED:  # typer has turned a KeyboardInterrupt into this
            _say("stopped; run the same command again to resume")
        raise


def _show(usual: Any, message: Warning | str, category: type[Warning], *where: Any, **settings: Any) -> None:
    """Show a warning on what other packages add as a line, and any other as usual."""
    if issubclass(category, ExtensionWarning):
        _say(message)
    else:
        usual(message, category, *where, **settings)


def _say(what: object) -> None:
    print(f"prunescope: {what}", file=sys.stderr)
