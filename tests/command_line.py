"""The command line, and what every mistake must look like on it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from analysis.cli import main

#: For what must be a process of its own: to be killed, or held to limits.
COMMAND = [sys.executable, "-c", "from analysis.cli import main; main()"]


def prunescope(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, as quick as it gets."""
    out, err = StringIO(), StringIO()
    words = ["prunescope", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", words):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


# CPython keeps frames in chunks of 16 KB. Where a call happens to begin a new one, memory is mapped and unmapped each
# time, which was a third of the time of a study in these tests. A frame that asks for much gets a large chunk.
prunescope.__code__ = prunescope.__code__.replace(co_stacksize=1 << 16)


def expect_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("prunescope: ")
    for word in words:
        assert word in last, last


def nothing_was_made(out: Path) -> bool:
    """Tell whether a study's folder, which was not there before, is not there now."""
    return not out.exists()
