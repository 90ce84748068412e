"""Loading a model by hub id, by folder, or as ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ModelError, shortened
from ..files import is_folder
from .anatomy import Anatomy
from .checkpoint import AGAIN, Plan, Shards, checked_plan, foreign
from .download import downloaded
from .embedded import DEMO, demo_checkpoint
from .quiet import errors_only, no_progress_bars
from .streaming import open_streamed

Dtype = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]

#: Of file systems, in letters: a part of a path, and a whole one.
_LONGEST_PART, _LONGEST_PATH = 255, 4095


def load_model(
    name: str, *, dtype: Dtype = "auto", device: str = "auto", stream: bool = False, revision: str | None = None
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, ready to be read or pruned.

    Parameters
    ----------
    name
        ``"demo"`` (base Gemma 3 270M from the ``demo`` extra), a hub id, or a folder with a checkpoint. A hub id may
        end in ``@`` and a revision. Private and gated models need a token in ``HF_TOKEN``; with ``HF_HUB_OFFLINE=1``
        only what was downloaded before is used.
    dtype
        ``checkpoint``: the one its weights are stored in; ``auto``: float32 on a CPU, else ``checkpoint``.
    device
        ``cpu``, ``cuda``, ``cuda:1`` and the like; ``auto``: ``cuda`` where there is one, else ``cpu``.
    stream
        Leave the weights in the checkpoint's shards, to be read a block at a time: for models larger than memory, which
        can be pruned and exported so, not read by probes.
    revision
        Of a model on a hub: a branch, a tag or a commit; its main branch by default.

    Returns
    -------
    model, tokenizer
        As ``transformers`` has them; the model in evaluation mode.

    Raises
    ------
    ModelError
        If there is no such model or device, its weights are not safetensors, its files are damaged, it needs code of
        its own, or its architecture is unknown.
    """
    check_model_name(name)
    place = open_device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "checkpoint"
    wanted: torch.dtype | None = None if dtype == "checkpoint" else getattr(torch, dtype)
    folder = checkpoint_folder(name, revision)
    with no_progress_bars():
        shards = Shards(folder)
        plan = checked_plan(shards)
        tokenizer = _open_tokenizer(folder)
        model = open_streamed(shards, plan, wanted, place) if stream else _open_whole(folder, plan, wanted).to(place)
    model.name_or_path = str(folder) if name == DEMO else name
    Anatomy(model)
    return model, tokenizer


def check_model_name(name: str) -> None:
    """Check that a model can be called so, without looking whether there is one.

    Raises
    ------
    ModelError
        If `name` is empty, longer than any path, or has letters that no path has.
    """
    longest = max(map(len, Path(name).parts), default=0)
    if not name.strip() or "\0" in name or longest > _LONGEST_PART or len(name) > _LONGEST_PATH:
        raise ModelError(f'"{shortened(name)}" cannot be a model; give "demo", a hub id, or a folder with a checkpoint')


def device_named(name: str) -> torch.device:
    """Return the device that `name` stands for, whether this machine has it or not.

    Raises
    ------
    ModelError
        If torch knows no such kind of device.

    Examples
    --------
    >>> device_named("cuda:1")
    device(type='cuda', index=1)
    """
    try:
        return torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ModelError(f'unknown device "{shortened(name)}"; use "auto", "cpu", "cuda" or "cuda:1", say') from error


def open_device(name: str) -> torch.device:
    """Return the device that `name` stands for, ``auto`` for the one that a model should go to.

    Raises
    ------
    ModelError
        If this machine has no such device.
    """
    found = _devices()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_named(name)
    if (device.index or 0) >= found.get(device.type, 0):
        there = [kind if count == 1 else f"{kind}:{n}" for kind, count in found.items() for n in range(count)]
        raise ModelError(f'this machine has no device "{shortened(name)}"; it has {", ".join(there)}')
    return device


def _devices() -> dict[str, int]:
    """Return how many devices of each kind there are."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with foreign(f"the tokenizer of model {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("A word, 词, كلمة.\n")  # a damaged one may well load
    return tokenizer


def _open_whole(folder: Path, plan: Plan, dtype: torch.dtype | None) -> Any:
    # else a table of what does not fit comes before our line
    with errors_only(), foreign(f"model {folder}"):
        try:
            model, found = plan.kind.from_pretrained(
                folder,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except RuntimeError as error:
            if "conversion of the weights" not in str(error):
                raise
            raise ModelError(
                f"the weights of model {folder} are not all there, or do not fit together; {AGAIN}"
            ) from error
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"{name} of model {folder} has shape {tuple(stored)}, but its config.json asks for {tuple(expected)}; "
            f"{AGAIN}"
        )
    missing = sorted(found["missing_keys"])  # transformers would draw them at random
    if missing:
        raise ModelError(
            f"model {folder} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more parameters" if len(missing) > 1 else "")
            + f"; {AGAIN}"
        )
    return model.eval()


def checkpoint_bytes(name: str) -> int | None:
    """Return the size of a model's weights on disk, or ``None`` for a model on a hub."""
    folder = demo_checkpoint() if name == DEMO else Path(name)
    return Shards(folder).bytes if is_folder(folder) else None


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model's checkpoint, downloading one from a hub.

    Raises
    ------
    ModelError
        If there is no such model.
    """
    local = name == DEMO or is_folder(name)
    if local and revision is not None:
        raise ModelError(f'"{shortened(name)}" is not on a hub, so it has no revision; leave revision out')
    if local:
        return demo_checkpoint() if name == DEMO else Path(name)
    repository, _, stated = name.partition("@")
    if stated and revision not in (None, stated):
        raise ModelError(f'model "{shortened(name)}" and revision "{shortened(revision)}" contradict each other')
    return downloaded(repository, revision or stated or None)
