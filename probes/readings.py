"""Readings of one model in one language: the sums that analyzers work from, in memory or memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning.errors import StudyError
from pruning.files import disk_errors

from .readers.firing import FOLDS
from .readers.signal import SIGNAL_SITES

_DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}
_FILL = {"power": np.nan, "error": np.nan}


@dataclass(frozen=True)
class Readings:
    """Everything that analyzers need of one model in one language: sums, never full activations.

    Tensors opened from a file are memory-mapped, so that a slice is read only when used. For 32 blocks × 4096 × 14336
    and 128 segments a file takes 83 MB.

    Attributes
    ----------
    pooled
        Mean hidden state of each segment after each block, float32 ``[layers, segments, hidden]``.
    fired
        Number of tokens on which each MLP neuron fires, int32 ``[folds, layers, neurons]``, where segment i counts in
        fold i mod :data:`probes.readers.firing.FOLDS`. Those of expert e are number e · (neurons of an expert) and on;
        blocks with fewer neurons than others have zeros after them.
    tokens
        Number of tokens counted in each segment in each block, int64 ``[layers, segments]``: the same in all blocks but
        for an encoder-decoder, whose encoder reads all of a segment and whose decoder its second half.
    nll
        Negative log-likelihood of each segment in nats, float64 ``[segments]``.
    predicted
        Number of tokens predicted in each segment, int64 ``[segments]``.
    utf8_bytes
        Length in UTF-8 bytes of the part of each segment that was predicted, int64 ``[segments]``.
    power
        The dense model's ``Σ‖x‖²`` over a segment's counted tokens, float64 ``[segments, layers, sites]``, with the
        sites of :data:`probes.readers.signal.SIGNAL_SITES`; NaN where a block lacks a site.
    error
        ``Σ‖x − x̂‖²`` between the dense model and this one, of the same shape; zero for the dense model itself.
    routed
        Number of tokens of each segment that are routed to each expert, int32 ``[segments, layers, experts]``; no
        experts in a model without.
    agreed
        Number of a token's experts that the dense model chooses for it too, summed over tokens, int32 ``[segments,
        layers]``; no layers in a model without experts.
    neurons
        Of a mixture of experts: neurons of each expert, and, last, those that all tokens pass through, int64 ``[layers,
        experts + 1]``.
    context
        Number of tokens counted of those that a decoder attends to in its encoder, int64 ``[segments]``: of the first
        half, which the decoder does not read itself; 0 in a decoder-only model.
    """

    pooled: Tensor
    fired: Tensor
    tokens: Tensor
    nll: Tensor
    predicted: Tensor
    utf8_bytes: Tensor
    power: Tensor
    error: Tensor
    routed: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.int32))
    agreed: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int32))
    neurons: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.int64))
    context: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @classmethod
    def empty(
        cls, segments: int, layers: int, hidden: int, neurons: int, path: Path | None = None, *, experts: int = 0
    ) -> Readings:
        """Return empty readings to be filled in, in memory or in a new file at `path`.

        Raises
        ------
        DiskError
            If the file cannot be written, or does not fit on the disk.
        """
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "pooled": ("F32", (layers, segments, hidden)),
            "fired": ("I32", (FOLDS, layers, neurons)),
            "tokens": ("I64", (layers, segments)),
            "context": ("I64", (segments,)),
            "nll": ("F64", (segments,)),
            "predicted": ("I64", (segments,)),
            "utf8_bytes": ("I64", (segments,)),
            "power": ("F64", (segments, layers, len(SIGNAL_SITES))),
            "error": ("F64", (segments, layers, len(SIGNAL_SITES))),
            "routed": ("I32", (segments, layers, experts)),
            "agreed": ("I32", (segments, layers if experts else 0)),
            "neurons": ("I64", (layers if experts else 0, experts + 1)),
        }
        if path is None:
            arrays = {name: np.zeros(shape, dtype=_DTYPES[kind]) for name, (kind, shape) in shapes.items()}
        else:
            arrays = _created(path, shapes)
        for name, value in _FILL.items():
            arrays[name][...] = value
        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def pooled_at(self, layer: int) -> Tensor:
        """Return the mean hidden state of each segment after one block, float32 ``[segments, hidden]``."""
        return self.pooled[layer]

    @property
    def experts(self) -> int:
        """Number of experts of a block, 0 in a model without."""
        return self.routed.shape[2]

    @property
    def n_neurons(self) -> int:
        """Number of neurons of all blocks."""
        return int(self.neurons.sum()) if self.experts else self.fired[0].numel()

    @classmethod
    def open(cls, path: Path) -> Readings:
        """Open a file written through :meth:`empty`; its tensors are memory-mapped.

        Raises
        ------
        StudyError
            If the file is damaged.
        """
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                start = file.tell()
            names = {field.name for field in fields(cls)}
            if {name for name in header if name != "__metadata__"} != names:
                raise ValueError("it holds something else")
            end = max(header[name]["data_offsets"][1] for name in names)
            if path.stat().st_size != start + end:
                raise ValueError("it was cut short")
            described = {name: header[name] for name in names}
            return cls(
                **{name: torch.from_numpy(array) for name, array in _mapped(path, start, described, "c").items()}
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError, OverflowError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


class StoredReadings(Mapping[tuple[str, str], Readings]):
    """Readings on disk by ``(model, language)``, opened at each access and never cached.

    Parameters
    ----------
    files
        ``(model, language)`` to path.
    """

    def __init__(self, files: Mapping[tuple[str, str], Path]) -> None:
        self._files = dict(files)

    def __getitem__(self, key: tuple[str, str]) -> Readings:
        """Open the readings of one model in one language."""
        return Readings.open(self._files[key])

    def __contains__(self, key: object) -> bool:
        """Whether there are readings for this model and language."""
        return key in self._files  # Mapping's own would open the file

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Iterate over models and languages."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return the number of readings."""
        return len(self._files)


def _created(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Create a safetensors file of zeros, with all its disk space allocated, and memory-map its tensors."""
    header: dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in sorted(shapes.items(), key=lambda item: -np.dtype(_DTYPES[item[1][0]]).itemsize):
        begin, end = end, end + int(np.prod(shape)) * np.dtype(_DTYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    with disk_errors(path), path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # otherwise writing to a memory map crashes when the disk is full
            os.posix_fallocate(file.fileno(), 0, start + end)
        else:
            file.truncate(start + end)
    return _mapped(path, start, header, "r+")


def _mapped(path: Path, start: int, header: Mapping[str, Any], mode: Any) -> dict[str, np.ndarray]:
    """Memory-map the tensors of a file, all in one map, since each map holds a file descriptor."""
    content = np.memmap(path, dtype=np.uint8, mode=mode)
    arrays = {}
    for name, described in header.items():
        begin, end = (start + offset for offset in described["data_offsets"])
        arrays[name] = content[begin:end].view(_DTYPES[described["dtype"]]).reshape(described["shape"])
    return arrays
