"""The version of the code that makes a result: what the code does, not how it is worded."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def code_version(*packages: str) -> str:
    """Return a hash of the source of some packages (or modules), such as ``"pruning"`` or ``"analysis.metrics"``.

    Comments, docstrings, formatting and the wording of errors do not count, so that a change of these does not have a
    study made again. Templates count byte by byte.
    """
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        assert spec is not None
        place = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
        root = place if place.is_dir() else place.parent
        for path in _sources(root) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
            content = path.read_bytes()
            digest.update(repr(_shape(ast.parse(content))).encode() if path.suffix == ".py" else content)
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".j2"):
            yield path


def _shape(node: Any) -> Any:
    """Return a syntax tree as nested lists that do not depend on the version of Python."""
    if isinstance(node, list):
        return [_shape(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return "Raise"
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields["body"] = node.body[_has_docstring(node.body) :]
    return [type(node).__name__, *([name, _shape(value)] for name, value in fields.items())]


def _has_docstring(body: list[ast.stmt]) -> bool:
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
