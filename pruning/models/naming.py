"""How models are named: ``demo``, a Hub id, or a folder with a checkpoint."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ..errors import ModelError, shortened

DEMO = "demo"
#: What frames and reports call the embedded model.
DEMO_NAME = "gemma-3-270m (embedded, 4-bit rounded)"

Dtype = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]

#: Limits of file systems on the length of a path component and of a path.
_LONGEST_PART, _LONGEST_PATH = 255, 4095


def check_model_name(name: str) -> None:
    """Check that `name` could be a model; whether the model exists is not checked.

    Raises
    ------
    ModelError
        If `name` is empty, too long for a path, or contains a null character.
    """
    longest = max(map(len, Path(name).parts), default=0)
    if not name.strip() or "\0" in name or longest > _LONGEST_PART or len(name) > _LONGEST_PATH:
        raise ModelError(f'"{shortened(name)}" cannot be a model; use "demo", a Hub id, or a checkpoint folder')


def instead_of(name: str) -> str:
    """Return what to give instead of a name under which there is no model.

    >>> instead_of("Demo")
    'did you mean "demo"? give "demo" (the embedded model), a folder with config.json, tokenizer and *.safetensors, or \
a Hub id'
    """
    close = f'did you mean "{DEMO}"? ' if get_close_matches(name.lower(), [DEMO]) else ""
    known = f'"{DEMO}" (the embedded model), a folder with config.json, tokenizer and *.safetensors, or a Hub id'
    return f"{close}give {known}"
