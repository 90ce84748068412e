"""How it starts: names are imported when they are first used, and packages of others that hide ours are reported."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pruning", "probes", "analysis")
#: What takes long to load, and is not needed to print a version, a help text or a mistake.
HEAVY = ("torch", "transformers", "nnsight", "pandas", "matplotlib", "sklearn", "scipy")
#: Runs the command line with one line of words after the other, and prints, in the end, which of these were loaded.
ALL = f"""
import sys
from contextlib import redirect_stderr, suppress
from analysis.cli import main
for words in sys.argv[1:]:
    sys.argv = ["prunescope", *words.split()]
    with redirect_stderr(sys.stdout), suppress(SystemExit):
        main()
    print(end="\\0")
print(*set({HEAVY!r}) & set(sys.modules))
"""


def run(*words: object, path: tuple[Path, ...] = (ROOT,), cwd: Path = ROOT, **environment: str):
    """Run a fresh Python that looks for packages in some folders first."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def imported_for_type_checkers(package: str) -> dict[str, str]:
    """Return every name that a package's file imports below ``if TYPE_CHECKING:``, and the module that it is from."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: "." + (one.module or "") for one in block.body for alias in one.names}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_is_what_type_checkers_see(package):
    found = importlib.import_module(package)
    places = imported_for_type_checkers(package)
    assert sorted(places) == sorted(found.__all__)
    assert set(found.__all__) <= set(dir(found))
    for name, place in places.items():
        home = importlib.import_module(place, package) if place != "." else found
        if not hasattr(home, name):
            importlib.import_module(f"{place}.{name}", package)
        assert getattr(found, name) is getattr(home, name)
        assert name in vars(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_a_package_has_not_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'mistyped'"):
        _ = importlib.import_module(package).mistyped
    assert not hasattr(importlib.import_module(package), "__mistyped__")


def test_modules_are_attributes_of_their_package_as_after_an_ordinary_import():
    done = run("-c", "import pruning, analysis; print(pruning.files.__name__, analysis.study.__name__)")
    assert done.stdout.split() == ["pruning.files", "analysis.study"], done.stderr


#: What is typed, and words of the answer.
TYPED = [
    ("--version", "prunescope "),
    ("--help", "First steps"),
    ("prune --help", "--sparsity"),
    ("look --help", "VARIANT"),
    ("studies", "demo"),
    ("run nowhere.toml", "there is no study file"),
    ("run demos", 'unknown study "demos"; did you mean "demo"?'),
    ("run syntax.toml", "is not TOML"),
    ("run key.toml", 'unknown key "langauges"; did you mean "languages"?'),
    ("plan key-of-recipe.toml", 'unknown key "sparsty" in [recipes.0]; did you mean "sparsity"?'),
    ("prune key-of-text.toml", 'unknown key "heldot" in [text]; did you mean "heldout"?'),
]


def test_what_needs_no_model_loads_no_library_for_models(tmp_path):
    study = 'model = "demo"\nlanguages = ["en", "sw"]\n'
    (tmp_path / "syntax.toml").write_text('model = "demo')
    (tmp_path / "key.toml").write_text(study.replace("languages", "langauges"))
    (tmp_path / "key-of-recipe.toml").write_text(f'{study}[[recipes]]\nmethod = "wanda"\nsparsty = 0.5\n')
    (tmp_path / "key-of-text.toml").write_text(f'{study}[text]\nheldot = "bundled"\n')
    done = run("-c", ALL, *(words for words, _ in TYPED), cwd=tmp_path)
    answers = done.stdout.split("\0")
    assert len(answers) == len(TYPED) + 1, done.stderr
    for (words, said), answer in zip(TYPED, answers, strict=False):
        assert said in " ".join(answer.split()), words
    assert answers[-1].split() == []


def test_completion_loads_no_library_for_models():
    words = {"_PRUNESCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "prunescope ru", "COMP_CWORD": "1"}
    done = run("-c", ALL, "--help", **words)
    answer, loaded = done.stdout.split("\0")
    assert "run" in answer.split()
    assert loaded.split() == []


@pytest.fixture
def hidden(tmp_path):
    """Return a folder that has a package of another's under a name of ours."""

    def make(name: str, kind: str = "package") -> Path:
        if kind == "module":
            place = tmp_path / f"{name}.py"
        else:
            place = tmp_path / name / "__init__.py"
            place.parent.mkdir()
        place.write_text("mine = 1\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("imported", "theirs", "kind"),
    [
        ("pruning", "probes", "package"),
        ("pruning", "analysis", "module"),
        ("probes", "pruning", "package"),
        ("probes", "analysis", "package"),
        ("analysis", "pruning", "module"),
        ("analysis", "probes", "module"),
    ],
)
def test_another_package_of_the_same_name_is_named(hidden, imported, theirs, kind):
    folder = hidden(theirs, kind)
    done = run("-c", f"import {imported}", path=(folder, ROOT), cwd=folder)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    for word in (str(folder / theirs), f'prunescope\'s own package "{theirs}"', "rename it", "another folder"):
        assert word in last


@pytest.mark.parametrize("theirs", PACKAGES)
def test_the_command_line_says_in_a_line_which_package_hides_ours(hidden, theirs):
    folder = hidden(theirs)
    done = run("-m", "prunescope", "--version", path=(folder, ROOT), cwd=folder)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("prunescope: ")
    assert str(folder / theirs) in line
    assert "rename it" in line


def test_every_key_of_a_study_is_known_before_it_is_checked():
    from analysis.study.configuration import StudyConfig
    from analysis.study.written import KEYS, TABLES

    assert set(KEYS) == set(StudyConfig.model_fields)
    for name, table in TABLES.items():
        assert table.__name__ in str(StudyConfig.model_fields[name].annotation)
