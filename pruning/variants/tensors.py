"""Safetensors files written and read one tensor at a time, without memory-mapping them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import VariantError

#: Names of dtypes in safetensors.
_KINDS = {
    torch.uint8: "U8",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
#: Upper bound of the offsets in a header.
_LARGEST = 10**15
_CHUNK = 1 << 24


class GrowingTensors:
    """A safetensors file that is written one tensor at a time.

    The header comes first in the file but is known last, so space is reserved for it; the excess is filled with
    spaces, as the format allows.

    Parameters
    ----------
    path
        The file.
    room
        Bytes reserved for the header; see :func:`room_for`.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self._room = room
        self._entries: dict[str, Any] = {}
        self._size = 0
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        with self.path.open("r+b" if self._entries else "wb") as file:
            file.seek(self._room + self._size)
            file.write(data)
        begin, self._size = self._size, self._size + len(data)
        self._entries[name] = _entry(_KINDS[tensor.dtype], list(tensor.shape), begin, self._size)
        self._digest.update(data)

    def state(self) -> dict[str, Any]:
        """Flush to disk, and return the state that :meth:`resumed` needs."""
        if self._entries:
            _sync(self.path)
        return {"room": self._room, "tensors": self._entries, "bytes": self._size, "sha256": self._digest.hexdigest()}

    @classmethod
    def resumed(cls, path: Path, state: Mapping[str, Any]) -> GrowingTensors | None:
        """Return the file as of `state`, or ``None`` if it is missing or was modified."""
        file = cls(path, int(state["room"]))
        file._entries, file._size = dict(state["tensors"]), int(state["bytes"])
        if file._entries:
            try:
                with path.open("r+b") as there:
                    there.seek(file._room)
                    left = file._size
                    while left and (data := there.read(min(left, _CHUNK))):
                        left -= len(data)
                        file._digest.update(data)
                    there.truncate(file._room + file._size)
            except FileNotFoundError:
                return None
        return file if file._digest.hexdigest() == state["sha256"] else None

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, which completes the file."""
        header = _header(self._entries, metadata)
        assert len(header) <= self._room, "the header exceeds the space reserved for it"
        with self.path.open("r+b" if self._entries else "wb") as file:
            file.write((self._room - 8).to_bytes(8, "little"))
            file.write(header[8:].ljust(self._room - 8))
        _sync(self.path)


def room_for(sizes: Mapping[str, int], metadata: Mapping[str, str]) -> int:
    """Return the maximum size of a header in bytes.

    Parameters
    ----------
    sizes
        Name of every tensor that may be added to its maximum number of values.
    metadata
        Metadata of the maximum length.
    """
    largest = {name: _entry("BF16", [size, size], _LARGEST, _LARGEST) for name, size in sizes.items()}
    return len(_header(largest, metadata))


def _entry(kind: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    content = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    padded = content + b" " * (-len(content) % 8)
    return len(padded).to_bytes(8, "little") + padded


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class StoredTensors:
    """The tensors of a safetensors file, read on access.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    metadata, shapes, kinds
        Metadata of the file, and shape and dtype (as named by safetensors) of each tensor, from its header.

    Raises
    ------
    VariantError
        If it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise VariantError(f"there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self.kinds = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.shapes)

    def in_order(self) -> list[str]:
        """Return the names in the order in which the tensors were written."""
        with safe_open(self.path, "pt") as file:
            return list(file.offset_keys())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or a range of its rows.

        Raises
        ------
        VariantError
            If the file has been removed or damaged since.
        """
        try:
            with safe_open(self.path, "pt") as file:
                whole = start == 0 and (stop is None or stop >= self.shapes[name][0])
                tensor: Tensor = file.get_tensor(name) if whole else file.get_slice(name)[start:stop]
                return tensor.clone()  # otherwise the whole file stays mapped
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return a uint8 tensor, or a range of its rows."""
        array: NDArray[np.uint8] = self.read(name, start, stop).numpy()
        return array


def damaged(path: Path, reason: object = "") -> VariantError:
    """Return the error for a damaged file."""
    said = f" ({reason})" if str(reason) else ""
    return VariantError(f"{path} is damaged{said}; delete the variant's folder and run again")
