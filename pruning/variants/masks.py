"""Sets of weights, bit-packed: which weights of a model a pruning run kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..errors import VariantError
from ..files import whole_file

Key = tuple[int, str]
_FORMAT = "prunescope-masks-1"


class MaskSet(Mapping[Key, Tensor]):
    """The kept weights of every pruned projection of a model, as a set.

    A mapping from ``(layer, role)`` to a boolean mask (``True`` = kept) that holds eight weights a byte and
    combines like a set: ``a & b``, ``a | b``, ``a ^ b``, ``a == b``, ``~a``.

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

    def __init__(self, packed: Mapping[Key, NDArray[np.uint8]], inputs: Mapping[Key, int]) -> None:
        self._packed = dict(packed)
        self._inputs = dict(inputs)

    @classmethod
    def pack(cls, masks: Mapping[Key, Bool[Tensor, "outputs inputs"]]) -> MaskSet:
        """Pack boolean masks."""
        return cls(
            {key: pack_bits(mask).numpy() for key, mask in masks.items()},
            {key: mask.shape[1] for key, mask in masks.items()},
        )

    def __getitem__(self, key: Key) -> Bool[Tensor, "outputs inputs"]:
        """Return one mask, unpacked."""
        return self.rows(key, 0, len(self._packed[key]))

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the ``(layer, role)`` of all masks."""
        return iter(self._packed)

    def __contains__(self, key: object) -> bool:
        """Whether a projection was pruned."""
        return key in self._inputs

    def __len__(self) -> int:
        """Return the number of projections."""
        return len(self._packed)

    def __and__(self, other: MaskSet) -> MaskSet:
        """Return the weights that both keep."""
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: MaskSet) -> MaskSet:
        """Return the weights that either keeps."""
        return self._combined(other, np.bitwise_or)

    def __xor__(self, other: MaskSet) -> MaskSet:
        """Return the weights that only one of them keeps."""
        return self._combined(other, np.bitwise_xor)

    def __invert__(self) -> MaskSet:
        """Return the removed weights."""
        everything = {
            key: np.packbits(np.ones((packed.shape[0], self._inputs[key]), dtype=bool), axis=1)
            for key, packed in self._packed.items()
        }
        return self ^ MaskSet(everything, self._inputs)

    def __eq__(self, other: object) -> bool:
        """Whether both keep exactly the same weights of the same projections."""
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._inputs == other._inputs and all(
            np.array_equal(packed, other._packed[key]) for key, packed in self._packed.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def shape(self, key: Key) -> tuple[int, int]:
        """Return ``(outputs, inputs)`` of one projection."""
        return self._packed[key].shape[0], self._inputs[key]

    def rows(self, key: Key, start: int, stop: int) -> Bool[Tensor, "rows inputs"]:
        """Return some rows of one mask, unpacked."""
        bits = np.unpackbits(self._packed[key][start:stop], axis=1, count=self._inputs[key])
        return torch.from_numpy(bits.view(np.bool_))

    def kept(self, key: Key | None = None) -> int:
        """Return how many weights are kept, of one projection or of all."""
        keys = self if key is None else (key,)
        return sum(int(np.bitwise_count(self._packed[k]).sum(dtype=np.int64)) for k in keys)

    def sparsity(self, key: Key | None = None) -> float:
        """Return the share of weights removed, of one projection or of all."""
        keys = self if key is None else (key,)
        return 1 - self.kept(key) / sum(self._packed[k].shape[0] * self._inputs[k] for k in keys)

    def iou(self, other: MaskSet) -> dict[Key, float]:
        """Return intersection over union of the kept weights, for every projection (1.0 where both keep nothing)."""
        return {key: float(intersection_over_union(both)[0, 1]) for key, both in overlaps([self, other]).items()}

    def save(self, path: Path, model: str) -> None:
        """Write the masks as safetensors.

        Parameters
        ----------
        path
            Written whole or not at all.
        model
            Fingerprint of the dense model they belong to.
        """
        layers = {_name(key): packed for key, packed in self._packed.items()}
        inputs = {_name(key): count for key, count in self._inputs.items()}
        # In one entry, since safetensors writes several in any order, and equal masks should be equal bytes.
        header = json.dumps({"model": model, "inputs": inputs})
        with whole_file(path) as partial:
            save_file(layers, partial, metadata={_FORMAT: header})

    @classmethod
    def open(cls, path: Path, model: str | None = None) -> MaskSet:
        """Read masks.

        Parameters
        ----------
        path
            A file written by :meth:`save`.
        model
            Fingerprint that the masks must belong to, if given.

        Raises
        ------
        VariantError
            If the file is missing, damaged, no mask file, or belongs to another model.
        """
        if not path.is_file():
            raise VariantError(f"there is no mask file {path}")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                packed = {_key(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _FORMAT not in metadata:
                raise VariantError(f"{path} is not a prunescope mask file")
            header = json.loads(metadata[_FORMAT])
            belongs_to = str(header["model"])
            inputs = {_key(name): int(count) for name, count in header["inputs"].items()}
            whole = inputs.keys() == packed.keys() and all(
                packed[key].dtype == np.uint8 and packed[key].shape[1:] == (-(-count // 8),)
                for key, count in inputs.items()
            )
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise VariantError(f"{path} is damaged ({error}); delete the variant's folder and run again") from error
        if not whole:
            raise VariantError(f"{path} is damaged; delete the variant's folder and run again")
        if model is not None and belongs_to != model:
            raise VariantError(f"{path} belongs to another model; open it with the dense model it was made from")
        return cls({key: packed[key] for key in inputs}, inputs)

    def _combined(
        self, other: MaskSet, operation: Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.uint8]]
    ) -> MaskSet:
        self._check_same_shapes(other)
        return MaskSet(
            {key: operation(packed, other._packed[key]) for key, packed in self._packed.items()}, self._inputs
        )

    def _check_same_shapes(self, other: MaskSet) -> None:
        if {k: self.shape(k) for k in self} != {k: other.shape(k) for k in other}:
            raise VariantError("these masks are of different models: their projections or shapes differ")


#: Words of a mask that are compared at a time: with those of some other masks they fit into a processor's cache.
_WORDS = 1 << 13


def overlaps(masks: Sequence[MaskSet]) -> dict[Key, NDArray[np.int64]]:
    """Return, for every projection, how many weights each two of several mask sets both keep, ``[masks, masks]``.

    All pairs are counted on a piece of the masks before the next piece is fetched from memory.

    Raises
    ------
    VariantError
        If the masks are of different models.
    """
    for other in masks[1:]:
        masks[0]._check_same_shapes(other)
    counts = {}
    for key in masks[0]:
        words = [_words(one._packed[key]) for one in masks]
        both = np.zeros((len(masks), len(masks)), dtype=np.int64)
        for start in range(0, len(words[0]), _WORDS):
            piece = [one[start : start + _WORDS] for one in words]
            for i, one in enumerate(piece):
                for j in range(i, len(piece)):
                    both[i, j] += np.bitwise_count(one & piece[j]).sum(dtype=np.uint32)
        counts[key] = both + np.triu(both, 1).T
    return counts


def intersection_over_union(both: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the IoU of each two of several masks of one projection, given how many weights both keep.

    >>> intersection_over_union(np.array([[3, 2], [2, 4]])).tolist()
    [[1.0, 0.4], [0.4, 1.0]]
    """
    kept = np.diagonal(both)
    either = kept[:, None] + kept - both
    return np.divide(both, either, out=np.ones(both.shape), where=either > 0)


def _words(packed: NDArray[np.uint8]) -> NDArray[np.uint64]:
    flat = packed.reshape(-1)
    if len(flat) % 8:
        flat = np.concatenate([flat, np.zeros(8 - len(flat) % 8, dtype=np.uint8)])
    return flat.view(np.uint64)


def is_mask_file(path: Path) -> bool:
    """Whether a file says that :meth:`MaskSet.save` wrote it."""
    try:
        with safe_open(path, "numpy") as file:
            return _FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def pack_bits(mask: Bool[Tensor, "outputs inputs"]) -> UInt8[Tensor, "outputs bytes"]:
    """Return a mask with eight weights a byte, each row filled up with zeros."""
    return torch.from_numpy(np.packbits(np.ascontiguousarray(mask.cpu().numpy()), axis=1))


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"


def _key(name: str) -> Key:
    layer, _, role = name.partition(".")
    return int(layer), role
