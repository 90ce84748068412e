"""Names that a package imports when they are first used, so that the command line starts without loading PyTorch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` (PEP 562) for a package that imports its names when they are first used.

    Which names it has, and from where, is written once: in the imports below ``if TYPE_CHECKING:`` in its
    ``__init__.py``, which type checkers read, too. Its modules are found as well, as after an ordinary import.

    Parameters
    ----------
    package, file
        Its ``__name__`` and ``__file__``.
    """
    places = _places(file)

    def find(name: str) -> Any:
        if name in places:
            found = _imported(package, places[name], name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            found = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)  # from now on it is found without asking
        return found

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return find, listed


def _places(file: str) -> dict[str, str]:
    """Return the names that a file imports for type checkers, each with the module below the package that has it."""
    tree = ast.parse(Path(file).read_bytes())
    blocks = (node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    statements = (statement for block in blocks for statement in block)
    return {
        alias.name: statement.module or ""
        for statement in statements
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def _imported(package: str, place: str, name: str) -> Any:
    """Return what ``from .place import name`` imports in a package."""
    if not place:
        return import_module(f"{package}.{name}")
    module = import_module(f"{package}.{place}")
    return getattr(module, name) if hasattr(module, name) else import_module(f"{package}.{place}.{name}")
