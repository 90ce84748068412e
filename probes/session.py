"""One model, one nnsight trace per batch, many readers.

An *edit* puts another value into a site on the way; what comes after sees that one.

A *reader* wants some sites of the model (the roles of every block, the MLP activation, the residual stream after a
block, the final state) and reduces each value as it passes, inside the trace; nothing whole is kept unless a
reader keeps it. However many readers there are, the model runs once. A block that lacks a site (the inside of experts,
the gate of an MLP without one) is passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from pruning.errors import ModelError, TextError
from pruning.models.anatomy import Anatomy
from pruning.text.sources import Segment

_B = TypeVar("_B")


@dataclass(frozen=True)
class Batch:
    """Segments as token ids, padded to one length.

    Attributes
    ----------
    segments
        Index of each row's segment in the list that the batches were made from.
    ids
        Token ids, int64 ``[batch, tokens]``.
    real
        1 where a token is real, 0 where it is padding, int64 ``[batch, tokens]``.
    counted
        1.0 where a token counts in means and frequencies: real, and not a special one such as BOS unless these were
        asked for, float32 ``[batch, tokens]``.
    """

    segments: tuple[int, ...]
    ids: Tensor
    real: Tensor
    counted: Tensor

    @property
    def positions(self) -> Tensor:
        """Position of each token in its segment, whichever side is padded, int64 ``[batch, tokens]``."""
        return (self.real.cumsum(dim=1) - 1).clamp(min=0)


class Reader(Protocol):
    """What a session needs of a reader."""

    #: The sites it wants, where the model has them: roles, ``activation``, ``residual``, ``final``.
    sites: frozenset[str]

    def read(self, layer: int, site: str, value: Tensor, batch: Batch) -> None:
        """Take in the output of one site, ``[batch, tokens, width]``; `layer` counts blocks from 0."""


class Edit(Protocol):
    """What a session needs of an edit."""

    @property
    def layer(self) -> int:
        """The block, counted from 0."""

    @property
    def site(self) -> str:
        """The site: a role, ``activation`` or ``residual``."""

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        """Return what takes the place of a site's output, ``[batch, tokens, width]``; `value` is left as it is."""


class Session:
    """A model wrapped once by nnsight, and the batches it reads.

    Parameters
    ----------
    model, tokenizer
        As :func:`pruning.load_model` gives them. Changing the model's weights afterwards (a variant applied, say)
        changes what the session reads.
    max_length
        Segments are cut after this many tokens, special ones included.
    batch_tokens
        Tokens of a batch at most, padding included; bounds the memory.
    padding
        Side that short segments are padded on. Makes no difference beyond rounding.
    special_tokens
        Whether special tokens count in means, frequencies and signal. The first token (BOS) of every text has by far
        the largest states of all, the same in every text, and would swamp the rest.

    Raises
    ------
    ModelError
        If the architecture is unknown, or an encoder-decoder.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 256,
        batch_tokens: int = 1024,
        padding: Literal["left", "right"] = "right",
        special_tokens: bool = False,
    ) -> None:
        from nnsight.modeling.transformers import TransformersModel

        self.model = model
        self.tokenizer = tokenizer
        self.anatomy = Anatomy(model)
        if self.anatomy.encoder_decoder:
            raise ModelError(f'probes read decoder-only models; "{self.anatomy.kind}" can be pruned, not read')
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.padding = padding
        self.special_tokens = special_tokens
        self._accepted = inspect.signature(type(model).forward).parameters.keys()
        self._differentiating = False
        self._traced = TransformersModel(model, tokenizer=tokenizer, task="text-generation")

    def batches(self, segments: Sequence[Segment]) -> list[Batch]:
        """Cut segments into batches of similar length.

        Raises
        ------
        TextError
            If a segment has no tokens but special ones.
        """
        encoded = [self.tokenizer(s.text, truncation=True, max_length=self.max_length)["input_ids"] for s in segments]
        special = self._special
        for segment, ids in zip(segments, encoded, strict=True):
            if special.issuperset(ids) and not self.special_tokens:
                raise TextError(f'segment "{segment.id}" has no token to count: {segment.text!r}; leave it out')
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        return [self.batch(rows, [encoded[i] for i in rows]) for rows in _grouped(order, encoded, self.batch_tokens)]

    def read(
        self,
        batch: Batch,
        readers: Sequence[Reader],
        edits: Sequence[Edit] = (),
        *,
        outputs: dict[int, Any] | None = None,
        start: int = 0,
    ) -> None:
        """Run the model once on a batch, in one nnsight trace, and let every reader take what it wants.

        Inside :meth:`differentiable`, what is read can be differentiated.

        Parameters
        ----------
        batch
            What to read.
        readers
            They see the values that edits have made.
        edits
            Values to change.
        outputs
            Filled with the output of every block, if an empty one is given.
        start
            The first block that runs, if `outputs` is of an earlier run on the same batch: those before it are left
            out, and the run goes on from what the last of them put out then. What is read and changed must come after.
        """
        inputs = {"input_ids": batch.ids, "attention_mask": batch.real, "position_ids": batch.positions}
        inputs = {name: value for name, value in inputs.items() if name in self._accepted}
        spared = {"use_cache": False, "logits_to_keep": 1}
        spared = {name: value for name, value in spared.items() if name in self._accepted}
        keep = outputs if outputs is not None and not outputs else None
        goes_on_from = outputs[start - 1] if outputs is not None and start else None
        wanted = self._wanted(readers, edits, every_block=keep is not None)
        skipped = [_envoy(self._traced, self.anatomy.path(layer, "residual")) for layer in range(start)]
        with torch.set_grad_enabled(self._differentiating), self._traced.trace(inputs, **spared) as trace:
            for block in skipped:
                block.skip(goes_on_from)
            for module, visits in wanted:
                before = module.output
                output = before
                for visit in visits:
                    output = visit(output, batch)
                    if keep is not None and visit.site == "residual":
                        keep[visit.layer] = output
                if output is not before:
                    module.output = output
            trace.stop()

    @contextmanager
    def differentiable(self) -> Iterator[dict[str, Parameter]]:
        """Make what is read inside a ``with`` block differentiable, and give the projections' parameters by path.

        Gradients reach what was read, and these parameters; no others, which saves memory.
        """
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        projections = self.anatomy.block_parameters()
        try:
            for parameter in before:
                parameter.requires_grad_(False)
            for parameter in projections.values():
                parameter.requires_grad_(True)
            self._differentiating = True
            yield projections
        finally:
            self._differentiating = False
            for parameter, required in before.items():
                parameter.requires_grad_(required)

    def _wanted(
        self, readers: Sequence[Reader], edits: Sequence[Edit], *, every_block: bool
    ) -> list[tuple[Any, list[_Visit]]]:
        """List what to do at which module in the order in which they run: nnsight accepts no other."""
        anatomy, layers = self.anatomy, len(self.anatomy.blocks)
        places = [(layer, site, anatomy.path(layer, site)) for layer in range(layers) for site in anatomy.sites(layer)]
        places.append((layers, "final", anatomy.final_norm_path))
        wanted: dict[str, list[_Visit]] = {}
        for layer, site, path in places:
            interested = [reader for reader in readers if site in reader.sites]
            editing = [edit for edit in edits if (edit.layer, edit.site) == (layer, site)]
            if interested or editing or (every_block and site == "residual"):
                wanted.setdefault(path, []).append(_Visit(anatomy, layer, site, interested, editing))
        return [(_envoy(self._traced, path), visits) for path, visits in wanted.items()]

    def batch(self, segments: Sequence[int], encoded: Sequence[Sequence[int]]) -> Batch:
        """Pad token ids to one length; `segments` says which segment each row is of."""
        width = max(map(len, encoded))
        filler = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(encoded), width), filler)
        real = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            place = slice(0, len(tokens)) if self.padding == "right" else slice(width - len(tokens), width)
            ids[row, place] = torch.tensor(tokens)
            real[row, place] = 1
        counted = real.bool()
        if not self.special_tokens:
            counted &= ~torch.isin(ids, torch.tensor(sorted(self._special)))
        device = self.model.device
        return Batch(tuple(segments), ids.to(device), real.to(device), counted.float().to(device))

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)


@dataclass(frozen=True)
class _Visit:
    """One site of one module's output, who changes it, and who wants it."""

    anatomy: Anatomy
    layer: int
    site: str
    readers: list[Reader]
    edits: list[Edit]

    def __call__(self, output: Any, batch: Batch) -> Any:
        """Return the module's output with the edits made."""
        value = output if self.site == "final" else self.anatomy.site(self.layer, self.site, output, batch.ids.shape)
        for edit in self.edits:
            value = edit.change(value, batch)
        if self.edits:
            output = self.anatomy.with_site(self.layer, self.site, output, value)
        for reader in self.readers:
            reader.read(self.layer, self.site, value, batch)
        return output


def _envoy(traced: Any, path: str) -> Any:
    for name in path.split("."):
        traced = traced[int(name)] if name.isdigit() else attrgetter(name)(traced)
    return traced


def _grouped(order: list[int], encoded: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Yield runs of `order` (by rising length) whose padded size stays within `batch_tokens`."""
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * len(encoded[i]) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def within_memory(batches: Sequence[_B], sizes: Sequence[int], limit: int) -> Iterator[list[_B]]:
    """Yield runs of batches whose sizes, in bytes, add up to no more than `limit`; one batch at least."""
    group: list[_B] = []
    held = 0
    for batch, size in zip(batches, sizes, strict=True):
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(batch)
        held += size
    if group:
        yield group
