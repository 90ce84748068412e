"""What differs between a variant and its dense model beside the projections: norms, embeddings, the head and so on.

Each such parameter is held by its path from the model's root, in ``others.safetensors``. Parameters that are tied in
the dense model follow the one that they are tied to, unless the variant has values of their own for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import VariantError
from ..models.anatomy import Anatomy
from .tensors import StoredTensors

OTHERS_FILE = "others.safetensors"
OTHERS_FORMAT = "prunescope-others-1"
#: Of each model, the parameters that are replaced at the moment, by path.
_DENSE: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()


class StoredOthers(Mapping[str, Tensor]):
    """Parameters in a file, by path, each read on access.

    Raises
    ------
    VariantError
        If the file is damaged, or belongs to another variant.
    """

    def __init__(self, path: Path, model_fingerprint: str) -> None:
        self._file = StoredTensors(path)
        if self._file.metadata.get(OTHERS_FORMAT) != model_fingerprint:
            raise VariantError(f"{path} is not a file of this variant; delete the variant's folder and run again")

    def __contains__(self, name: object) -> bool:
        """Whether a parameter differs from the dense model's."""
        return name in self._file  # Mapping's default would read the values

    def __getitem__(self, name: str) -> Tensor:
        """Read the values of one parameter."""
        if name not in self._file:
            raise KeyError(name)
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths."""
        return iter(self._file)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self._file.shapes)

    @property
    def numel(self) -> int:
        """Number of values in all of them."""
        return sum(map(prod, self._file.shapes.values()))


def open_others(folder: Path, model_fingerprint: str) -> Mapping[str, Tensor]:
    """Return the parameters in a variant's folder, read on access; empty if there is no file.

    Raises
    ------
    VariantError
        If the file is damaged, or belongs to another variant.
    """
    path = folder / OTHERS_FILE
    return StoredOthers(path, model_fingerprint) if path.is_file() else {}


def numel_of(others: Mapping[str, Tensor]) -> int:
    """Return the number of values in all parameters, without reading them from a file."""
    return others.numel if isinstance(others, StoredOthers) else sum(value.numel() for value in others.values())


def reaching(anatomy: Anatomy, others: Mapping[str, Tensor], names: Collection[str] | None = None) -> dict[str, str]:
    """Return the parameters of a model that `others` change, each with the entry that has its values.

    Parameters
    ----------
    anatomy, others
        The dense model, and values by path.
    names
        Paths to look at; all by default.
    """
    ties = anatomy.ties
    looked_at = [*others, *(name for name in ties if name not in others)] if names is None else names
    entries = {name: name if name in others else ties.get(name, name) for name in looked_at}
    return {name: entry for name, entry in entries.items() if entry in others}


@contextmanager
def replaced(anatomy: Anatomy, others: Mapping[str, Tensor], names: Collection[str] | None = None) -> Iterator[None]:
    """Context manager that replaces parameters of a model beside its projections, and puts back what was there.

    The dense model's parameters are not written to, so that none is copied.

    Parameters
    ----------
    anatomy, others
        The dense model, and values by path.
    names
        Paths of the parameters to replace, as far as they differ; they must be loaded. All by default.
    """
    before: dict[str, nn.Parameter] = {}
    dense = _DENSE.setdefault(anatomy.model, {})
    try:
        before |= replace_others(anatomy, others, names)
        dense |= before
        yield
    finally:
        for name, parameter in before.items():
            _put(anatomy.model, name, parameter)
            dense.pop(name, None)


def is_replaced(anatomy: Anatomy, names: Collection[str]) -> bool:
    """Whether some of these parameters are those of a variant, inside of :func:`replaced`."""
    return any(name in _DENSE.get(anatomy.model, {}) for name in names)


@contextmanager
def dense_again(anatomy: Anatomy, names: Collection[str]) -> Iterator[None]:
    """Context manager, for use inside of :func:`replaced`, in which parameters are the dense model's."""
    dense = {name: own for name, own in _DENSE.get(anatomy.model, {}).items() if name in names}
    replacing = {name: anatomy.model.get_parameter(name) for name in dense}
    try:
        for name, parameter in dense.items():
            _put(anatomy.model, name, parameter)
        yield
    finally:
        for name, parameter in replacing.items():
            _put(anatomy.model, name, parameter)


def replace_others(
    anatomy: Anatomy, others: Mapping[str, Tensor], names: Collection[str] | None = None, *, copy: bool = False
) -> dict[str, nn.Parameter]:
    """Replace parameters as :func:`replaced` does, and return what was there; `copy` never to share memory."""
    places = reaching(anatomy, others, names)
    before = {name: anatomy.model.get_parameter(name) for name in places}
    made: dict[str, nn.Parameter] = {}
    for name, entry in places.items():
        if entry not in made:
            value = others[entry].to(before[name].device, before[name].dtype, copy=copy)
            made[entry] = nn.Parameter(value, requires_grad=False)
    for name, entry in places.items():
        _put(anatomy.model, name, made[entry])
    return before


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    module._parameters[leaf] = parameter


def unties(anatomy: Anatomy, others: Mapping[str, Tensor]) -> bool:
    """Whether a variant has values of its own for a parameter that is tied to another in the dense model."""
    return any(name in others for name in anatomy.ties)


def narrowed(value: Tensor) -> Tensor:
    """Return values in 16 bits if that loses nothing, as of a 16-bit checkpoint that was loaded in float32."""
    if value.dtype is not torch.float32:
        return value
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(piece.to(dtype).float(), piece) for piece in pieces(value)):
            return value.to(dtype)
    return value


def pieces(value: Tensor, size: int = 1 << 19) -> Iterator[Tensor]:
    """Yield the values of a tensor, at most `size` of them at a time, which bounds the memory of what looks at them."""
    yield from value.reshape(-1).split(size)
