"""Where a sweep puts what it has done so far: in memory, or in a folder from which a killed one goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DiskError
from ..files import PARTIAL, content_sha256, disk_errors, file_sha256, whole_file, write_json
from ..variants.masks import Key, pack_bits
from .choosing import Choice

#: Seconds of work that a kill may cost, about.
CHECKPOINT_SECONDS = 60.0
_WORK, _POSITION = "work.json", "position.json"


class Workspace:
    """What a sweep has made so far.

    Parameters
    ----------
    folder
        For what is finished block by block, and for hidden states to go on with after a kill; ``None`` keeps everything
        in memory. New, empty, or a workspace already. Removed by :meth:`close`.
    key
        Of all that the work depends on; what another key left in the folder is removed.
    spill
        Whether hidden states live in the folder instead of in memory.

    Raises
    ------
    DiskError
        If the folder holds something else.
    """

    def __init__(self, folder: Path | None = None, key: str = "", *, spill: bool = False) -> None:
        self.folder = folder
        self.spill = spill and folder is not None
        self._results: dict[str, Tensor] = {}
        self._block: dict[str, Tensor] = {}
        self._remarks: dict[str, list[str]] = {}
        self._digests: dict[str, str] = {}
        self._position: dict[str, Any] | None = None
        self._saved = time.monotonic()
        if folder is not None:
            self._open(folder, key)

    def _open(self, folder: Path, key: str) -> None:
        if _read(folder / _WORK).get("key") != key:
            leftovers = [path for path in folder.glob("*") if not path.name.endswith(PARTIAL)]
            if leftovers and not (folder / _WORK).is_file():
                raise DiskError(f"{folder} holds something else than a workspace; choose a new or empty folder")
            with disk_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _WORK, {"key": key})
        self._position = self._trusted_position()
        if self._position is not None:
            self._remarks = self._position["remarks"]
            self._digests = self._position["files"]

    # -- results ---------------------------------------------------------------------------------------------

    def put(self, job: str, layer: int, choice: Choice) -> None:
        """Take in what a job made of a block."""
        for role, mask in choice.masks.items():
            self._block[f"{job}/mask/{layer}.{role}"] = pack_bits(mask)
        for role, weight in choice.weights.items():
            self._block[f"{job}/kept/{layer}.{role}"] = _kept(weight, choice.masks[role])
        if choice.remarks:
            self._remarks.setdefault(job, []).extend(choice.remarks)

    def remark(self, job: str, remarks: Sequence[str]) -> None:
        """Take in remarks on a job as a whole."""
        if remarks and not set(remarks) <= set(self._remarks.get(job, [])):
            self._remarks.setdefault(job, []).extend(remarks)

    def finish_block(self, layer: int) -> None:
        """Note that every job has had its block."""
        if self.folder is None:
            self._results |= self._block
        elif self._block:
            path = self.folder / f"block-{layer}.safetensors"
            with whole_file(path) as partial:
                save_file(self._block, partial)
            self._note(path)
        self._block = {}

    def results(self, job: str, kind: str) -> Mapping[Key, Tensor]:
        """Return the packed masks (`kind` ``mask``) or kept values (``kept``) of a job, each read when asked for."""
        prefix = f"{job}/{kind}/"
        if self.folder is None:
            return {_key(name, prefix): t for name, t in self._results.items() if name.startswith(prefix)}
        places: dict[Key, tuple[Path, str]] = {}
        for path in self.folder.glob("block-*.safetensors"):
            with safe_open(path, "pt") as file:
                places |= {_key(name, prefix): (path, name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        return _Results(places)

    def remarks(self, job: str) -> tuple[str, ...]:
        """Return what is to be said of a job."""
        return tuple(self._remarks.get(job, ()))

    # -- hidden states, and going on after a kill --------------------------------------------------------------

    def aside(self) -> Workspace:
        """Return a workspace for states that are not to be gone on with, in memory or in the folder as this one's."""
        if not self.spill or self.folder is None:
            return Workspace()
        shutil.rmtree(self.folder / "aside", ignore_errors=True)
        return Workspace(self.folder / "aside", spill=True)

    def keep(self, layer: int, stream: str, part: str, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take the states of a stream before a block; they come back as they are, or to be read from the folder."""
        return self._write(layer, stream, part, batches) if self.spill else batches

    def checkpoint(self, layer: int, states: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> None:
        """Make sure that a killed sweep can go on before a block, if the last such point is a while ago."""
        if self.folder is None or not (self.spill or time.monotonic() - self._saved >= CHECKPOINT_SECONDS):
            return
        for stream, parts in states.items():
            for part, batches in parts.items():
                if not (isinstance(batches, _OnDisk) and batches.path == self._place(layer, stream, part)):
                    self._write(layer, stream, part, batches)
        states_before = f"{self._states(layer).name}/"
        self._digests = {n: d for n, d in self._digests.items() if n.startswith(("block-", states_before))}
        position = {
            "layer": layer,
            "streams": {stream: sorted(parts) for stream, parts in states.items()},
            "remarks": self._remarks,
            "files": self._digests,
        }
        write_json(self.folder / _POSITION, {"position": position, "sha256": content_sha256(position)})
        self._remove_states(but=layer)
        self._saved = time.monotonic()

    def resumed(self) -> tuple[int, dict[str, dict[str, Sequence[Tensor]]]] | None:
        """Return the block to go on with and the states before it, or ``None`` to begin at the beginning."""
        if self._position is None:
            return None
        layer = self._position["layer"]
        self._remove_states(but=layer)
        states: dict[str, dict[str, Sequence[Tensor]]] = {}
        for stream, parts in self._position["streams"].items():
            found = {part: _OnDisk(self._place(layer, stream, part)) for part in parts}
            states[stream] = {part: batches if self.spill else list(batches) for part, batches in found.items()}
        return layer, states

    def close(self) -> None:
        """Remove the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, layer: int, stream: str, part: str, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        path = self._place(layer, stream, part)
        with whole_file(path) as partial:
            save_file({str(i): batch.cpu().contiguous() for i, batch in enumerate(batches)}, partial)
        self._note(path)
        return _OnDisk(path)

    def _note(self, path: Path) -> None:
        assert self.folder is not None
        self._digests[str(path.relative_to(self.folder))] = file_sha256(path)

    def _place(self, layer: int, stream: str, part: str) -> Path:
        return self._states(layer) / f"{stream}.{part}.safetensors"

    def _states(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"states-{layer}"

    def _remove_states(self, *, but: int) -> None:
        assert self.folder is not None
        for folder in self.folder.glob("states-*"):
            if folder != self._states(but):
                shutil.rmtree(folder, ignore_errors=True)

    def _trusted_position(self) -> dict[str, Any] | None:
        """Return where a killed sweep was, if its record and all files that it left are there, unaltered."""
        assert self.folder is not None
        record = _read(self.folder / _POSITION)
        position: dict[str, Any] | None = record.get("position")
        if position is None or record.get("sha256") != content_sha256(position):
            return None
        for name, digest in position["files"].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != digest:
                return None
        return position


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the values that are kept, in the order of the mask."""
    if weight.device.type != "cpu":
        return weight[mask].cpu()
    bits = weight.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    kept = np.compress(mask.numpy().ravel(), bits.numpy().ravel())  # eight times as fast as torch's indexing
    return torch.from_numpy(kept).view(weight.dtype)


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(name: str, prefix: str) -> Key:
    layer, _, role = name.removeprefix(prefix).partition(".")
    return int(layer), role


class _Results(Mapping[Key, Tensor]):
    """Results of one job, each read from its file when it is asked for."""

    def __init__(self, places: Mapping[Key, tuple[Path, str]]) -> None:
        self._places = places

    def __contains__(self, key: object) -> bool:
        return key in self._places  # without reading it, which Mapping's own does

    def __getitem__(self, key: Key) -> Tensor:
        path, name = self._places[key]
        return _read_tensor(path, name)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _OnDisk(Sequence[Tensor]):
    """States that are read from a file, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self._count = len(file.keys())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return _read_tensor(self.path, str(index))


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor.clone()  # else the whole file stays mapped
