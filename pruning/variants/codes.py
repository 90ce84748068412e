"""Bit-packed codes of quantized weights, on disk and in memory, and the weights that they stand for.

Eight codes take as many bytes as a code has bits, whatever that is; rows are padded with zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from ..errors import VariantError
from ..patterns import Shape
from ..projections import Key, key_of, name_of
from ..quantization import SCALE_BITS, WIDTHS, Quantized
from .tensors import GrowingTensors, StoredTensors, damaged, room_for

_FORMAT = "prunescope-codes-1"
_CODES, _SCALES, _ZEROS, _DIVISORS = "codes", "scales", "zeros", "divisors"
#: Number of weights decoded at a time, on a CPU and elsewhere.
_DECODED = (1 << 20, 1 << 22)


@dataclass(frozen=True)
class PackedCodes:
    """The quantized weight of one projection, bit-packed.

    Attributes
    ----------
    bits, shape
        Bits of a code; ``(outputs, inputs)``.
    codes
        Packed codes, uint8.
    scales
        Scale of each group, float16 ``[outputs, groups]``.
    zeros
        Packed zero points, uint8; ``None`` if the grid is symmetric.
    divisors
        What the weights of each input are divided by, float16 ``[inputs]``, or ``None``.
    """

    bits: int
    shape: Shape
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    divisors: Tensor | None = None

    @classmethod
    def pack(cls, quantized: Quantized) -> PackedCodes:
        """Pack a quantized weight on its device, and move it to the host."""
        bits, zeros, divisors = quantized.bits, quantized.zeros, quantized.divisors
        outputs, inputs = quantized.codes.shape
        return cls(
            bits,
            (outputs, inputs),
            pack_codes(quantized.codes, bits).cpu(),
            quantized.scales.cpu(),
            None if zeros is None else pack_codes(zeros, bits).cpu(),
            None if divisors is None else divisors.cpu(),
        )

    def rows(self, start: int, stop: int) -> PackedCodes:
        """Return some rows."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        codes = self.codes[start:stop]
        return replace(
            self, shape=(len(codes), self.shape[1]), codes=codes, scales=self.scales[start:stop], zeros=zeros
        )

    def to(self, device: torch.device) -> PackedCodes:
        """Return the same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        divisors = None if self.divisors is None else self.divisors.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros, divisors=divisors)

    def unpacked(self) -> Quantized:
        """Return the quantized weight."""
        zeros = None if self.zeros is None else unpack_codes(self.zeros, self.bits, self.scales.shape[1])
        codes = unpack_codes(self.codes, self.bits, self.shape[1])
        return Quantized(self.bits, codes, self.scales, zeros, self.divisors)

    def write(self, out: Tensor) -> None:
        """Write the weight into `out`, ``[outputs, inputs]``, any dtype, device and strides, some rows at a time."""
        here = self.to(out.device)
        rows = max(_DECODED[out.device.type != "cpu"] // self.shape[1], 1)
        for start in range(0, self.shape[0], rows):
            out[start : start + rows].copy_(here.rows(start, start + rows).unpacked().weight())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        parts = {_CODES: self.codes, _SCALES: self.scales, _ZEROS: self.zeros, _DIVISORS: self.divisors}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}


class CodeSet(Mapping[Key, PackedCodes]):
    """The codes of every quantized projection of a model; those opened from a file are read on access.

    Parameters
    ----------
    held
        ``(layer, role)`` to codes in memory.
    """

    def __init__(self, held: Mapping[Key, PackedCodes] | None = None) -> None:
        codes = dict(held or {})
        self._shapes = {key: packed.shape for key, packed in codes.items()}
        self._sizes = {key: _size(p.bits, p.shape, p.scales.shape[1], p.tensors()) for key, p in codes.items()}
        self._rows: Callable[[Key, int, int], PackedCodes] = partial(_held, codes)

    @classmethod
    def open(cls, path: Path, model: str) -> CodeSet:
        """Open the codes in a file; those of each projection are read on access.

        Raises
        ------
        VariantError
            If the file is damaged, or belongs to a dense model other than `model`.
        """
        file = StoredTensors(path)
        if _FORMAT not in file.metadata:
            raise VariantError(f"{path} is not a prunescope code file")
        try:
            header = json.loads(file.metadata[_FORMAT])
            belongs_to = str(header["model"])
            bits = {key_of(name): int(said["bits"]) for name, said in header["projections"].items()}
            inputs = {key_of(name): int(said["inputs"]) for name, said in header["projections"].items()}
            shapes = {key: (file.shapes[_name(key, _CODES)][0], count) for key, count in inputs.items()}
            sound = all(_sound(file, key, bits[key], shape) for key, shape in shapes.items())
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
        if not sound or {name.partition(":")[0] for name in file.shapes} != set(header["projections"]):
            raise damaged(path)
        if belongs_to != model:
            raise VariantError(f"{path} belongs to another model; open it with the dense model it was made from")
        opened = cls()
        opened._shapes = shapes
        opened._sizes = {key: _size(bits[key], shape, *_groups_and_parts(file, key)) for key, shape in shapes.items()}
        opened._rows = partial(_stored, file, bits, inputs)
        return opened

    def __getitem__(self, key: Key) -> PackedCodes:
        """Return the codes of one projection."""
        return self._rows(key, 0, self._shapes[key][0])

    def __contains__(self, key: object) -> bool:
        """Whether a projection was quantized."""
        return key in self._shapes

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the ``(layer, role)`` of all quantized projections."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of projections."""
        return len(self._shapes)

    def shape(self, key: Key) -> Shape:
        """Return ``(outputs, inputs)`` of one projection."""
        return self._shapes[key]

    def size(self, key: Key) -> int:
        """Return the bits that a projection takes: codes, 16-bit scales and divisors, zero points as wide as codes."""
        return self._sizes[key]

    def rows(self, key: Key, start: int, stop: int) -> PackedCodes:
        """Return some rows of one projection; from a file, only those are read."""
        return self._rows(key, start, stop)


def _held(codes: Mapping[Key, PackedCodes], key: Key, start: int, stop: int) -> PackedCodes:
    whole = codes[key]
    return whole if start == 0 and stop >= whole.shape[0] else whole.rows(start, stop)


def _stored(
    file: StoredTensors, bits: Mapping[Key, int], inputs: Mapping[Key, int], key: Key, start: int, stop: int
) -> PackedCodes:
    by_row = [part for part in (_CODES, _SCALES, _ZEROS) if _name(key, part) in file]
    parts = {part: file.read(_name(key, part), start, stop) for part in by_row}
    divisors = file.read(_name(key, _DIVISORS)) if _name(key, _DIVISORS) in file else None
    shape = (len(parts[_CODES]), inputs[key])
    return PackedCodes(bits[key], shape, parts[_CODES], parts[_SCALES], parts.get(_ZEROS), divisors)


def _size(bits: int, shape: Shape, groups: int, parts: Collection[str]) -> int:
    outputs, inputs = shape
    a_group = SCALE_BITS + (bits if _ZEROS in parts else 0)
    return outputs * inputs * bits + outputs * groups * a_group + (SCALE_BITS * inputs if _DIVISORS in parts else 0)


def _groups_and_parts(file: StoredTensors, key: Key) -> tuple[int, Collection[str]]:
    parts = (_CODES, _SCALES, _ZEROS, _DIVISORS)
    return file.shapes[_name(key, _SCALES)][1], [part for part in parts if _name(key, part) in file]


def _sound(file: StoredTensors, key: Key, bits: int, shape: Shape) -> bool:
    """Whether the tensors of a projection have the shapes and dtypes that they should."""
    outputs, inputs = shape
    groups = file.shapes[_name(key, _SCALES)][1]
    wanted = {
        _CODES: ("U8", (outputs, _bytes(inputs, bits))),
        _SCALES: ("F16", (outputs, groups)),
        _ZEROS: ("U8", (outputs, _bytes(groups, bits))),
        _DIVISORS: ("F16", (inputs,)),
    }
    there = {part: name for part in wanted if (name := _name(key, part)) in file}
    fits = all((file.kinds[name], file.shapes[name]) == wanted[part] for part, name in there.items())
    return bits in WIDTHS and groups > 0 and inputs % groups == 0 and fits


def _name(key: Key, part: str) -> str:
    return f"{name_of(key)}:{part}"


class GrowingCodes:
    """A file of codes that is written one projection at a time.

    Parameters
    ----------
    file
        The underlying file; see :meth:`at`.
    said
        Bits and inputs of the projections already written.
    """

    def __init__(self, file: GrowingTensors, said: Mapping[str, Mapping[str, int]]) -> None:
        self._file = file
        self._said = dict(said)

    def __len__(self) -> int:
        """Return the number of projections written."""
        return len(self._said)

    @classmethod
    def at(cls, path: Path, shapes: Mapping[Key, Shape]) -> GrowingCodes:
        """Create a file; `shapes` are those of all projections that may be added."""
        parts = (_CODES, _SCALES, _ZEROS, _DIVISORS)
        sizes = {_name(key, part): outputs * inputs for key, (outputs, inputs) in shapes.items() for part in parts}
        said = {name_of(key): {"bits": 8, "inputs": inputs} for key, (_, inputs) in shapes.items()}
        return cls(GrowingTensors(path, room_for(sizes, _metadata("0" * 64, said))), {})

    def add(self, key: Key, packed: PackedCodes) -> None:
        """Write one projection."""
        for part, tensor in packed.tensors().items():
            self._file.add(_name(key, part), tensor)
        self._said[name_of(key)] = {"bits": packed.bits, "inputs": packed.shape[1]}

    def state(self) -> dict[str, Any]:
        """Flush to disk, and return the state that :meth:`resumed` needs."""
        return {"file": self._file.state(), "projections": self._said}

    @classmethod
    def resumed(cls, path: Path, state: Mapping[str, Any]) -> GrowingCodes | None:
        """Return the file as of `state`, or ``None`` if it is missing or was modified."""
        file = GrowingTensors.resumed(path, state["file"])
        return None if file is None else cls(file, state["projections"])

    def finish(self, model: str) -> None:
        """Complete the file."""
        self._file.finish(_metadata(model, self._said))


def _metadata(model: str, said: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    return {_FORMAT: json.dumps({"model": model, "projections": dict(said)}, separators=(",", ":"))}


def _bytes(codes: int, bits: int) -> int:
    """Return the bytes that a row of codes takes."""
    return -(-codes // 8) * bits


def pack_codes(codes: UInt8[Tensor, "rows codes"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Pack codes below ``2^bits``, the first in the highest bits, on their device.

    >>> pack_codes(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 1]], dtype=torch.uint8), 4).tolist()
    [[18, 48, 0, 1]]
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    if bits == 8:
        return padded
    if bits == 3:
        eights = padded.unflatten(1, (-1, 8)).int()
        words = (eights << _shifts(8, 3, torch.int32, codes.device)).sum(dim=2, dtype=torch.int32)
        return ((words[..., None] >> _shifts(3, 8, torch.int32, codes.device)) & 255).to(torch.uint8).flatten(1)
    a_byte = 8 // bits
    shifted = padded.unflatten(1, (-1, a_byte)) << _shifts(a_byte, bits, torch.uint8, codes.device)
    return shifted.sum(dim=2, dtype=torch.uint8)


def unpack_codes(packed: UInt8[Tensor, "rows bytes"], bits: int, codes: int) -> UInt8[Tensor, "rows codes"]:
    """Undo :func:`pack_codes`, on the codes' device.

    Parameters
    ----------
    packed, bits
        Packed codes, and how many bits each has.
    codes
        Number of codes of a row.
    """
    if bits == 8:
        return packed[:, :codes]
    if bits == 3:
        threes = packed.unflatten(1, (-1, 3)).int()
        words = (threes << _shifts(3, 8, torch.int32, packed.device)).sum(dim=2, dtype=torch.int32)
        found = (words[..., None] >> _shifts(8, 3, torch.int32, packed.device)) & 7
        return found.to(torch.uint8).flatten(1)[:, :codes]
    found = (packed[..., None] >> _shifts(8 // bits, bits, torch.uint8, packed.device)) & ((1 << bits) - 1)
    return found.flatten(1)[:, :codes]


def _shifts(count: int, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return by how many bits each of `count` fields of a word is shifted, the first the most."""
    return torch.arange((count - 1) * bits, -1, -bits, dtype=dtype, device=device)
