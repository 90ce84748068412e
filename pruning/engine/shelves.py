"""Where hidden states wait for their next block: on the device, in memory, or in a file, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..files import disk_errors, file_sha256
from ..variants.tensors import GrowingTensors, StoredTensors, room_for

#: Where hidden states wait.
Place = Literal["device", "host", "disk"]


@runtime_checkable
class Shelf(Protocol):
    """Where the states of a stream are put, a batch at a time."""

    def add(self, batch: Tensor) -> None:
        """Take a batch."""

    def done(self) -> Sequence[Tensor]:
        """Return all batches, each read when it is asked for if they are in a file."""


class InMemory:
    """A list of batches, moved off the device or not."""

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._batches: list[Tensor] = []

    def add(self, batch: Tensor) -> None:
        """Take a batch."""
        self._batches.append(batch.cpu() if self._on_host else batch)

    def done(self) -> Sequence[Tensor]:
        """Return all batches."""
        return self._batches


class Spill:
    """A file of states; its name is the final one, since only what is on record is ever read again."""

    def __init__(self, path: Path, batches: int, note: Callable[[Path, str], None]) -> None:
        sizes = {str(number): 1 << 40 for number in range(batches)}
        self._file = GrowingTensors(path, room_for(sizes, {}))
        self._note = note

    def add(self, batch: Tensor) -> None:
        """Write a batch."""
        with disk_errors(self._file.path):
            self._file.add(str(len(self._file)), batch)

    def done(self) -> Sequence[Tensor]:
        """Return the batches, each read when it is asked for."""
        with disk_errors(self._file.path):
            self._file.finish({})
        self._note(self._file.path, file_sha256(self._file.path))
        return OnDisk(self._file.path)


class OnDisk(Sequence[Tensor]):
    """States that are read from a file, a batch at a time."""

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
    """Batches of several streams, one after the other, without reading those that are in files."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._places = [(part, number) for part in parts for number in range(len(part))]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        """Return one batch."""
        part, number = self._places[index]
        return part[number]
