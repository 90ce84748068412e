"""The command line, under a name that is prunescope's alone: ``prunescope``, or ``python -m prunescope``."""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> None:
    """Run the command line; if a package of another's hides one of prunescope's, say so in a line, with status 2."""
    try:
        for package in ("pruning", "probes", "analysis"):  # each looks whether the others are there
            import_module(package)
    except ImportError as error:
        print(f"prunescope: {error}", file=sys.stderr)
        sys.exit(2)
    from analysis.cli import main as run

    run()


if __name__ == "__main__":
    main()
