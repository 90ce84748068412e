"""What other packages add, found by the entry points that they declare; see docs/extending.md.

A package names what it adds in its ``pyproject.toml``, in a group for each kind of thing::

    [project.entry-points."prunescope.methods"]
    halves = "their_package.methods:HALVES"

Entry points are loaded when something is asked for that does not come with prunescope, or everything is listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from .code_version import code_version
from .errors import first_line

Group = Literal["methods", "metrics", "text_sources", "item_sources", "architectures"]


class ExtensionWarning(UserWarning):
    """Something that another package adds cannot be used. Everything else can."""


@dataclass(frozen=True)
class Extension:
    """What another package adds.

    Attributes
    ----------
    name
        Of the entry point, by which studies call it.
    package
        Name and version of the package.
    module
        The package or module to import it from.
    found
        What the entry point names.
    """

    name: str
    package: str
    module: str
    found: Any

    @property
    def code(self) -> str:
        """Hash of the source of its package: what was made with other code is not up to date."""
        return code_version(self.module)


@cache
def extensions(group: Group, check: Callable[[str, Any], object]) -> dict[str, Extension]:
    """Load what other packages add in a group, once.

    Parameters
    ----------
    group
        Without the ``prunescope.`` in front.
    check
        Called with the name and what was found; raises an exception that says why it cannot be used.

    Warns
    -----
    ExtensionWarning
        If an entry point cannot be loaded or used, or its name is taken: one line with the package's name. It is left
        out.
    """
    found: dict[str, Extension] = {}
    for point in sorted(entry_points(group=f"prunescope.{group}"), key=lambda point: point.name):
        problem = f'"{point.name}" is taken' if point.name in found else ""
        if not problem:
            try:
                loaded = point.load()
                check(point.name, loaded)
                found[point.name] = Extension(point.name, _package(point), point.module.partition(".")[0], loaded)
            except Exception as error:  # noqa: BLE001  (code of others may fail in any way)
                problem = first_line(error)
        if problem:
            what = f'"{point.name}" ({point.group} = {point.value})'
            warnings.warn(
                f"{_package(point)} adds {what}, which cannot be used: {problem}", ExtensionWarning, stacklevel=2
            )
    return found


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package"
