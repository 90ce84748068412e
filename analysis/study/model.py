"""The dense model of a study: what is on record of it, and the model itself, loaded when it is first needed."""

from __future__ import annotations

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
from pruning.models.embedded import DEMO
from pruning.models.loading import checkpoint_folder, open_device

from .configuration import Study
from .records import Records

#: Memory that a model in memory takes over its weights: what is worked out of a batch, and Python and its libraries.
_ROOM, _BASE = 1.25, 800 << 20
_COPIED = 2.0  # and with a copy of the dense weights
_RECORD = "model"


class ModelFacts(BaseModel):
    """What keys, plans and reports need to know of a model.

    Attributes
    ----------
    fingerprint
        Of its weights.
    dtype, device
        In which it computes, and where.
    encoder_decoder
        Whether it has two stacks of blocks, and cannot be read.
    blocks
        Number of blocks.
    body, head
        Multiply-adds a token: of all projections, and of the logits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    dtype: str
    device: str
    encoder_decoder: bool
    blocks: int
    body: float
    head: float


class StudyModel:
    """The one owner of a study's model.

    Parameters
    ----------
    study, records
        Which model, and what is on record of it.
    memory, device_memory
        Caps in bytes; what is free by default. A model that is larger is read from its shards, a block at a time.
    whole
        What needs the whole model in memory, and a copy of its dense weights beside it, in words; empty if nothing
        does.
    tell
        Told in words what takes its time.
    """

    def __init__(
        self,
        study: Study,
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

    @property
    def facts(self) -> ModelFacts:
        """What is known of the model; it is loaded if that is not on record."""
        found = self._records.facts(_RECORD, self._key)
        if found is None:
            assert self.anatomy  # which puts it on record
            found = self._records.facts(_RECORD, self._key)
        return ModelFacts.model_validate(found)

    @cached_property
    def session(self) -> Session:
        """The model as probes read it.

        Raises
        ------
        StudyError
            If it is an encoder-decoder.
        """
        self.check_readable()
        config = self._study.evaluation
        return Session(
            *self._loaded,
            max_length=config.max_length,
            batch_tokens=config.batch_tokens,
            special_tokens=config.special_tokens,
        )

    @cached_property
    def anatomy(self) -> Anatomy:
        """The model's parts."""
        model, _ = self._loaded
        anatomy = Anatomy(model)
        body = sum(outputs * inputs for outputs, inputs in (anatomy.shape(*key) for key in anatomy))
        facts = ModelFacts(
            fingerprint=anatomy.fingerprint(),
            dtype=str(model.dtype),
            device=str(anatomy.device),
            encoder_decoder=anatomy.encoder_decoder,
            blocks=len(anatomy.blocks),
            body=body,
            head=anatomy.vocabulary * anatomy.hidden_size,
        )
        if self._records.facts(_RECORD, self._key) != facts.model_dump():
            self._records.finish(_RECORD, self._key, [], 0.0, facts.model_dump())
        return anatomy

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded[1]

    def check_device(self) -> None:
        """Raise ``PrunescopeError`` if there is no such device, or one without memory of its own has a cap on that."""
        device = self._device
        if self._caps[1] is not None and device.type == "cpu":
            raise StudyError(
                "--device-memory caps the memory of a GPU, and this study runs on the CPU; use --memory, "
                'or choose another device (device = "cuda")'
            )

    def check_readable(self) -> None:
        """Raise ``StudyError`` if the model can be pruned, but not read."""
        if self.facts.encoder_decoder:
            raise StudyError(
                f"{self._study.model_name} is an encoder-decoder, which can be pruned but not read: "
                "make its variants with prunescope prune"
            )

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        stream = self._must_stream()
        note = ", its weights a block at a time" if stream else ""
        note += " (converted on first use, about a minute)" if self._study.model == DEMO else ""
        self._tell(f"loading the model {self._study.model_name}{note}")
        return load_model(self._study.model, dtype=self._study.dtype, device=self._study.device, stream=stream)

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

    def _must_stream(self) -> bool:
        """Tell whether the weights must stay on disk, from the size of the checkpoint alone.

        Raises
        ------
        StudyError
            If something needs the whole model, and there is no room for it.
        """
        shards = Shards(self._folder)
        size = shards.bytes
        if self._study.dtype == "float32" or (self._study.dtype == "auto" and self._device.type == "cpu"):
            size = 4 * sum(torch.Size(shape).numel() for shape in shards.shapes.values())
        memory, on_device = self._caps
        rooms = {"memory": free_memory() if memory is None else memory}
        if self._device.type != "cpu":
            rooms[f"memory of {self._device}"] = free_memory(self._device) if on_device is None else on_device
        needed = int(_BASE + size * (_COPIED if self._whole else _ROOM))
        for name, room in rooms.items():
            if needed > room and self._whole:
                raise StudyError(
                    f"{self._whole} the whole model and a copy of its weights, about {_size(needed)}; "
                    f"there are {_size(room)} of {name}"
                )
        return any(needed > room for room in rooms.values())


def _size(number: int) -> str:
    return naturalsize(number, binary=True)
