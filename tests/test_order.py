"""The order in which test files are run."""

from __future__ import annotations

from pathlib import Path

from conftest import LONGEST


def test_the_longest_files_are_there():
    assert set(LONGEST) <= {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
