"""Storage of hidden states between blocks: on the device, in host memory, or in a file, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..files import disk_errors, file_sha256
from ..variants.tensors import GrowingTensors, StoredTensors, room_for

#: Where hidden states are stored between blocks.
Place = Literal["device", "host", "disk"]


@runtime_checkable
class Shelf(Protocol):
    """Storage for the states of a stream, filled batch by batch."""

    def add(self, batch: Tensor) -> None:
        """Add a batch."""

    def done(self) -> Sequence[Tensor]:
        """Return all batches; those in a file are read on access."""


class InMemory:
    """A list of batches, on the device or moved to the host."""

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._batches: list[Tensor] = []

    def add(self, batch: Tensor) -> None:
        """Add a batch."""
        self._batches.append(batch.cpu() if self._on_host else batch)

    def done(self) -> Sequence[Tensor]:
        """Return all batches."""
        return self._batches


class Spill:
    """A file of states; it needs no temporary name, since only files on record are ever read back."""

    def __init__(self, path: Path, batches: int, note: Callable[[Path, str], None]) -> None:
        sizes = {str(number): 1 << 40 for number in range(batches)}
        self._file = GrowingTensors(path, room_for(sizes, {}))
        self._note = note

    def add(self, batch: Tensor) -> None:
        """Write a batch."""
        with disk_errors(self._file.path):
            self._file.add(str(len(self._file)), batch)

    def done(self) -> Sequence[Tensor]:
        """Return the batches, each read on access."""
        with disk_errors(self._file.path):
            self._file.finish({})
        self._note(self._file.path, file_sha256(self._file.path))
        return OnDisk(self._file.path)


class OnDisk(Sequence[Tensor]):
    """States in a file, read one batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = StoredTensors(path)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._file.shapes)

    def __getitem__(self, index: Any) -> Any:
        """Read one batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._file.read(str(index))


class Joined(Sequence[Tensor]):
    """Batches of several streams, concatenated lazily."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._places = [(part, number) for part in parts for number in range(len(part))]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """Return one batch."""
        part, number = self._places[index]
        return part[number]
