"""Bit-packed sets of weights: which weights of a model were kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from torch import Tensor

from ..errors import VariantError
from ..files import whole_file
from ..patterns import Shape
from ..projections import Key, key_of, name_of
from .tensors import GrowingTensors, StoredTensors, damaged, room_for

_FORMAT = "prunescope-masks-1"
Bits = NDArray[np.uint8]
#: ``rows(key, start, stop)`` returns packed rows of one projection.
_Rows = Callable[[Key, int, int], Bits]


class MaskSet(Mapping[Key, Tensor]):
    """The kept weights of every pruned projection of a model, as a set.

    A mapping from ``(layer, role)`` to a boolean mask (``True`` = kept) that stores eight weights per byte and
    combines like a set: ``a & b``, ``a | b``, ``a ^ b``, ``a == b``, ``~a``. Masks opened from a file are read on
    access, and combinations are computed on access, one projection at a time.

    Parameters
    ----------
    packed
        ``(layer, role)`` to rows packed by ``numpy.packbits``, uint8 of shape ``[outputs, ceil(inputs / 8)]``.
    inputs
        ``(layer, role)`` to the number of inputs (columns) before packing.

    Examples
    --------
    >>> half = MaskSet.pack({(0, "q"): torch.tensor([[True, False, True, False]])})
    >>> half.sparsity(), (half & ~half).kept(), half.iou(half)
    (0.5, 0, {(0, 'q'): 1.0})
    """

    def __init__(self, packed: Mapping[Key, Bits], inputs: Mapping[Key, int]) -> None:
        held = dict(packed)
        self._become(partial(_held, held), {key: (bits.shape[0], inputs[key]) for key, bits in held.items()}, {})

    def _become(self, rows: _Rows, shapes: Mapping[Key, Shape], counts: Mapping[Key, int]) -> None:
        self._rows = rows
        self._shapes = dict(shapes)
        self._counts = dict(counts)  # of kept weights, as far as known

    @classmethod
    def _of(cls, rows: _Rows, shapes: Mapping[Key, Shape], counts: Mapping[Key, int] | None = None) -> MaskSet:
        masks = cls.__new__(cls)
        masks._become(rows, shapes, counts or {})
        return masks

    @classmethod
    def pack(cls, masks: Mapping[Key, Bool[Tensor, "outputs inputs"]]) -> MaskSet:
        """Pack boolean masks."""
        return cls(
            {key: pack_bits(mask).numpy() for key, mask in masks.items()},
            {key: mask.shape[1] for key, mask in masks.items()},
        )

    def __getitem__(self, key: Key) -> Bool[Tensor, "outputs inputs"]:
        """Return one mask, unpacked."""
        return self.rows(key, 0, self._shapes[key][0])

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the ``(layer, role)`` of all masks."""
        return iter(self._shapes)

    def __contains__(self, key: object) -> bool:
        """Whether a projection was pruned."""
        return key in self._shapes

    def __len__(self) -> int:
        """Return the number of projections."""
        return len(self._shapes)

    def __and__(self, other: MaskSet) -> MaskSet:
        """Return the weights that both keep."""
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: MaskSet) -> MaskSet:
        """Return the weights that either keeps."""
        return self._combined(other, np.bitwise_or)

    def __xor__(self, other: MaskSet) -> MaskSet:
        """Return the weights that exactly one of them keeps."""
        return self._combined(other, np.bitwise_xor)

    def __invert__(self) -> MaskSet:
        """Return the removed weights."""
        inputs = {key: shape[1] for key, shape in self._shapes.items()}
        return MaskSet._of(partial(_inverted, self._rows, inputs), self._shapes)

    def __eq__(self, other: object) -> bool:
        """Whether both keep exactly the same weights of the same projections."""
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._shapes == other._shapes and all(
            np.array_equal(self.packed(key), other.packed(key)) for key in self
        )

    __hash__ = None  # type: ignore[assignment]

    def shape(self, key: Key) -> Shape:
        """Return ``(outputs, inputs)`` of one projection."""
        return self._shapes[key]

    def packed(self, key: Key, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "outputs bytes"]:
        """Return one mask, or some of its rows, with rows packed by ``numpy.packbits``."""
        return self._rows(key, start, self._shapes[key][0] if stop is None else stop)

    def rows(self, key: Key, start: int, stop: int) -> Bool[Tensor, "rows inputs"]:
        """Return some rows of one mask, unpacked."""
        bits = np.unpackbits(self._rows(key, start, stop), axis=1, count=self._shapes[key][1])
        return torch.from_numpy(bits.view(np.bool_))

    def kept(self, key: Key | None = None) -> int:
        """Return the number of weights kept, in one projection or in all."""
        if key is None:
            return sum(map(self.kept, self))
        if key not in self._counts:
            self._counts[key] = _count(self.packed(key))
        return self._counts[key]

    def sparsity(self, key: Key | None = None) -> float:
        """Return the share of weights removed, in one projection or in all."""
        keys = self if key is None else (key,)
        return 1 - self.kept(key) / sum(outputs * inputs for outputs, inputs in map(self.shape, keys))

    def iou(self, other: MaskSet) -> dict[Key, float]:
        """Return the intersection over union of the kept weights, by projection (1.0 where both keep nothing)."""
        return {key: float(intersection_over_union(both)[0, 1]) for key, both in overlaps([self, other]).items()}

    def save(self, path: Path, model: str) -> None:
        """Write the masks as safetensors.

        Parameters
        ----------
        path
            Written atomically.
        model
            Fingerprint of the dense model they belong to.
        """
        with whole_file(path) as partial_path:
            file = GrowingMasks.at(partial_path, self._shapes)
            for key, (_, inputs) in self._shapes.items():
                file.add(key, torch.from_numpy(self.packed(key)), inputs)
            file.finish(model)

    @classmethod
    def open(cls, path: Path, model: str | None = None) -> MaskSet:
        """Open masks; each is read from the file on access.

        Parameters
        ----------
        path
            A file written by :meth:`save`.
        model
            Fingerprint that the masks must belong to, if given.

        Raises
        ------
        VariantError
            If the file is missing, damaged, not a mask file, or belongs to another model.
        """
        if not path.is_file():
            raise VariantError(f"there is no mask file {path}")
        file = StoredTensors(path)
        if _FORMAT not in file.metadata:
            raise VariantError(f"{path} is not a prunescope mask file")
        try:
            header = json.loads(file.metadata[_FORMAT])
            belongs_to = str(header["model"])
            inputs = {key_of(name): int(count) for name, count in header["inputs"].items()}
            counts = {key_of(name): int(count) for name, count in header.get("kept", {}).items()}
            shapes = {key: (file.shapes[name_of(key)][0], count) for key, count in inputs.items()}
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
        if (
            len(shapes) != len(file.shapes)
            or (counts and counts.keys() != shapes.keys())
            or any(file.kinds[name_of(key)] != "U8" for key in shapes)
            or any(file.shapes[name_of(key)] != (o, -(-i // 8)) for key, (o, i) in shapes.items())
            or any(not 0 <= n <= shapes[key][0] * shapes[key][1] for key, n in counts.items())
        ):
            raise damaged(path)
        if model is not None and belongs_to != model:
            raise VariantError(f"{path} belongs to another model; open it with the dense model it was made from")
        return cls._of(partial(_stored, file), shapes, counts)

    def _combined(self, other: MaskSet, operation: Callable[[Bits, Bits], Bits]) -> MaskSet:
        self._check_same_shapes(other)
        return MaskSet._of(partial(_together, operation, self._rows, other._rows), self._shapes)

    def _check_same_shapes(self, other: MaskSet) -> None:
        if self._shapes != other._shapes:
            raise VariantError("these masks belong to different models: their projections or shapes differ")


def _held(packed: Mapping[Key, Bits], key: Key, start: int, stop: int) -> Bits:
    return packed[key][start:stop]


def _stored(file: StoredTensors, key: Key, start: int, stop: int) -> Bits:
    return file.bytes(name_of(key), start, stop)


def _together(operation: Callable[[Bits, Bits], Bits], one: _Rows, other: _Rows, key: Key, a: int, b: int) -> Bits:
    return operation(one(key, a, b), other(key, a, b))


def _inverted(rows: _Rows, inputs: Mapping[Key, int], key: Key, start: int, stop: int) -> Bits:
    return rows(key, start, stop) ^ np.packbits(np.ones(inputs[key], dtype=bool))


class GrowingMasks:
    """A mask file that is written one projection at a time.

    Parameters
    ----------
    file
        The underlying file; see :meth:`at`.
    inputs, kept
        Numbers of inputs and of kept weights of the projections already written.
    """

    def __init__(self, file: GrowingTensors, inputs: Mapping[str, int], kept: Mapping[str, int]) -> None:
        self._file = file
        self._inputs = dict(inputs)
        self._kept = dict(kept)

    def __len__(self) -> int:
        """Return the number of projections written."""
        return len(self._inputs)

    @classmethod
    def at(cls, path: Path, shapes: Mapping[Key, Shape]) -> GrowingMasks:
        """Create a file; `shapes` are those of all projections that may be added."""
        sizes = {name_of(key): outputs * inputs for key, (outputs, inputs) in shapes.items()}
        return cls(GrowingTensors(path, room_for(sizes, _metadata("0" * 64, sizes, sizes))), {}, {})

    def add(self, key: Key, packed: UInt8[Tensor, "outputs bytes"], inputs: int) -> None:
        """Write one projection's mask."""
        name = name_of(key)
        self._file.add(name, packed)
        self._inputs[name], self._kept[name] = inputs, _count(packed.numpy())

    def state(self) -> dict[str, Any]:
        """Flush to disk, and return the state that :meth:`resumed` needs."""
        return {"file": self._file.state(), "inputs": self._inputs, "kept": self._kept}

    @classmethod
    def resumed(cls, path: Path, state: Mapping[str, Any]) -> GrowingMasks | None:
        """Return the file as of `state`, or ``None`` if it is missing or was modified."""
        file = GrowingTensors.resumed(path, state["file"])
        return None if file is None else cls(file, state["inputs"], state["kept"])

    def finish(self, model: str) -> None:
        """Complete the file."""
        self._file.finish(_metadata(model, self._inputs, self._kept))


def _metadata(model: str, inputs: Mapping[str, int], kept: Mapping[str, int]) -> dict[str, str]:
    # One entry, since safetensors orders several arbitrarily, and equal masks should give identical files.
    header = {"model": model, "inputs": dict(inputs), "kept": dict(kept)}
    return {_FORMAT: json.dumps(header, separators=(",", ":"))}


def is_mask_file(path: Path) -> bool:
    """Whether a file is a mask file, by its header."""
    try:
        return _FORMAT in StoredTensors(path).metadata
    except VariantError:
        return False


#: Words of each mask processed at a time, so that those of several masks fit into the processor's cache.
_WORDS = 1 << 13


def overlaps(masks: Sequence[MaskSet]) -> dict[Key, NDArray[np.int64]]:
    """Return, by projection, the number of weights that both of each two mask sets keep, ``[masks, masks]``.

    All pairs are counted on one piece of the masks before the next piece is loaded into the cache.

    Raises
    ------
    VariantError
        If the masks belong to different models.
    """
    for other in masks[1:]:
        masks[0]._check_same_shapes(other)
    counts = {}
    for key in masks[0]:
        words = [_words(one.packed(key)) for one in masks]
        both = np.zeros((len(masks), len(masks)), dtype=np.int64)
        for start in range(0, len(words[0]), _WORDS):
            piece = [one[start : start + _WORDS] for one in words]
            for i, one in enumerate(piece):
                for j in range(i, len(piece)):
                    both[i, j] += np.bitwise_count(one & piece[j]).sum(dtype=np.uint32)
        counts[key] = both + np.triu(both, 1).T
    return counts


def intersection_over_union(both: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the IoU of all pairs of masks of one projection, given the number of weights that both keep.

    >>> intersection_over_union(np.array([[3, 2], [2, 4]])).tolist()
    [[1.0, 0.4], [0.4, 1.0]]
    """
    kept = np.diagonal(both)
    either = kept[:, None] + kept - both
    return np.divide(both, either, out=np.ones(both.shape), where=either > 0)


def _words(packed: Bits) -> NDArray[np.uint64]:
    flat = packed.reshape(-1)
    if len(flat) % 8:
        flat = np.concatenate([flat, np.zeros(8 - len(flat) % 8, dtype=np.uint8)])
    return flat.view(np.uint64)


def _count(packed: Bits) -> int:
    return int(np.bitwise_count(_words(packed)).sum(dtype=np.int64))


def pack_bits(mask: Bool[Tensor, "outputs inputs"]) -> UInt8[Tensor, "outputs bytes"]:
    """Return a mask on the CPU with eight weights per byte, rows padded with zeros.

    It is packed on its own device, which reduces the transfer to an eighth.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(np.ascontiguousarray(mask.numpy()), axis=1))
    return _pack_there(mask).cpu()


def _pack_there(mask: Bool[Tensor, "outputs inputs"]) -> UInt8[Tensor, "outputs bytes"]:
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(torch.uint8).unflatten(1, (-1, 8))
    return (padded << _places(mask.device)).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "outputs bytes"], inputs: int) -> Bool[Tensor, "outputs inputs"]:
    """Unpack a mask, on its device."""
    return ((packed[:, :, None] >> _places(packed.device)) & 1).flatten(1)[:, :inputs].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
