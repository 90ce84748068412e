"""The dense model of a study: recorded facts, and the model itself, loaded on first use."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from humanize import naturalsize
from pydantic import BaseModel, ConfigDict

from probes import Session
from pruning import Anatomy, load_model
from pruning.code_version import code_version
from pruning.errors import StudyError
from pruning.files import content_sha256
from pruning.memory import free_memory
from pruning.models.checkpoint import Shards
from pruning.models.loading import checkpoint_folder, describe_model, open_device
from pruning.models.naming import DEMO
from pruning.models.streaming import Described, settle

from .configuration import StudyConfig
from .records import Records

#: Memory of a loaded model relative to its weights, to allow for batches; and that of Python and its libraries.
_ROOM, _BASE = 1.25, 800 << 20
_COPIED = 2.0  # with a copy of the dense weights
_RECORD = "model"


class ModelFacts(BaseModel):
    """What keys, plans and reports need to know about a model.

    Attributes
    ----------
    fingerprint
        Fingerprint of its weights.
    dtype, device
        Dtype and device of its computations.
    encoder_blocks
        How many of its blocks are an encoder's, which come first; 0 in a decoder-only model.
    blocks
        Number of blocks.
    body, head
        Multiply-adds per token: for all projections, and for the logits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    dtype: str
    device: str
    encoder_blocks: int
    blocks: int
    body: float
    head: float


class StudyModel:
    """The one owner of a study's model.

    Parameters
    ----------
    study, records
        The study, and the records of its results.
    memory, device_memory
        Caps in bytes; free memory by default. A larger model is read from its shards, one block at a time.
    whole
        What needs the whole model and a copy of its dense weights in memory, as the start of an error message; empty
        if nothing does.
    tell
        Called with progress messages.

    Attributes
    ----------
    seconds_to_load
        How long loading the model took; 0 before.
    """

    def __init__(
        self,
        study: StudyConfig,
        records: Records,
        memory: int | None,
        device_memory: int | None,
        whole: str,
        tell: Callable[[str], None],
    ) -> None:
        self._study = study
        self._records = records
        self._caps = memory, device_memory
        self._whole = whole
        self._tell = tell
        self.seconds_to_load = 0.0

    @cached_property
    def facts(self) -> ModelFacts:
        """Facts about the model, which is loaded if they are not on record."""
        found = self._records.facts(_RECORD, self._key)
        if found is None:
            assert self.anatomy  # loading the model records the facts
            found = self._records.facts(_RECORD, self._key)
        return ModelFacts.model_validate(found)

    @cached_property
    def session(self) -> Session:
        """The session in which probes read the model."""
        config = self._study.evaluation
        return Session(
            *self._loaded,
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
            skip_first=config.skip_first,
        )

    @cached_property
    def anatomy(self) -> Anatomy:
        """The model's parts."""
        model, _ = self._loaded
        anatomy = Anatomy(model)
        facts = _facts_of(anatomy, anatomy.fingerprint())
        if self._records.facts(_RECORD, self._key) != facts.model_dump():
            self._records.finish(_RECORD, self._key, [], 0.0, facts.model_dump())
        return anatomy

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights; tied ones count once."""
        return _bytes_of(self.anatomy)

    @property
    def whole_bytes(self) -> int:
        """Memory of a process with the whole model and a copy of its weights."""
        return int(_BASE + _COPIED * self.weight_bytes)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded[1]

    def check_device(self) -> None:
        """Raise ``PrunescopeError`` if the device is missing, or is the CPU but has a cap on device memory."""
        device = self._device
        if self._caps[1] is not None and device.type == "cpu":
            raise StudyError(
                "--device-memory caps the memory of a GPU, and this study runs on the CPU; use --memory, "
                'or choose another device (device = "cuda")'
            )

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        stream = self._must_stream(self._stored_bytes())
        note = ", one block at a time" if stream else ""
        note += " (converted on first use, about a minute)" if self._study.model == DEMO else ""
        self._tell(f"loading the model {self._study.model_name}{note}")
        began = time.monotonic()
        loaded = load_model(self._study.model, dtype=self._study.dtype, device=self._study.device, stream=stream)
        self.seconds_to_load = time.monotonic() - began
        return loaded

    @cached_property
    def _folder(self) -> Path:
        return checkpoint_folder(self._study.model)

    @cached_property
    def _device(self) -> torch.device:
        return open_device(self._study.device)

    @cached_property
    def _key(self) -> str:
        files = [path for path in self._folder.iterdir() if path.suffix in (".safetensors", ".json")]
        state = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        code = code_version("pruning.models")
        return content_sha256([code, str(self._folder), self._study.dtype, str(self._device), state])

    def _stored_bytes(self) -> int:
        """Return what the weights take in memory, by the size of the checkpoint."""
        return _loaded_bytes(Shards(self._folder), self._study.dtype, on_cpu=self._device.type == "cpu")

    def _must_stream(self, size: int) -> bool:
        """Return whether weights of so many bytes must stay on disk.

        Raises
        ------
        StudyError
            If something needs the whole model in memory, and it does not fit.
        """
        memory, on_device = self._caps
        rooms = {"memory": free_memory() if memory is None else memory}
        if self._device.type != "cpu":
            rooms[f"memory of {self._device}"] = free_memory(self._device) if on_device is None else on_device
        needed = _process_bytes(size, copied=bool(self._whole))
        for name, room in rooms.items():
            if needed > room and self._whole:
                raise StudyError(
                    f"{self._whole} the whole model and a copy of its weights in memory, about {_size(needed)}, but "
                    f"only {_size(room)} of {name} is available"
                )
        return any(needed > room for room in rooms.values())


class DescribedModel(StudyModel):
    """A study's model known by its configuration, to plan for workers elsewhere; its weights are not needed.

    It is planned for the CPU if the study asks for that, or caps no device memory; else for a device with its own
    memory. Whether results are finished can be told only if its facts are on record: otherwise its fingerprint is "".
    """

    @cached_property
    def facts(self) -> ModelFacts:
        """Facts about the model: those on record, if there are any."""
        found = self._records.facts(_RECORD, self._key)
        return _facts_of(self.anatomy, "") if found is None else ModelFacts.model_validate(found)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The model's parts, on the meta device."""
        return Anatomy(self._loaded[0])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        cpu, dtype = self._device.type == "cpu", self._study.dtype
        if dtype == "auto":
            dtype = "float32" if cpu else "checkpoint"
        wanted = None if dtype == "checkpoint" else getattr(torch, dtype)
        model, tokenizer = describe_model(self._study.model, dtype=wanted)
        place = self._device if cpu else torch.device("meta")
        settle(model, Described(place, streamed=self._must_stream(_bytes_of(Anatomy(model)))))
        return model, tokenizer

    @cached_property
    def _folder(self) -> Path:
        return checkpoint_folder(self._study.model, weights=False)

    @cached_property
    def _device(self) -> torch.device:
        if self._study.device == "auto":
            return torch.device("cpu" if self._caps[1] is None else "cuda")
        return torch.device(self._study.device)


def needed_bytes(shards: Shards, dtype: str, *, on_cpu: bool, copied: bool) -> int:
    """Return the memory in bytes of a process with a whole model, and with a copy of its weights if that is needed."""
    return _process_bytes(_loaded_bytes(shards, dtype, on_cpu=on_cpu), copied=copied)


def _process_bytes(size: int, *, copied: bool) -> int:
    return int(_BASE + size * (_COPIED if copied else _ROOM))


def _loaded_bytes(shards: Shards, dtype: str, *, on_cpu: bool) -> int:
    if dtype == "float32" or (dtype == "auto" and on_cpu):
        return 4 * sum(torch.Size(shape).numel() for shape in shards.shapes.values())
    return shards.bytes


def _facts_of(anatomy: Anatomy, fingerprint: str) -> ModelFacts:
    return ModelFacts(
        fingerprint=fingerprint,
        dtype=str(anatomy.model.dtype),
        device=str(anatomy.device),
        encoder_blocks=anatomy.stacks[-1].first,
        blocks=len(anatomy.blocks),
        body=sum(outputs * inputs for outputs, inputs in (anatomy.shape(*key) for key in anatomy)),
        head=anatomy.vocabulary * anatomy.hidden_size,
    )


def _bytes_of(anatomy: Anatomy) -> int:
    """Return the bytes of all parameters; tied ones count once."""
    inside = sum(parameter.numel() for block in anatomy.blocks for parameter in block.parameters())
    return (inside + anatomy.other_numel) * anatomy.element_size


def _size(number: int) -> str:
    return naturalsize(number, binary=True)
