"""Applying packed masks: pruned weights are written to their destination without unpacking a whole mask.

On a CPU, each byte of a mask, which covers eight weights, is looked up in a table of words of all ones or all zeros,
which are combined with the bits of the dense weights by AND, in pieces that fit into the processor's cache. To other
devices, masks are transferred with eight weights per byte and unpacked there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from .masks import unpack_bits

#: Bytes of a mask processed at a time on a CPU: half a megabyte of bfloat16 weights.
_PIECE = 1 << 15
#: Number of weights whose mask is unpacked at a time on a CPU.
_UNPACKED = 1 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def write_pruned(
    dense: Float[Tensor, "outputs inputs"],
    packed: UInt8[np.ndarray, "outputs bytes"],
    out: Float[Tensor, "outputs inputs"],
    values: Float[Tensor, " kept"] | None = None,
) -> None:
    """Write a pruned weight into `out`; removed weights become positive zero.

    Parameters
    ----------
    dense
        The dense weight.
    packed
        The mask, with rows packed by ``numpy.packbits``.
    out
        Destination, with the shape, dtype and device of `dense` and any strides; may be `dense` itself.
    values
        Values of the kept weights, in mask order; those of `dense` by default.
    """
    bits = torch.from_numpy(packed)
    if out.device.type != "cpu":
        _write_rows(dense, bits.to(out.device), out, None if values is None else values.to(out.device))
    elif out.shape[1] % 8 == 0 and dense.is_contiguous() and out.is_contiguous():
        _write_bits(dense, packed.reshape(-1), out, values)
    else:
        rows, passed = max(_UNPACKED // out.shape[1], 1), 0
        for start in range(0, len(out), rows):
            stop = start + rows
            kept = 0 if values is None else int(np.bitwise_count(packed[start:stop]).sum(dtype=np.int64))
            some = None if values is None else values[passed : passed + kept]
            _write_rows(dense[start:stop], bits[start:stop], out[start:stop], some)
            passed += kept


def _write_bits(dense: Tensor, bits: NDArray[np.uint8], out: Tensor, values: Tensor | None) -> None:
    """Write a weight whose rows are whole bytes of its mask, with as many threads as torch has.

    Each thread handles one contiguous stretch. Torch's own threads would synchronize after every piece; on a busy
    machine, that takes a hundred times as long as the work itself.
    """
    kind = _INTEGERS[dense.element_size()]
    source, target = (weight.view(kind).numpy().reshape(-1) for weight in (dense, out))
    stored = None if values is None else values.to(dense.dtype).contiguous().view(kind).numpy()
    stretches: list[tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]] = []
    passed = 0
    step = max(-(-len(bits) // torch.get_num_threads()), _PIECE)
    for start in range(0, len(bits), step):
        some = bits[start : start + step]
        where = slice(8 * start, 8 * (start + len(some)))
        if stored is None:
            stretches.append((some, target[where], source[where], None))
        else:
            kept = int(np.bitwise_count(some).sum(dtype=np.int64))
            stretches.append((some, target[where], None, stored[passed : passed + kept]))
            passed += kept
    with ThreadPoolExecutor(len(stretches)) as pool:
        list(pool.map(_write_stretch, *zip(*stretches, strict=True)))


def _write_stretch(
    bits: NDArray[np.uint8], target: NDArray[Any], source: NDArray[Any] | None, values: NDArray[Any] | None
) -> None:
    table = _tables(target.itemsize)
    words = np.empty((_PIECE, table.words.shape[1]), dtype=table.words.dtype)
    passed = 0
    for start in range(0, len(bits), _PIECE):
        some = bits[start : start + _PIECE]
        kept_words = words[: len(some)]
        np.take(table.words, some, axis=0, out=kept_words, mode="clip")
        where = slice(8 * start, 8 * (start + len(some)))
        if source is not None:
            piece = source[where]
        else:
            assert values is not None
            counts = table.counts[some]
            ends = counts.cumsum(dtype=np.int32)
            places = np.take(table.before, some, axis=0) + (ends - counts)[:, None]
            here = values[passed : passed + ends[-1]] if ends[-1] else np.zeros(1, target.dtype)
            piece = np.take(here, places.reshape(-1), mode="clip")  # arbitrary where removed; masked below
            passed += int(ends[-1])
        np.bitwise_and(piece.view(np.uint64), kept_words.reshape(-1).view(np.uint64), out=target[where].view(np.uint64))


@dataclass(frozen=True)
class _Tables:
    """Lookup tables, indexed by a byte of a mask.

    Attributes
    ----------
    words
        Ones where a weight is kept, in items of 16 bytes, the largest that numpy copies at once: ``[256, items]``.
    before, counts
        Number of weights kept before each of the eight, ``[256, 8]``, and in total, ``[256]``.
    """

    words: NDArray[np.complex128]
    before: NDArray[np.int32]
    counts: NDArray[np.int32]


@cache
def _tables(itemsize: int) -> _Tables:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.int8)
    words = np.repeat(-bits, itemsize, axis=1).view(np.complex128)
    counts = bits.sum(axis=1, dtype=np.int32)
    before = np.cumsum(bits, axis=1, dtype=np.int32) - bits.astype(np.int32)
    return _Tables(words, before, counts)


def _write_rows(dense: Tensor, bits: Tensor, out: Tensor, values: Tensor | None) -> None:
    mask = unpack_bits(bits, out.shape[1])
    if values is None:
        out.copy_(torch.where(mask, dense, torch.zeros((), dtype=dense.dtype, device=dense.device)))
    else:
        out.copy_(torch.zeros_like(dense).masked_scatter_(mask, values.to(dense.dtype)))
