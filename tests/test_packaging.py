"""What is packaged: every file that the packages read, by what pyproject.toml says."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]


def tracked(package: str) -> set[Path]:
    """Return the files of a package that are not Python, as git knows them; all there are, where there is no git."""
    place = ROOT / package
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files", "-z", "."], cwd=place, capture_output=True, text=True, check=True)
        files = {place / name for name in done.stdout.split("\0") if name}
    else:
        files = {path for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    return {path for path in files if path.suffix != ".py"}


@pytest.mark.parametrize("package", ["pruning", "probes", "analysis"])
def test_every_file_that_is_not_python_is_packaged(package):
    found = {path for pattern in PACKAGED[package] for path in (ROOT / package).glob(pattern)}
    assert tracked(package) == found


def test_every_pattern_of_packaged_files_finds_some():
    for package, patterns in PACKAGED.items():
        for pattern in patterns:
            assert list((ROOT / package).glob(pattern)), pattern


def test_every_folder_with_python_files_is_a_package():
    folders = {path.parent for package in PACKAGED for path in (ROOT / package).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)
