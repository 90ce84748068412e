"""Where a sweep keeps its intermediate state and results: in memory, or in a folder, so that it can resume."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..errors import DiskError
from ..files import PARTIAL, content_sha256, disk_errors, file_sha256, write_json
from ..patterns import Shape
from ..projections import Key
from ..variants.biases import BIASES_FILE, open_biases
from ..variants.codes import CodeSet, PackedCodes
from ..variants.masks import MaskSet, pack_bits
from ..variants.store import (
    CODES_FILE,
    MASKS_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    VariantWriter,
    open_codes,
    open_masks,
    open_values,
)
from .choosing import Choice
from .shelves import InMemory, OnDisk, Place, Shelf, Spill

#: About how many seconds of work a kill may cost.
CHECKPOINT_SECONDS = 60.0
_WORK, _POSITION, _RESULTS, _ASIDE = "work.json", "position.json", "results", "aside"
_FORMAT: Final = "prunescope-workspace-1"
#: Files that a workspace writes below its folder; nothing else is ever removed.
_FILES = re.compile(
    rf"({_ASIDE}/)?({_WORK}|{_POSITION}|states-\d+/[^/]+\.safetensors|"
    rf"{_RESULTS}/[^/]+/({RECIPE_FILE}|{MASKS_FILE}|{WEIGHTS_FILE}|{CODES_FILE}|{BIASES_FILE}))"
)
_FOLDERS = re.compile(rf"{_ASIDE}|({_ASIDE}/)?(states-\d+|{_RESULTS}(/[^/]+)?)")


class Workspace:
    """Intermediate state and results of a sweep.

    Parameters
    ----------
    folder
        Folder for unfinished variants and for the hidden states needed to resume; ``None`` keeps everything in memory.
        It must be new, empty, or already a workspace. :meth:`close` removes what was written there.
    key
        Hash of everything that the work depends on; files left by another key are removed.
    model
        Fingerprint of the dense model.
    jobs
        Names of the variants that are made here, for :func:`begun`.
    states
        Where hidden states are stored: on the model's device, in host memory, or in the folder.
    finished
        Names of the variants that were already moved out of the folder.

    Raises
    ------
    DiskError
        If the folder holds other files.
    """

    def __init__(
        self,
        folder: Path | None = None,
        key: str = "",
        *,
        model: str = "",
        jobs: Sequence[str] = (),
        states: Place = "device",
        finished: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.model = model
        self.states_place: Place = "host" if states == "disk" and folder is None else states
        self._finished = frozenset(finished)
        self._writers: dict[str, VariantWriter] = {}
        self._masks: dict[str, dict[Key, Tensor]] = {}
        self._inputs: dict[str, dict[Key, int]] = {}
        self._values: dict[str, dict[Key, Tensor]] = {}
        self._codes: dict[str, dict[Key, PackedCodes]] = {}
        self._biases: dict[str, dict[Key, Tensor]] = {}
        self._remarks: dict[str, list[str]] = {}
        self._digests: dict[str, str] = {}
        self._position: dict[str, Any] | None = None
        self._saved = time.monotonic()
        #: Names of variants that failed, with the reason.
        self.set_aside: dict[str, str] = {}
        if folder is not None:
            self._open(folder, {"format": _FORMAT, "key": key, "jobs": list(jobs)})

    def _open(self, folder: Path, work: dict[str, Any]) -> None:
        if _read(folder / _WORK) != work:
            foreign = [path for path in folder.rglob("*") if not _is_ours(folder, path)] if folder.is_dir() else []
            if foreign or (folder.exists() and not folder.is_dir()):
                raise DiskError(f"{folder} holds files that are not a workspace; choose a new or empty folder")
            with disk_errors(folder):
                _clear(folder)
                folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _WORK, work)
        self._position = self._trusted_position()
        if self._position is not None:
            self._remarks = self._position["remarks"]
            self._digests = self._position["files"]
            self.set_aside = self._position["set_aside"]

    # -- results ---------------------------------------------------------------------------------------------

    def begin(self, job: str, shapes: Mapping[Key, Shape]) -> None:
        """Start a variant, discarding earlier results under this name.

        Parameters
        ----------
        job
            Name of the variant.
        shapes
            Shapes of the projections in its scope.
        """
        self._forget(job)
        if self.folder is not None:
            place = self.place(job)
            with disk_errors(place):
                place.mkdir(parents=True, exist_ok=True)
            self._writers[job] = VariantWriter.at(place, shapes)

    def put(self, job: str, layer: int, choice: Choice) -> None:
        """Add a job's masks, weights, codes and biases for one block."""
        for role, mask in choice.masks.items():
            packed, inputs = pack_bits(mask), mask.shape[1]
            values = kept_values(choice.weights[role], mask) if role in choice.weights else None
            if self.folder is None:
                self._masks.setdefault(job, {})[layer, role] = packed
                self._inputs.setdefault(job, {})[layer, role] = inputs
                if values is not None:
                    self._values.setdefault(job, {})[layer, role] = values
            else:
                with disk_errors(self.place(job)):
                    self._writers[job].add((layer, role), packed, inputs, values)
        for role, quantized in choice.codes.items():
            codes = PackedCodes.pack(quantized)
            if self.folder is None:
                self._codes.setdefault(job, {})[layer, role] = codes
            else:
                with disk_errors(self.place(job)):
                    self._writers[job].add_codes((layer, role), codes)
        for role, bias in choice.biases.items():
            if self.folder is None:
                self._biases.setdefault(job, {})[layer, role] = bias.cpu()
            else:
                with disk_errors(self.place(job)):
                    self._writers[job].add_bias((layer, role), bias)
        self.remark(job, choice.remarks)

    def remark(self, job: str, remarks: Sequence[str]) -> None:
        """Add remarks on a job, without duplicates."""
        known = self._remarks.setdefault(job, [])
        known += [remark for remark in remarks if remark not in known]

    def give_up(self, job: str, reason: str) -> None:
        """Set aside a variant that failed, with the reason."""
        self.set_aside[job] = reason
        self._forget(job)

    def place(self, job: str) -> Path:
        """Return the folder of an unfinished variant."""
        assert self.folder is not None
        return self.folder / _RESULTS / job

    def results(self, job: str) -> tuple[MaskSet, Mapping[Key, Tensor], CodeSet, Mapping[Key, Tensor]]:
        """Return a finished variant's masks, kept values, codes and biases; from a folder, all but biases on access."""
        if self.folder is None:
            packed = {key: bits.numpy() for key, bits in self._masks.get(job, {}).items()}
            masks = MaskSet(packed, self._inputs.get(job, {}))
            return masks, self._values.get(job, {}), CodeSet(self._codes.get(job)), self._biases.get(job, {})
        place = self.place(job)
        if job in self._writers:
            with disk_errors(place):
                self._writers[job].finish(self.model)
        masks = open_masks(place, self.model)
        values, codes = open_values(place, masks, self.model), open_codes(place, self.model)
        return masks, values, codes, open_biases(place, self.model)

    def remarks(self, job: str) -> tuple[str, ...]:
        """Return the remarks on a job."""
        return tuple(self._remarks.get(job, ()))

    def _forget(self, job: str) -> None:
        for results in (self._writers, self._masks, self._inputs, self._values, self._codes, self._biases):
            results.pop(job, None)
        if self.folder is not None:
            _clear(self.folder, self.place(job))

    # -- hidden states, and resuming after a kill --------------------------------------------------------------

    def aside(self) -> Workspace:
        """Return a workspace for states that need not survive a kill, stored where this one's are."""
        if self.states_place != "disk" or self.folder is None:
            return Workspace(states=self.states_place)
        _clear(self.folder, self.folder / _ASIDE)
        return Workspace(self.folder / _ASIDE, states="disk")

    def shelf(self, layer: int, stream: str, part: str, batches: int) -> Shelf:
        """Return storage for the states of a stream before a block, filled batch by batch."""
        if self.states_place == "disk":
            return self._file(layer, stream, part, batches)
        return InMemory(on_host=self.states_place == "host")

    def checkpoint(self, layer: int, states: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> None:
        """Save what a killed sweep needs to resume before a block, unless the last checkpoint is recent."""
        spilled = self.states_place == "disk"
        if self.folder is None or not (spilled or time.monotonic() - self._saved >= CHECKPOINT_SECONDS):
            return
        for stream, parts in states.items():
            for part, batches in parts.items():
                if not (isinstance(batches, OnDisk) and batches.path == self._state_file(layer, stream, part)):
                    file = self._file(layer, stream, part, len(batches))
                    for batch in batches:
                        file.add(batch)
                    file.done()
        self._record(layer, {stream: sorted(parts) for stream, parts in states.items()})
        self._remove_states(but=layer)

    def complete(self) -> None:
        """Record that the sweep is complete."""
        if self.folder is not None:
            self._record(None, {})
            self._remove_states()

    @property
    def is_complete(self) -> bool:
        """Whether the sweep was completed before a kill."""
        return self._position is not None and self._position["layer"] is None

    def _record(self, layer: int | None, streams: Mapping[str, Sequence[str]]) -> None:
        assert self.folder is not None
        with disk_errors(self.folder):
            results = {job: writer.state() for job, writer in self._writers.items()}
        states = "" if layer is None else f"{self._states(layer).name}/"
        self._digests = {name: d for name, d in self._digests.items() if states and name.startswith(states)}
        position = {
            "layer": layer,
            "streams": streams,
            "remarks": self._remarks,
            "set_aside": self.set_aside,
            "results": results,
            "files": self._digests,
        }
        write_json(self.folder / _POSITION, {"position": position, "sha256": content_sha256(position)})
        self._saved = time.monotonic()

    def resumed(self) -> tuple[int, dict[str, dict[str, Sequence[Tensor]]]] | None:
        """Return the block to resume at and the states before it, or ``None`` to start from the beginning."""
        if self._position is None or self.is_complete:
            return None
        layer = self._position["layer"]
        self._remove_states(but=layer)
        states: dict[str, dict[str, Sequence[Tensor]]] = {}
        for stream, parts in self._position["streams"].items():
            found = {part: OnDisk(self._state_file(layer, stream, part)) for part in parts}
            on_disk = self.states_place == "disk"
            states[stream] = {part: batches if on_disk else list(batches) for part, batches in found.items()}
        return layer, states

    def close(self) -> None:
        """Remove what was written into the folder, and the folder itself if it is then empty."""
        if self.folder is not None:
            _clear(self.folder)

    def _file(self, layer: int, stream: str, part: str, batches: int) -> Spill:
        path = self._state_file(layer, stream, part)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return Spill(path, batches, self._note)

    def _note(self, path: Path, digest: str) -> None:
        assert self.folder is not None
        self._digests[path.relative_to(self.folder).as_posix()] = digest

    def _state_file(self, layer: int, stream: str, part: str) -> Path:
        return self._states(layer) / f"{stream}.{part}.safetensors"

    def _states(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"states-{layer}"

    def _remove_states(self, *, but: int | None = None) -> None:
        assert self.folder is not None
        for folder in self.folder.glob("states-*"):
            if but is None or folder != self._states(but):
                _clear(self.folder, folder)

    def _trusted_position(self) -> dict[str, Any] | None:
        """Return where a killed sweep stopped, if its record and all its files are intact."""
        assert self.folder is not None
        record = _read(self.folder / _POSITION)
        position: dict[str, Any] | None = record.get("position")
        if position is None or record.get("sha256") != content_sha256(position):
            return None
        for name, digest in position["files"].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != digest:
                return None
        for job, state in position["results"].items():
            if not (position["layer"] is None and job in self._finished):
                writer = VariantWriter.resumed(self.place(job), state)
                if writer is None:
                    self._writers = {}
                    return None
                self._writers[job] = writer
        return position


def begun(folder: Path) -> list[str] | None:
    """Return which variants a killed sweep was making in a folder, or ``None`` if it is not a workspace."""
    work = _read(folder / _WORK)
    jobs = work.get("jobs")
    if work.get("format") != _FORMAT or not isinstance(jobs, list) or not all(isinstance(job, str) for job in jobs):
        return None
    return jobs


def clear(folder: Path) -> None:
    """Remove what a workspace wrote into a folder, and the folder itself if it is then empty."""
    _clear(folder)


def _is_ours(folder: Path, path: Path) -> bool:
    names = _FOLDERS if path.is_dir() and not path.is_symlink() else _FILES
    return names.fullmatch(path.relative_to(folder).as_posix().removesuffix(PARTIAL)) is not None


def _clear(folder: Path, below: Path | None = None) -> None:
    """Remove what a workspace wrote into its folder, or into one below it, and folders that are then empty."""
    below = below or folder
    for path in [*sorted(below.rglob("*"), reverse=True), below]:
        if path == folder or _is_ours(folder, path):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()


def kept_values(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the kept values of a weight in mask order, in host memory."""
    if weight.device.type != "cpu":
        return weight[mask].cpu()
    bits = weight.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    kept = np.compress(mask.numpy().ravel(), bits.numpy().ravel())  # eight times as fast as indexing in torch
    return torch.from_numpy(kept).view(weight.dtype)


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
