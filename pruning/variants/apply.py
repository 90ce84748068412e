"""Masks meet weights: a pruned weight is written straight to where it is wanted, and no whole mask of booleans is made.

On a CPU a byte of a mask, which stands for eight weights, is looked up in a table of words of all ones or all zeros.
The bits of the dense weights go through them with AND, in pieces that fit into a processor's cache. To other devices
the mask travels with eight weights a byte, and is unpacked there.
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

#: Bytes of a mask that are looked up at a time on a CPU: they stand for half a megabyte of weights in bfloat16.
_PIECE = 1 << 15
#: Weights whose mask is unpacked to booleans at a time on a CPU.
_UNPACKED = 1 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def write_pruned(
    dense: Float[Tensor, "outputs inputs"],
    packed: UInt8[np.ndarray, "outputs bytes"],
    out: Float[Tensor, "outputs inputs"],
    values: Float[Tensor, " kept"] | None = None,
) -> None:
    """Write a pruned weight into `out`; what is removed becomes positive zero.

    Parameters
    ----------
    dense
        The dense weight.
    packed
        The mask, as ``numpy.packbits`` makes it of its rows.
    out
        Of the shape, dtype and device of `dense`, of any strides; may be `dense` itself.
    values
        Of the kept weights, in the order of the mask; those of `dense` by default.
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
    """Write a weight whose rows are whole bytes of its mask, in as many threads as torch has.

    They are threads of their own, each with one long stretch: torch's would meet after every piece, and wait for each
    other wherever something else runs on the machine, a hundred times as long as the work takes.
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
            piece = np.take(here, places.reshape(-1), mode="clip")  # what is removed gets any of them
            passed += int(ends[-1])
        np.bitwise_and(piece.view(np.uint64), kept_words.reshape(-1).view(np.uint64), out=target[where].view(np.uint64))


@dataclass(frozen=True)
class _Tables:
    """What each byte of a mask stands for.

    Attributes
    ----------
    words
        Ones where a weight is kept, in items of 16 bytes, the largest that numpy copies in one go: ``[256, items]``.
    before, counts
        How many weights are kept before each of its eight, ``[256, 8]``, and in all, ``[256]``.
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
