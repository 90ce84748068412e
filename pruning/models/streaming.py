"""Models larger than memory: parameters stay in the checkpoint's safetensors shards and come in a block at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError, shortened
from ..files import is_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_AGAIN = "download the checkpoint again"
#: What safetensors calls the dtypes of weights.
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Residence:
    """Where a model's parameters are: here, in memory as a whole. :class:`Streamed` is the other kind."""

    #: Whether parameters come and go.
    streamed = False

    @contextmanager
    def present(self, names: Collection[str], *, to_read: bool = False) -> Iterator[None]:
        """Have parameters in memory inside a ``with`` block; `to_read` if they will not be written to."""
        yield


_RESIDENCES: weakref.WeakKeyDictionary[nn.Module, Residence] = weakref.WeakKeyDictionary()
_IN_MEMORY = Residence()


def residence_of(model: nn.Module) -> Residence:
    """Return where the parameters of a model are."""
    return _RESIDENCES.get(model, _IN_MEMORY)


class Shards:
    """The tensors of a checkpoint folder, by name.

    Attributes
    ----------
    files, shapes
        Name of a tensor to the file that it is in, and to its shape.

    Raises
    ------
    ModelError
        If the folder has no safetensors, one of its files is missing, cut short or damaged, or the index does not fit
        the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if (folder / SINGLE).is_file():  # which transformers prefers, too
            self.shapes = _shapes(folder / SINGLE)
            self.files = dict.fromkeys(self.shapes, folder / SINGLE)
        elif index.is_file():
            self.files = {name: folder / file for name, file in _weight_map(index).items()}
            self._check_that_files_are_there()
            found = {path: _shapes(path) for path in dict.fromkeys(self.files.values())}
            for name, path in self.files.items():
                if name not in found[path]:
                    raise ModelError(f"{path} lacks {name}, which {INDEX} says is in it; {_AGAIN}")
            self.files = {name: path for path, shapes in found.items() for name in shapes}
            self.shapes = {name: shape for shapes in found.values() for name, shape in shapes.items()}
        else:
            raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}; only safetensors checkpoints are read")

    def _check_that_files_are_there(self) -> None:
        files = set(self.files.values())
        missing = sorted(shortened(path.name) for path in files if not is_file(path))
        if missing:
            raise ModelError(
                f"{self.folder} lacks {len(missing)} of its {len(files)} shards "
                f"({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}); {_AGAIN}"
            )

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors, mapped from their files and not yet read.

        Raises
        ------
        ModelError
            If a file was damaged or removed meanwhile.
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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged; {_AGAIN}") from error
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ModelError(f"{index} is damaged; {_AGAIN}")
    for file in names.values():
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise ModelError(f'{index} names "{shortened(file)}", which is no file beside it; {_AGAIN}')
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
        raise ModelError(f"{path} is damaged ({error}); {_AGAIN}") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, holding one at a time, which the library's own function does not.

    Parameters
    ----------
    tensors
        Each is asked for twice.
    path
        The file.
    metadata
        For its header.
    """
    facts = {name: _facts(tensors[name]) for name in tensors}
    order = sorted(facts, key=lambda name: -facts[name].itemsize)  # so that each begins at a multiple of its items
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + facts[name].size
        header[name] = {"dtype": facts[name].kind, "shape": facts[name].shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            values = tensors[name].detach().cpu().contiguous()
            file.write(values.flatten().view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class _Facts:
    kind: str
    shape: list[int]
    itemsize: int
    size: int


def _facts(tensor: Tensor) -> _Facts:
    return _Facts(_KINDS[tensor.dtype], list(tensor.shape), tensor.itemsize, tensor.nbytes)


@dataclass
class _Origin:
    """What a checkpoint stores of one parameter.

    Attributes
    ----------
    stored
        Names of its tensors to the patterns of the converter that they match.
    converter
        Of transformers, for parameters that are stored in parts, such as those of all experts.
    """

    stored: dict[str, str | None] = field(default_factory=dict)
    converter: Any = None

    def value(self, name: str, tensors: Mapping[str, Tensor], model: Any) -> Tensor:
        """Return the parameter, made of its stored tensors."""
        if self.converter is None:
            return tensors[next(iter(self.stored))]
        converter = deepcopy(self.converter)  # it collects what it is given
        for stored, pattern in self.stored.items():
            converter.add_tensor(name, stored, pattern, tensors[stored])
        value = converter.convert(name, model=model, config=model.config)[name]
        result: Tensor = value[0] if isinstance(value, list) else value
        return result


class Streamed(Residence):
    """Parameters that are read from shards when they are needed, and dropped afterwards.

    Parameters
    ----------
    model
        With all parameters on the meta device.
    shards
        Of its checkpoint.
    dtype, device
        What parameters become when they are read.

    Raises
    ------
    ModelError
        If the checkpoint lacks a parameter, or has it in another shape.
    """

    streamed = True

    def __init__(self, model: Any, shards: Shards, dtype: torch.dtype, device: torch.device) -> None:
        self.shards = shards
        self.device = device
        self._dtype = dtype
        self._weakly = weakref.ref(model)  # this lives as long as the model does, which it must not keep alive
        self._in_float32 = _kept_in_float32(model, dtype)
        self._origins = _origins(model, shards)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._stored_as = {name: self._find(name) for name in parameters}
        missing = [name for name, stored in self._stored_as.items() if stored is None]
        if missing:
            raise ModelError(
                f"{shards.folder} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more of the model's parameters" if len(missing) > 1 else "")
                + f"; {_AGAIN}, or load it whole, without a memory cap, if it keeps them in a form of its own"
            )
        for name, parameter in parameters.items():
            if name in self._origins:
                self._check_shape(name, parameter.shape)

    @property
    def _model(self) -> Any:
        model = self._weakly()
        assert model is not None
        return model

    def _find(self, name: str) -> str | None:
        """Return the name under which a parameter is stored: its own, or one that it is tied to."""
        tied: Mapping[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        source = tied.get(name, name)
        group = (name, source, *(other for other, its_source in tied.items() if its_source == source))
        return next((candidate for candidate in group if candidate in self._origins), None)

    def _check_shape(self, name: str, expected: torch.Size) -> None:
        origin = self._origins[name]
        empty = {stored: torch.empty(self.shards.shapes[stored], device="meta") for stored in origin.stored}
        try:
            shape = origin.value(name, empty, self._model).shape
        except RuntimeError as error:
            raise ModelError(
                f"the parts of {name} in {self.shards.folder} have shapes that do not fit together; {_AGAIN}"
            ) from error
        if shape != expected:
            raise ModelError(
                f"{name} has shape {tuple(shape)} in {self.shards.folder}, but its config.json asks for "
                f"{tuple(expected)}; {_AGAIN}"
            )

    def is_stored(self, name: str) -> bool:
        """Whether the checkpoint has a parameter or buffer under its own name, not that of one it is tied to."""
        return name in self._origins

    @contextmanager
    def present(self, names: Collection[str], *, to_read: bool = False) -> Iterator[None]:
        """Have parameters in memory inside a ``with`` block; `to_read` if they will not be written to."""
        absent: dict[str, nn.Parameter | None] = {}
        loaded: dict[str, nn.Parameter] = {}
        try:
            for name in names:
                source = self._stored_as[name]
                assert source is not None
                if source not in loaded:
                    loaded[source] = nn.Parameter(self._read(source, copy=not to_read), requires_grad=False)
                module, leaf = _holder(self._model, name)
                absent[name] = module._parameters[leaf]
                module._parameters[leaf] = loaded[source]
            yield
        finally:
            for name, parameter in absent.items():
                module, leaf = _holder(self._model, name)
                module._parameters[leaf] = parameter

    def load_buffers(self) -> None:
        """Bring all buffers to the device, those that the checkpoint has with its values."""
        for name, buffer in list(self._model.named_buffers()):
            module, leaf = _holder(self._model, name)
            if name in self._origins:
                buffer = self._value(name).to(buffer.dtype, copy=True)
            module._buffers[leaf] = buffer.to(self.device)

    def _read(self, name: str, *, copy: bool) -> Tensor:
        dtype = torch.float32 if self._in_float32 & set(name.split(".")) else self._dtype
        return self._value(name).to(self.device, dtype, copy=copy)

    def _value(self, name: str) -> Tensor:
        origin = self._origins[name]
        return origin.value(name, self.shards.tensors(origin.stored), self._model)


def _origins(model: Any, shards: Shards) -> dict[str, _Origin]:
    """Return what the checkpoint stores of each parameter and buffer, by the rules that transformers loads it by."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    prefix = model.base_model_prefix
    origins: dict[str, _Origin] = {}
    for stored in sorted(shards.files, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            name, pattern = rename_source_key(stored, [], [], prefix, known)
        if name in known:
            origin = origins.setdefault(name, _Origin())
            origin.stored[stored] = pattern
            origin.converter = by_pattern.get(pattern)
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # saved again as it was
    return origins


def _kept_in_float32(model: Any, dtype: torch.dtype) -> set[str]:
    """Return the names of modules that transformers keeps in float32 when a model is loaded in half precision."""
    kept: set[str] = set()
    if dtype is torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def open_streamed(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Build a model whose parameters stay in its checkpoint.

    Parameters
    ----------
    folder
        A checkpoint folder with safetensors.
    dtype
        That parameters become; the one that the checkpoint is stored in by default.
    device
        Where they go when they are needed.

    Raises
    ------
    ModelError
        If the checkpoint cannot be streamed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    shards = Shards(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder} is quantized; only checkpoints in floating point can be streamed")
    if dtype is None:
        dtype = config.dtype or next(iter(shards.tensors([next(iter(shards.files))]).values())).dtype
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _parameters_on_meta():
        model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    model = model.eval()
    residence = Streamed(model, shards, dtype, device)
    residence.load_buffers()
    _RESIDENCES[model] = residence
    model.name_or_path = str(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make every parameter that is created inside a ``with`` block one without values; buffers keep theirs."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
