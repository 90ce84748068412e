"""The studies that come with prunescope: one study file each, in the folder ``studies``."""

from __future__ import annotations

from importlib.resources import files as package_files

from pruning.errors import StudyError, unknown

_FOLDER, _SUFFIX = "studies", ".toml"


def preset_names() -> list[str]:
    """Return the names of the studies."""
    names = (file.name for file in (package_files("analysis.study") / _FOLDER).iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def preset_text(name: str) -> str:
    """Return a study's file, comments and all.

    Raises
    ------
    StudyError
        If there is none of this name.
    """
    if name not in preset_names():
        raise StudyError(unknown("study", name, preset_names()))
    return (package_files("analysis.study") / _FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def preset_summary(name: str) -> str:
    """Return what a study is, the first line of its file.

    >>> preset_summary("demo")
    'The embedded study: a real model and real text in eight languages that come with the packages.'
    """
    return preset_text(name).partition("\n")[0].lstrip("# ")
