"""Writing a new study file, with comments."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from pruning.errors import StudyError, shortened, unknown
from pruning.files import is_folder, write_text
from pruning.methods import known_methods, method_named
from pruning.models.naming import DEMO

from .study_file import parse_study

#: What is written where nothing else is said.
DEFAULTS = {
    "model": DEMO,
    "languages": "en,sw,zh",
    "methods": "wanda",
    "sparsity": "0.5",
    "text": "bundled",
}


def check_new(file: Path) -> None:
    """Check that a study file can be written, and writes over nothing.

    Raises
    ------
    StudyError
        If it exists, or is not called so that a study file is found.
    """
    if file.exists() or file.is_symlink():
        raise StudyError(f"{file} exists, and is not overwritten; give another name: prunescope new mine.toml")
    if file.suffix != ".toml":
        raise StudyError(f'{shortened(file)}: the name of a study file ends in ".toml"; use {shortened(file)}.toml')


def study_text(
    file: Path,
    model: str,
    *,
    languages: Sequence[str],
    calibration: Sequence[str],
    methods: Sequence[str],
    sparsity: Sequence[str],
    text: str,
) -> str:
    """Return a study file with comments.

    Parameters
    ----------
    file
        Where it will be; folders are stated relative to it.
    model, languages, calibration, methods, text
        As in a study file.
    sparsity
        Numbers, for the methods that prune.

    Raises
    ------
    StudyError
        If one of the arguments is invalid.
    """
    for method in methods:
        if method not in known_methods():
            raise StudyError(unknown("method", method, known_methods()))
    pruning = [method for method in methods if method_named(method).quantize is None]
    quantizing = [method for method in methods if method not in pruning]
    recipes = _PRUNING.format(methods=_toml(pruning), sparsity=_toml([_number(one) for one in sparsity]))
    content = _FILE.format(
        file=file,
        model=_toml(_seen_from(file, model)),
        languages=_toml(list(languages)),
        text=_toml(_text_seen_from(file, text)),
        sets=_toml(list(calibration)),
        recipes=(recipes if pruning else "") + (_QUANTIZING.format(methods=_toml(quantizing)) if quantizing else ""),
    )
    parsed = tomllib.loads(content)
    where = {"model": model, "text": dict.fromkeys(("calibration", "parallel", "heldout"), text)}
    parse_study(parsed | where, "new study")  # paths as they are seen from here
    return content


def write_new(file: Path, content: str) -> None:
    """Write a study file, which must not exist, whole or not at all."""
    check_new(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, content)


_FILE = """\
# What it will cost: prunescope plan {file}      Run it, and resume it: prunescope run {file}
# Every key, with its default: the README, "Your own study".

model = {model}                # a hub id ("owner/name" or "owner/name@revision"), a folder with a checkpoint, or "demo"
languages = {languages}        # evaluation languages, BCP-47; at least two

[text]                         # each "bundled", "file:PATH/{{lang}}.jsonl" (or .txt, .parquet) or "hub:PRESET"
calibration = {text}           # calibrates pruning
parallel = {text}              # fits the subspaces: translations have the same ids
heldout = {text}               # is evaluated; the three never overlap

[calibration]
sets = {sets}                  # mixes such as "en+sw" have the same total number of samples; "all": all languages
samples = 32                   # blocks of text per set ...
length = 128                   # ... of this many tokens each
seeds = [0, 1]                 # draws of the text: with a single one, no difference between sets can be tested

{recipes}\
[evaluation]
segments = 128                 # held-out segments per language
fit_segments = 128             # parallel segments per language

[tasks]
# items = "none"               # by default the bundled ones, if they cover all languages; or "file:PATH/{{lang}}.jsonl"
per_category = 100             # items of each category, at most
"""
_PRUNING = """\
[[recipes]]
method = {methods}             # lists make a grid; all methods: docs/pruning.md
sparsity = {sparsity}          # share of weights to remove
# pattern = "2:4"              # "row", "matrix", "model", "2:4", "neurons" ...; by default the method's own

"""
_QUANTIZING = """\
[[recipes]]
method = {methods}             # these quantize
bits = [4]                     # 8, 4, 3 or 2
group = 128                    # inputs that share a scale; 0: the whole row

"""


def _toml(value: Any) -> str:
    """Return a value as TOML has it, on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise StudyError(f'sparsity "{shortened(word)}" is no number; use shares of weights such as 0.3,0.5') from error


def _seen_from(file: Path, name: str) -> str:
    """Return a folder as it is seen from the study file; other names as they are."""
    return os.path.relpath(name, file.parent) if name.strip() and name != DEMO and is_folder(name) else name


def _text_seen_from(file: Path, spec: str) -> str:
    kind, _, path = spec.partition(":")
    return f"file:{os.path.relpath(path, file.parent)}" if kind == "file" and path else spec
