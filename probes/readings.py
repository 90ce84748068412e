"""What was read of one model in one language: sums that analyzers work from, in memory or mapped from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
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
    """Everything that the analyzers need of one model in one language: sums, never whole activations.

    Opened from a file, the tensors are mapped: a slice is read when it is used. At 32 blocks × 4096 × 14336 with 128
    segments a file has 83 MB.

    Attributes
    ----------
    pooled
        Mean hidden state of each segment after each block, float32 ``[layers, segments, hidden]``.
    fired
        Tokens on which each MLP neuron fires, int32 ``[folds, layers, neurons]``, where segment i is counted in fold
        i mod :data:`probes.readers.firing.FOLDS`; no neurons in a mixture of experts.
    tokens
        Counted tokens of each segment, int64 ``[segments]``.
    nll
        Negative log-likelihood of each segment in nats, float64 ``[segments]``.
    predicted
        Predicted tokens of each segment, int64 ``[segments]``.
    utf8_bytes
        Length of each segment, as far as it was read, int64 ``[segments]``.
    power
        The dense model's ``Σ‖x‖²`` over a segment's counted tokens, float64 ``[segments, layers, sites]``, sites as in
        :data:`probes.readers.signal.SIGNAL_SITES`; NaN where a block lacks the site.
    error
        ``Σ‖x − x̂‖²`` of this model against the dense one, likewise; zero for the dense model itself.
    """

    pooled: Tensor
    fired: Tensor
    tokens: Tensor
    nll: Tensor
    predicted: Tensor
    utf8_bytes: Tensor
    power: Tensor
    error: Tensor

    @classmethod
    def empty(cls, segments: int, layers: int, hidden: int, neurons: int, path: Path | None = None) -> Readings:
        """Return readings to be filled in: in memory, or in a new file at `path`.

        Raises
        ------
        DiskError
            If the file cannot be written, or the disk has no room for all of it.
        """
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "pooled": ("F32", (layers, segments, hidden)),
            "fired": ("I32", (FOLDS, layers, neurons)),
            "tokens": ("I64", (segments,)),
            "nll": ("F64", (segments,)),
            "predicted": ("I64", (segments,)),
            "utf8_bytes": ("I64", (segments,)),
            "power": ("F64", (segments, layers, len(SIGNAL_SITES))),
            "error": ("F64", (segments, layers, len(SIGNAL_SITES))),
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

    @classmethod
    def open(cls, path: Path) -> Readings:
        """Open a file of :meth:`empty`; its tensors are mapped from it.

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
            return cls(**{name: torch.from_numpy(_mapped(path, start, header[name], "c")) for name in names})
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError, OverflowError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


class StoredReadings(Mapping[tuple[str, str], Readings]):
    """Readings on disk by ``(model, language)``: each is opened when it is asked for, and none is kept.

    Parameters
    ----------
    files
        Where each of them is.
    """

    def __init__(self, files: Mapping[tuple[str, str], Path]) -> None:
        self._files = dict(files)

    def __getitem__(self, key: tuple[str, str]) -> Readings:
        """Open the readings of one model in one language."""
        return Readings.open(self._files[key])

    def __contains__(self, key: object) -> bool:
        """Whether there are such readings."""
        return key in self._files  # without opening them, which Mapping's own does

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Iterate over models and languages."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._files)


def _created(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Make a safetensors file of zeros, with all the disk that it needs, and map its tensors."""
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
        if hasattr(os, "posix_fallocate"):  # else a full disk would show as a crash in the middle of writing
            os.posix_fallocate(file.fileno(), 0, start + end)
        else:
            file.truncate(start + end)
    return {name: _mapped(path, start, header[name], "r+") for name in shapes}


def _mapped(path: Path, start: int, described: Mapping[str, Any], mode: Any) -> np.ndarray:
    dtype, shape = _DTYPES[described["dtype"]], tuple(described["shape"])
    if 0 in shape:  # nothing to map
        return np.zeros(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode=mode, offset=start + described["data_offsets"][0], shape=shape)
