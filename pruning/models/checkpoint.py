"""A checkpoint folder: its tensors and its configuration, which is checked against them; nothing in it is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError, PrunescopeError, first_line, shortened
from ..files import is_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
#: Extensions of files that hold pickled weights.
_PICKLED = (".bin", ".pt", ".pth")
AGAIN = "download the checkpoint again"
#: Number of blocks or experts that is always accepted, however few tensors the checkpoint has.
_PARTS = 1000
#: Most parameters accepted per stored value: tied ones may count twice, quantized ones may be packed 16 to a value.
_TIED, _PACKED = 2, 16
#: Bytes of buffers, such as position tables, that are always accepted, however small the checkpoint is.
_BUFFERS = 2**30


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Context manager that turns anything other libraries raise over damaged files into a one-line error.

    Raises
    ------
    ModelError
        If `what` cannot be read or built.
    """
    try:
        yield
    except PrunescopeError:
        raise
    # Where a bad value surfaces depends on where it is first used: transformers raises anything from KeyError to
    # ZeroDivisionError, tokenizers a bare Exception, or a BaseException if its Rust code panics.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what} needs Python code that comes with its checkpoint, which prunescope never runs; choose a model "
                "whose architecture transformers has built in"
            ) from error
        kind = "" if type(error) in (Exception, OSError, ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"{what} cannot be used ({kind}{first_line(error)}); {AGAIN}") from error


class Shards:
    """The tensors of a checkpoint folder, by name.

    Attributes
    ----------
    files, shapes
        Name of each tensor to its file, and to its shape.

    Raises
    ------
    ModelError
        If the folder has no safetensors, a file is missing, truncated or damaged, or the index does not match the
        files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if (folder / SINGLE).is_file():  # preferred by transformers too
            self.shapes = _shapes(folder / SINGLE)
            self.files = dict.fromkeys(self.shapes, folder / SINGLE)
        elif index.is_file():
            self.files = {name: folder / file for name, file in weight_map(index).items()}
            self._check_that_files_are_there()
            found = {path: _shapes(path) for path in dict.fromkeys(self.files.values())}
            for name, path in self.files.items():
                if name not in found[path]:
                    raise ModelError(f"{path} lacks {shortened(name)}, which {INDEX} says is in it; {AGAIN}")
            self.files = {name: path for path, shapes in found.items() for name in shapes}
            self.shapes = {name: shape for shapes in found.values() for name, shape in shapes.items()}
        else:
            raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}; only safetensors checkpoints are read")
        if not self.files:
            raise ModelError(f"{folder} has no tensors in its {SINGLE}; {AGAIN}")

    def _check_that_files_are_there(self) -> None:
        files = set(self.files.values())
        missing = sorted(shortened(path.name) for path in files if not is_file(path))
        if missing:
            raise ModelError(
                f"{self.folder} lacks {len(missing)} of its {len(files)} shards "
                f"({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}); {AGAIN}"
            )

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors, memory-mapped from their files.

        Raises
        ------
        ModelError
            If a file has been damaged or removed in the meantime.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with _opened(path) as file:
                found |= {name: file.get_tensor(name) for name in wanted}
        return found

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in set(self.files.values()))


def weights_kind(files: Iterable[str]) -> Literal["safetensors", "pickled"] | None:
    """Return how a checkpoint with these files stores its weights; ``None`` if it has none.

    >>> weights_kind(["config.json", "pytorch_model-00001-of-00030.bin"])
    'pickled'
    """
    names = set(files)
    if names & {SINGLE, INDEX}:
        return "safetensors"
    return "pickled" if any(Path(name).suffix in _PICKLED for name in names) else None


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor in a shard index.

    Raises
    ------
    ModelError
        If the index is damaged, or names files outside its folder.
    """
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged; {AGAIN}") from error
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ModelError(f"{index} is damaged; {AGAIN}")
    for file in names.values():
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise ModelError(f'{index} names "{shortened(file)}", which is not a file in its folder; {AGAIN}')
    return names


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({first_line(error)}); {AGAIN}") from error


@dataclass(frozen=True)
class Plan:
    """The model described by a checkpoint's configuration.

    Attributes
    ----------
    config
        The transformers configuration.
    kind
        The transformers class that builds the model with its head.
    """

    config: Any
    kind: Any


def checked_plan(shards: Shards) -> Plan:
    """Return a checkpoint's configuration, checked by building it on the meta device and comparing sizes.

    Raises
    ------
    ModelError
        If it is damaged, needs custom code, or describes a model that cannot be built or is far larger than the stored
        weights, so that building it would exhaust memory.
    """
    path = shards.folder / CONFIG
    plan, model = planned_model(shards.folder, len(shards.files))
    config = plan.config
    stored = sum(torch.Size(shape).numel() for shape in shards.shapes.values())
    quantized = getattr(config, "quantization_config", None) is not None
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > stored * (_PACKED if quantized else _TIED):
        raise ModelError(f"{path} asks for {wanted:,} parameters, but the checkpoint has {stored:,}; {AGAIN}")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > max(shards.bytes, _BUFFERS):
        raise ModelError(f"{path} asks for {buffers / 2**30:,.1f} GiB beside its parameters; {AGAIN}")
    return plan


def planned_model(folder: Path, tensors: int = 0, dtype: torch.dtype | None = None) -> tuple[Plan, Any]:
    """Return a checkpoint's configuration, and the model that it describes, on the meta device.

    Parameters
    ----------
    folder
        Folder with a ``config.json``; weights are not needed.
    tensors
        Number of tensors of the checkpoint, if it is known, to refuse absurd numbers of layers and experts.
    dtype
        Dtype of the parameters; that of the configuration by default.

    Raises
    ------
    ModelError
        If it is damaged, needs custom code, or describes a model that cannot be built.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    path = folder / CONFIG
    _check_counts(path, tensors)
    with foreign(str(path)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            wanted = {} if dtype is None else {"dtype": dtype}
            model = kind.from_config(config, trust_remote_code=False, **wanted)
    return Plan(config, kind), model.eval()


def _check_counts(path: Path, tensors: int) -> None:
    """Raise ``ModelError`` if a configuration has so many layers or experts that even a meta model takes forever."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {CONFIG}; {AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({first_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} has no settings in it; {AGAIN}")
    for name, value in _numbers(content):
        if ("layer" in name or "expert" in name) and value > max(tensors, _PARTS):
            raise ModelError(
                f"{path} asks for {shortened(name)} = {shortened(value)}, but the checkpoint has {tensors} tensors; "
                f"{AGAIN}"
            )


def _numbers(content: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for name, value in content.items():
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, dict):
            yield from _numbers(value)
