from __future__ import annotations

import sys
from importlib import invalidate_caches
from itertools import count

import pytest

from pruning.code_version import code_version

NUMBERS = count()
SOURCE = '''"""What it is for."""


def half(x):
    """Return half of it."""
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x / 2  # exactly
'''


@pytest.fixture
def version(tmp_path, monkeypatch):
    """Return the version of a package with one module of some source, and other files."""
    monkeypatch.syspath_prepend(tmp_path)

    def of(source: str, **others: str) -> str:
        name = f"package_{next(NUMBERS)}"  # a version is worked out once for each name
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "module.py").write_text(source)
        for stem, text in others.items():
            (tmp_path / name / f"{stem}.j2").write_text(text)
        invalidate_caches()
        return code_version(name)

    yield of
    for name in [name for name in sys.modules if name.startswith("package_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("What it is for.", "What this is."),
        ("Return half of it.", "Return one half."),
        ("# exactly", "# in floating point"),
        ("is negative", "is below zero"),
        ("return x / 2", "return (x / 2)"),
        ("\n\n\ndef", "\n\ndef"),
    ],
)
def test_other_words_are_the_same_version(version, old, new):
    assert version(SOURCE) == version(SOURCE.replace(old, new))


@pytest.mark.parametrize(("old", "new"), [("x / 2", "x / 3"), ("x < 0", "x <= 0"), ("half", "part")])
def test_other_code_is_another_version(version, old, new):
    assert version(SOURCE) != version(SOURCE.replace(old, new))


def test_a_template_counts_too(version):
    assert version(SOURCE, page="a") != version(SOURCE, page="b")


def test_packages_have_versions_of_their_own():
    assert code_version("pruning") == code_version("pruning")
    assert len({code_version("pruning"), code_version("probes"), code_version("pruning", "probes")}) == 3
