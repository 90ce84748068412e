"""Loading a model by Hub id, by folder, or as ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from humanize import naturalsize

from ..errors import ModelError, shortened
from ..files import is_folder
from ..memory import free_memory
from .anatomy import Anatomy
from .checkpoint import AGAIN, Plan, Shards, checked_plan, foreign, planned_model
from .download import downloaded, settings_downloaded
from .embedded import demo_checkpoint
from .naming import DEMO, Dtype, check_model_name
from .quantized import ask_for_decoding, cannot_decode, decoded
from .quiet import errors_only, no_progress_bars
from .streaming import open_streamed


def load_model(
    name: str, *, dtype: Dtype = "auto", device: str = "auto", stream: bool = False, revision: str | None = None
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, ready to be read or pruned.

    Parameters
    ----------
    name
        ``"demo"`` (base Gemma 3 270M from the ``demo`` extra), a Hub id, or a checkpoint folder. A Hub id may end in
        ``@`` and a revision. Private and gated models need a token in ``HF_TOKEN``; with ``HF_HUB_OFFLINE=1`` only
        cached models are used.
    dtype
        ``checkpoint``: the dtype of the stored weights; ``auto``: float32 on a CPU, otherwise ``checkpoint``.
    device
        ``cpu``, ``cuda``, ``cuda:1`` and so on; ``auto``: ``cuda`` if available, otherwise ``cpu``.
    stream
        Leave the weights in the checkpoint's shards and load one block at a time, for models larger than memory. Such
        models can be pruned, exported, and read by :func:`probes.read_streams`.
    revision
        Branch, tag or commit of a Hub model; its main branch by default.

    Returns
    -------
    model, tokenizer
        The ``transformers`` objects, the model in evaluation mode.

    Raises
    ------
    ModelError
        If the model or device does not exist, the weights are not safetensors, a file is damaged, the model needs
        remote code, its architecture is unknown, its weights are quantized and cannot be decoded here, or they do not
        fit into what is free of the memory.
    """
    return _loaded(name, dtype, device, stream, revision, tokenizes=True)


def load_weights(name: str, *, dtype: Dtype = "auto", device: str = "auto", stream: bool = False) -> Any:
    """Load a language model without its tokenizer, which checkpoints that were made from another one may lack.

    Parameters and errors are those of :func:`load_model`.
    """
    return _loaded(name, dtype, device, stream, None, tokenizes=False)[0]


def _loaded(
    name: str, dtype: Dtype, device: str, stream: bool, revision: str | None, *, tokenizes: bool
) -> tuple[Any, Any]:
    check_model_name(name)
    place = open_device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "checkpoint"
    wanted: torch.dtype | None = None if dtype == "checkpoint" else getattr(torch, dtype)
    folder = checkpoint_folder(name, revision)
    with no_progress_bars():
        shards = Shards(folder)
        plan = checked_plan(shards)
        if not stream:
            _check_room(name, shards, wanted, place)
        tokenizer = _open_tokenizer(folder) if tokenizes else None
        if stream and getattr(plan.config, "quantization_config", None) is not None:
            raise ModelError(f"model {folder} is quantized, so it cannot be streamed; load it whole (stream=False)")
        model = open_streamed(shards, plan, wanted, place) if stream else _open_whole(folder, plan, wanted).to(place)
    model.name_or_path = str(folder) if name == DEMO else name
    Anatomy(model)
    return model, tokenizer


def describe_model(name: str, *, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Return a model without its weights, to plan for, and its tokenizer; a Hub model's weights are not downloaded.

    Parameters
    ----------
    name
        As for :func:`load_model`.
    dtype
        Dtype of its parameters; that of the configuration by default.

    Returns
    -------
    model, tokenizer
        The ``transformers`` objects, all parameters and buffers of the model on the meta device.

    Raises
    ------
    ModelError
        If there is no such model, its configuration is damaged, or its architecture is unknown.
    """
    check_model_name(name)
    folder = checkpoint_folder(name, weights=False)
    with no_progress_bars():
        _, model = planned_model(folder, dtype=dtype)
        tokenizer = _open_tokenizer(folder)
    model.name_or_path = str(folder) if name == DEMO else name
    Anatomy(model)
    return model, tokenizer


def device_named(name: str) -> torch.device:
    """Parse a device name; whether this machine has the device is not checked.

    Raises
    ------
    ModelError
        If torch has no such device type.

    Examples
    --------
    >>> device_named("cuda:1")
    device(type='cuda', index=1)
    """
    try:
        return torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ModelError(f'unknown device "{shortened(name)}"; use "auto", "cpu", "cuda" or e.g. "cuda:1"') from error


def open_device(name: str) -> torch.device:
    """Return the device called `name`, which must exist; ``auto`` is CUDA if available, otherwise the CPU.

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
    """Return the number of devices of each type."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})


def _check_room(name: str, shards: Shards, dtype: torch.dtype | None, device: torch.device) -> None:
    """Check that the weights fit into the memory of the device, and of the machine, before any of them is loaded."""
    needed = shards.bytes
    if dtype is not None:
        needed = dtype.itemsize * sum(torch.Size(shape).numel() for shape in shards.shapes.values())
    places = {"memory": free_memory()}
    if device.type == "cuda":
        places[f"memory of {device}"] = free_memory(device)
    for what, room in places.items():
        if needed > room:
            hint = ', or in 16 bits (dtype = "bfloat16")' if dtype == torch.float32 else ""
            raise ModelError(
                f'the weights of "{shortened(name)}" take {naturalsize(needed, binary=True)}, but only '
                f"{naturalsize(room, binary=True)} of {what} is available; load it one block at a time "
                f"(stream=True; on the command line --stream, or a lower --memory){hint}"
            )


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with foreign(f"the tokenizer of model {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("A word, 词, كلمة.\n")  # a damaged tokenizer may load and fail only here
    return tokenizer


def _open_whole(folder: Path, plan: Plan, dtype: torch.dtype | None) -> Any:
    method = ask_for_decoding(plan.config)
    if method is None:
        return _open_plain(folder, plan, dtype)
    try:
        return decoded(_open_plain(folder, plan, dtype, config=plan.config), method)
    except (ModelError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise cannot_decode(folder, method, error.__cause__ or error) from error


def _open_plain(folder: Path, plan: Plan, dtype: torch.dtype | None, **settings: Any) -> Any:
    # errors_only: transformers would print a table of mismatched parameters before our message
    with errors_only(), foreign(f"model {folder}"):
        try:
            model, found = plan.kind.from_pretrained(
                folder,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                **settings,
            )
        except RuntimeError as error:
            if "conversion of the weights" not in str(error):
                raise
            raise ModelError(f"the weights of model {folder} are incomplete or inconsistent; {AGAIN}") from error
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"{name} of model {folder} has shape {tuple(stored)}, but its config.json specifies {tuple(expected)}; "
            f"{AGAIN}"
        )
    missing = sorted(found["missing_keys"])  # transformers would initialize them at random
    if missing:
        raise ModelError(
            f"model {folder} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more parameters" if len(missing) > 1 else "")
            + f"; {AGAIN}"
        )
    return model.eval()


def checkpoint_bytes(name: str) -> int | None:
    """Return the size of a model's weights on disk in bytes, or ``None`` for a Hub model."""
    folder = demo_checkpoint() if name == DEMO else Path(name)
    return Shards(folder).bytes if is_folder(folder) else None


def checkpoint_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a model's checkpoint, downloading a Hub model if necessary; its `weights` only if asked to.

    Raises
    ------
    ModelError
        If there is no such model, or the revision does not apply to it.
    """
    local = name == DEMO or is_folder(name)
    if local and revision is not None:
        raise ModelError(f'"{shortened(name)}" is not a Hub model, so it has no revision; leave revision out')
    if local:
        return demo_checkpoint() if name == DEMO else Path(name)
    repository, _, stated = name.partition("@")
    if stated and revision not in (None, stated):
        raise ModelError(f'model "{shortened(name)}" and revision "{shortened(revision)}" contradict each other')
    return (downloaded if weights else settings_downloaded)(repository, revision or stated or None)
