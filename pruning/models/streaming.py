"""Models larger than memory: parameters stay in the checkpoint's safetensors shards and are loaded block by block."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .checkpoint import AGAIN, Plan, Shards, foreign


class Residence:
    """Where a model's parameters reside: here, all in memory; with :class:`Streamed`, on disk."""

    #: Whether parameters are loaded on demand.
    streamed = False
    #: Where the model runs; ``None`` where its parameters are.
    device: torch.device | None = None

    @contextmanager
    def present(self, names: Collection[str], *, to_read: bool = False) -> Iterator[None]:
        """Have parameters in memory inside a ``with`` block; `to_read` if they will not be written to."""
        yield


_RESIDENCES: weakref.WeakKeyDictionary[nn.Module, Residence] = weakref.WeakKeyDictionary()
_IN_MEMORY = Residence()


def residence_of(model: nn.Module) -> Residence:
    """Return where the parameters of a model reside."""
    return _RESIDENCES.get(model, _IN_MEMORY)


class Described(Residence):
    """Parameters that are nowhere: of a model that is known by its configuration, to plan for and not to run.

    Parameters
    ----------
    device
        Where the model would run: ``cpu``, or ``meta`` for any device with its own memory.
    streamed
        Whether its parameters would stay on disk.
    """

    def __init__(self, device: torch.device, *, streamed: bool) -> None:
        self.device = device
        self.streamed = streamed

    @contextmanager
    def present(self, names: Collection[str], *, to_read: bool = False) -> Iterator[None]:
        """Refuse: there is nothing to load."""
        raise ModelError("this model is known by its configuration only, without weights; load it to run it")
        yield


@dataclass
class _Origin:
    """The tensors of a checkpoint that make up one parameter.

    Attributes
    ----------
    stored
        Name of each tensor to the pattern of the converter that it matches.
    converter
        The transformers converter, for parameters stored in parts, such as those of all experts.
    """

    stored: dict[str, str | None] = field(default_factory=dict)
    converter: Any = None

    @property
    def stacked(self) -> list[list[str]] | None:
        """The tensors of all experts, in order: one list for each of the parts that are stacked above each other.

        ``None`` if the parameter is not put together in this way.
        """
        if self.converter is None or not _stacks_experts(self.converter.operations):
            return None
        parts = [[stored for stored, own in self.stored.items() if own == p] for p in self.converter.source_patterns]
        return parts if len({len(part) for part in parts}) == 1 else None

    def value(self, name: str, tensors: Mapping[str, Tensor], model: Any) -> Tensor:
        """Return the parameter, assembled from its stored tensors."""
        if self.converter is None:
            return tensors[next(iter(self.stored))]
        converter = deepcopy(self.converter)  # it accumulates tensors
        for stored, pattern in self.stored.items():
            converter.add_tensor(name, stored, pattern, tensors[stored])
        value = converter.convert(name, model=model, config=model.config)[name]
        result: Tensor = value[0] if isinstance(value, list) else value
        return result


class Streamed(Residence):
    """Parameters that are read from shards when needed, and dropped afterwards.

    Parameters
    ----------
    model
        A model with all parameters on the meta device.
    shards
        The shards of its checkpoint.
    dtype, device
        Dtype and device of parameters that are read.

    Raises
    ------
    ModelError
        If the checkpoint lacks a parameter, or has it in another shape.
    """

    streamed = True

    def __init__(self, model: Any, shards: Shards, dtype: torch.dtype, device: torch.device) -> None:
        self.shards = shards
        self.device: torch.device = device
        self._dtype = dtype
        self._weakly = weakref.ref(model)  # a strong reference would keep the model alive
        self._in_float32 = _kept_in_float32(model, dtype)
        self._origins = _origins(model, shards)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._stored_as = {name: self._find(name) for name in parameters}
        missing = [name for name, stored in self._stored_as.items() if stored is None]
        if missing:
            raise ModelError(
                f"{shards.folder} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more of the model's parameters" if len(missing) > 1 else "")
                + f"; {AGAIN}, or load it without a memory cap if it stores them in its own format"
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
                f"the parts of {name} in {self.shards.folder} have shapes that do not fit together; {AGAIN}"
            ) from error
        if shape != expected:
            raise ModelError(
                f"{name} has shape {tuple(shape)} in {self.shards.folder}, but its config.json asks for "
                f"{tuple(expected)}; {AGAIN}"
            )

    def is_stored(self, name: str) -> bool:
        """Whether the checkpoint stores a parameter or buffer under its own name rather than one it is tied to."""
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
        """Move all buffers to the device, with the checkpoint's values if it has them."""
        for name, buffer in list(self._model.named_buffers()):
            module, leaf = _holder(self._model, name)
            if name in self._origins:
                buffer = self._value(name).to(buffer.dtype, copy=True)
            module._buffers[leaf] = buffer.to(self.device)

    def _read(self, name: str, *, copy: bool) -> Tensor:
        dtype = torch.float32 if self._in_float32 & set(name.split(".")) else self._dtype
        stacked = self._origins[name].stacked
        if stacked is not None:
            return self._stacked(stacked, dtype)
        return self._value(name).to(self.device, dtype, copy=copy)

    def _stacked(self, parts: Sequence[Sequence[str]], dtype: torch.dtype) -> Tensor:
        """Return all experts' weights in one tensor, each copied from its shard straight to its place.

        The converter would hold them two or three times on the way: 5.6 GB of a block of Mixtral-8x7B in bfloat16.
        """
        tensors = self.shards.tensors([stored for part in parts for stored in part])
        heights = [tensors[part[0]].shape[0] for part in parts]
        value = torch.empty(len(parts[0]), sum(heights), tensors[parts[0][0]].shape[1], dtype=dtype, device=self.device)
        for part, rows in zip(parts, value.split(heights, dim=1), strict=True):
            for expert, stored in enumerate(part):
                rows[expert].copy_(tensors[stored])
        return value

    def _value(self, name: str) -> Tensor:
        origin = self._origins[name]
        return origin.value(name, self.shards.tensors(origin.stored), self._model)


def _stacks_experts(operations: Sequence[Any]) -> bool:
    """Whether a converter only stacks one tensor an expert, or gate and up of each above each other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _origins(model: Any, shards: Shards) -> dict[str, _Origin]:
    """Return the stored tensors of each parameter and buffer, by the conversion rules of transformers."""
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
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # so that it is saved in the same format
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


def open_streamed(shards: Shards, plan: Plan, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Build a model whose parameters stay in its checkpoint.

    Parameters
    ----------
    shards, plan
        Shards and plan of the checkpoint.
    dtype
        Dtype of the parameters; that of the checkpoint by default.
    device
        Device that parameters are loaded to.

    Raises
    ------
    ModelError
        If the checkpoint cannot be streamed.
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    folder, config = shards.folder, plan.config
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder} is quantized; only checkpoints in floating point can be streamed")
    if dtype is None:
        dtype = config.dtype or next(iter(shards.tensors([next(iter(shards.files))]).values())).dtype
    with foreign(f"model {folder}"), _parameters_on_meta():
        model = plan.kind.from_config(config, dtype=dtype, trust_remote_code=False)
    model = model.eval()
    residence = Streamed(model, shards, dtype, device)
    residence.load_buffers()
    settle(model, residence)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        with foreign(str(folder / GENERATION_CONFIG_NAME)):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def settle(model: nn.Module, residence: Residence) -> None:
    """Say where the parameters of a model reside."""
    _RESIDENCES[model] = residence


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Context manager within which new parameters are created on the meta device; buffers keep their values."""
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
