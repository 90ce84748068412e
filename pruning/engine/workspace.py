"""Where a sweep puts what it has done so far: in memory, or in a folder from which a killed one goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole_file, write_json
from ..masks import pack_bits
from .choices import Choice

#: Seconds of work that a kill may cost, about.
CHECKPOINT_SECONDS = 60.0


class Workspace:
    """What a sweep has made so far.

    Parameters
    ----------
    folder
        For what is finished block by block, and for hidden states to go on with after a kill; ``None`` keeps everything
        in memory. Removed by :meth:`close`.
    key
        Of all that the work depends on; what another key left in the folder is removed.
    spill
        Whether hidden states live in the folder instead of in memory.
    """

    def __init__(self, folder: Path | None = None, key: str = "", *, spill: bool = False) -> None:
        self.folder = folder
        self.spill = spill and folder is not None
        self._results: dict[str, Tensor] = {}
        self._block: dict[str, Tensor] = {}
        self._remarks: dict[str, list[str]] = {}
        self._saved = time.monotonic()
        if folder is not None:
            if self._read("work.json").get("key") != key:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_json(folder / "work.json", {"key": key})
            self._remarks = self._position().get("remarks", {})

    # -- results ---------------------------------------------------------------------------------------------

    def put(self, job: str, layer: int, choice: Choice) -> None:
        """Take in what a job made of a block."""
        for role, mask in choice.masks.items():
            self._block[f"{job}/mask/{layer}.{role}"] = pack_bits(mask)
        for role, weight in choice.weights.items():
            self._block[f"{job}/kept/{layer}.{role}"] = weight[choice.masks[role]].cpu()
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
            with whole_file(self.folder / f"block-{layer}.safetensors") as partial:
                save_file(self._block, partial)
        self._block = {}

    def results(self, job: str, kind: str) -> dict[str, Tensor]:
        """Return ``layer.role`` to the packed masks (`kind` ``mask``) or kept values (``kept``) of a job."""
        prefix = f"{job}/{kind}/"
        found = {name.removeprefix(prefix): t for name, t in self._results.items() if name.startswith(prefix)}
        for path in sorted(self.folder.glob("block-*.safetensors")) if self.folder else ():
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(prefix):
                        found[name.removeprefix(prefix)] = file.get_tensor(name)
        return found

    def remarks(self, job: str) -> tuple[str, ...]:
        """Return what is to be said of a job."""
        return tuple(self._remarks.get(job, ()))

    # -- hidden states, and going on after a kill --------------------------------------------------------------

    def keep(self, layer: int, stream: str, part: str, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Take the states of a stream before a block; they come back as they are, or to be read from the folder."""
        return self._write(layer, stream, part, batches) if self.spill else batches

    def checkpoint(self, layer: int, states: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> None:
        """Make sure that a killed sweep can go on before a block, if the last such point is a while ago."""
        if self.folder is None or not (self.spill or time.monotonic() - self._saved > CHECKPOINT_SECONDS):
            return
        if not self.spill:
            for stream, parts in states.items():
                for part, batches in parts.items():
                    self._write(layer, stream, part, batches)
        kept = {stream: {part: len(batches) for part, batches in parts.items()} for stream, parts in states.items()}
        write_json(self.folder / "position.json", {"layer": layer, "states": kept, "remarks": self._remarks})
        self._remove_states(but=layer)
        self._saved = time.monotonic()

    def resumed(self) -> tuple[int, dict[str, dict[str, Sequence[Tensor]]]] | None:
        """Return the block to go on with and the states before it, or ``None`` to begin at the beginning."""
        position = self._position()
        if self.folder is None or not position:
            return None
        layer = position["layer"]
        self._remove_states(but=layer)
        states: dict[str, dict[str, Sequence[Tensor]]] = {}
        for stream, parts in position["states"].items():
            for part, count in parts.items():
                found = _OnDisk(self._states(layer) / f"{stream}.{part}.safetensors", count)
                states.setdefault(stream, {})[part] = found if self.spill else list(found)
        return layer, states

    def _write(self, layer: int, stream: str, part: str, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        path = self._states(layer) / f"{stream}.{part}.safetensors"
        with whole_file(path) as partial:
            save_file({str(i): batch.cpu().contiguous() for i, batch in enumerate(batches)}, partial)
        return _OnDisk(path, len(batches))

    def _states(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"states-{layer}"

    def _remove_states(self, *, but: int) -> None:
        assert self.folder is not None
        for folder in self.folder.glob("states-*"):
            if folder != self._states(but):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    def _position(self) -> dict[str, Any]:
        return self._read("position.json")

    def _read(self, name: str) -> dict[str, Any]:
        if self.folder is None or not (self.folder / name).is_file():
            return {}
        content: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return content


class _OnDisk(Sequence[Tensor]):
    """States that are read from a file, a batch at a time."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(str(index)).clone()  # else the whole file stays mapped
