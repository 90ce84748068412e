"""Masks meet weights: a pruned weight is written straight to where it is wanted, and no whole mask of booleans is made.

On a CPU a byte of a mask, which stands for eight weights, is looked up in a table of words of all ones or all zeros.
The bits of the dense weights go through them with AND, in pieces that fit into a processor's cache. To other devices
the mask travels with eight weights a byte, and is unpacked there.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .masks import unpack_bits

#: Bytes of a mask that are looked up at a time on a CPU: they stand for a megabyte of weights in bfloat16.
_PIECE = 1 << 16
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
        _write_bits(dense, bits.flatten(), out, values)
    else:
        rows, passed = max(_UNPACKED // out.shape[1], 1), 0
        for start in range(0, len(out), rows):
            stop = start + rows
            kept = 0 if values is None else int(np.bitwise_count(packed[start:stop]).sum(dtype=np.int64))
            some = None if values is None else values[passed : passed + kept]
            _write_rows(dense[start:stop], bits[start:stop], out[start:stop], some)
            passed += kept


def _write_bits(dense: Tensor, bits: Tensor, out: Tensor, values: Tensor | None) -> None:
    size = dense.element_size()
    kind = _INTEGERS[size]
    target = out.view(-1).view(kind).view(torch.int64)
    source = dense.view(-1).view(kind).view(torch.int64)
    stored = None if values is None else values.to(dense.dtype).contiguous().view(kind)
    passed = 0
    for start in range(0, len(bits), _PIECE):
        some = bits[start : start + _PIECE].int()
        where = slice(start * size, (start + len(some)) * size)
        if stored is None:
            piece = source[where]
        else:
            spread, kept = _spread(some, stored[passed:])
            piece, passed = spread.view(torch.int64), passed + kept
        words = torch.view_as_real(_table(size).index_select(0, some)).view(torch.int64)
        torch.bitwise_and(piece, words.flatten(), out=target[where])


def _spread(bits: Tensor, values: Tensor) -> tuple[Tensor, int]:
    """Return the next values, each where its bit is set (and anything elsewhere), and how many there are."""
    before, counts = _ranks()
    of_byte = counts.index_select(0, bits)
    ends = of_byte.cumsum(0, dtype=torch.int32)
    kept = int(ends[-1])
    places = before.index_select(0, bits).add_((ends - of_byte)[:, None]).flatten()
    some = values[: kept + 1]  # a removed weight after the last kept one is sent to what comes next
    if len(some) <= kept:
        some = torch.cat([some, some.new_zeros(1)])
    return some.index_select(0, places), kept


@cache
def _ranks() -> tuple[Tensor, Tensor]:
    """Return, for each byte of a mask, how many weights are kept before each of its eight, and in all."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.int32)
    return torch.from_numpy(np.cumsum(bits, axis=1, dtype=np.int32) - bits), torch.from_numpy(
        bits.sum(1, dtype=np.int32)
    )


@cache
def _table(size: int) -> Tensor:
    """Return, for weights of `size` bytes, what each byte of a mask stands for, complex128 ``[256, size / 2]``.

    The numbers mean nothing: items of 16 bytes are the largest that are looked up in one go.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    words = np.repeat(-bits.astype(np.int8), size, axis=1)
    return torch.from_numpy(words.view(np.complex128))


def _write_rows(dense: Tensor, bits: Tensor, out: Tensor, values: Tensor | None) -> None:
    mask = unpack_bits(bits, out.shape[1])
    if values is None:
        out.copy_(torch.where(mask, dense, torch.zeros((), dtype=dense.dtype, device=dense.device)))
    else:
        out.copy_(torch.zeros_like(dense).masked_scatter_(mask, values.to(dense.dtype)))
