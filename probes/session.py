"""One model behind nnsight: traces of the whole model and of single blocks, with readers and edits.

An *edit* puts another value into a site on the way; what comes after sees that one.

A *reader* (:mod:`probes.readers`) wants some sites of the model (the roles of every block, the MLP activation, the
residual stream after a block, the final state) and reduces each value as it passes, inside the trace. However many
readers there are, the model runs once. A block that lacks a site (the inside of experts, the gate of an MLP without
one) is passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from pruning.engine.streams import Arguments, StackStarter
from pruning.errors import ModelError
from pruning.models.anatomy import Anatomy
from pruning.text.sources import Segment
from pruning.variants.owner import DenseModel

from .batches import Batch, Batcher, Side
from .readers.base import Reader
from .readers.keep import Keep


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
    """The one owner of a loaded model: its nnsight wrapper, its dense weights, and how text becomes batches.

    Parameters
    ----------
    model, tokenizer
        As :func:`pruning.load_model` gives them. The model may be streamed from its checkpoint: then it is read block
        by block only (:func:`probes.read_streams`).
    max_length
        Segments are cut after this many tokens, special ones included.
    batch_tokens
        Tokens of a batch at most, padding included; bounds the memory.
    padding
        Side on which short segments are padded. Makes no difference beyond rounding.
    special_tokens
        Whether special tokens count in means, frequencies and signal. The first token (BOS) of every text has by far
        the largest states of all, the same in every text, and would swamp the rest.

    Attributes
    ----------
    owner
        The dense weights; it turns the model into a variant and back.

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
        padding: Side = "right",
        special_tokens: bool = False,
    ) -> None:
        from nnsight import NNsight

        self.model = model
        self.tokenizer = tokenizer
        self.owner = DenseModel(model)
        self.anatomy = self.owner.anatomy
        if self.anatomy.encoder_decoder:
            raise ModelError(f'probes read decoder-only models; "{self.anatomy.kind}" can be pruned, not read')
        self.batcher = Batcher(
            tokenizer,
            self.anatomy.device,
            max_length=max_length,
            batch_tokens=batch_tokens,
            padding=padding,
            special_tokens=special_tokens,
        )
        self._accepted = inspect.signature(type(model).forward).parameters.keys()
        self._differentiating = False
        # Not nnsight's class for transformers: that one brings all parameters to a device, and they may be on disk.
        self._traced = NNsight(model)

    def batches(self, segments: Sequence[Segment]) -> list[Batch]:
        """Cut segments into batches of similar length; see :meth:`probes.batches.Batcher.batches`."""
        return self.batcher.batches(segments)

    # -- the whole model -------------------------------------------------------------------------------------

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

        Raises
        ------
        ModelError
            If the model's weights stay on disk.
        """
        if self.anatomy.streamed:
            raise ModelError("this takes the whole model in memory, and its weights stay on disk; load it whole")
        keep = outputs if outputs is not None and not outputs else None
        goes_on_from = outputs[start - 1] if outputs is not None and start else None
        wanted = self._wanted(readers, edits, every_block=keep is not None)
        skipped = [self._envoy(self.anatomy.path(layer, "residual")) for layer in range(start)]
        with (
            torch.set_grad_enabled(self._differentiating),
            self._traced.trace(**self.inputs(batch), **self._spared) as trace,
        ):
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
        for reader in readers:
            reader.flush()

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the model is called with for a batch, as far as it accepts it."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.real, "position_ids": batch.positions}
        return {name: value for name, value in inputs.items() if name in self._accepted}

    @property
    def _spared(self) -> dict[str, Any]:
        spared = {"use_cache": False, "logits_to_keep": 1}
        return {name: value for name, value in spared.items() if name in self._accepted}

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

    # -- block by block --------------------------------------------------------------------------------------

    def stack_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the stack of blocks is called with for a batch, as far as it accepts it."""
        accepted = inspect.signature(type(self.anatomy.stack_module(self.anatomy.stacks[-1])).forward).parameters
        return {name: value for name, value in self.inputs(batch).items() if name in accepted}

    def starter(self) -> StackStarter:
        """Return what brings batches to the first block; embeddings must be present (``anatomy.loaded_for_start``)."""
        return StackStarter(self.anatomy, self.anatomy.stacks[-1])

    def read_block(
        self,
        layer: int,
        hidden: Tensor,
        arguments: Arguments,
        batch: Batch,
        readers: Sequence[Reader] = (),
        dense: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run one block on a batch, in one nnsight trace, with whatever weights it has now.

        Parameters
        ----------
        layer
            Which block; its weights must be present.
        hidden
            States before it, ``[batch, tokens, hidden]``.
        arguments
            What else the block is called with.
        batch
            What is read.
        readers
            They are not flushed: a caller does that after several batches.
        dense
            Site to the dense model's value there, for readers that compare.

        Returns
        -------
        Tensor
            States after the block, likewise.
        """
        after = Keep({"residual"})
        wanted = self._visits([layer], [*readers, after], (), dense or {})
        block = self._envoy(self.anatomy.path(layer, "residual"))
        with torch.no_grad(), block.trace(hidden, *arguments.positional, **arguments.named):
            for module, visits in wanted:
                output = module.output
                for visit in visits:
                    visit(output, batch)
        return after.values[layer, "residual"]

    def read_final(self, hidden: Tensor, batch: Batch, readers: Sequence[Reader]) -> None:
        """Run the last normalisation on states after the last block, for readers of ``final``; they are not flushed."""
        norm = self._envoy(self.anatomy.final_norm_path)
        interested = [reader for reader in readers if "final" in reader.sites]
        with torch.no_grad(), norm.trace(hidden):
            value = norm.output
            for reader in interested:
                reader.read(len(self.anatomy.blocks), "final", value, batch)

    # -- where things are ------------------------------------------------------------------------------------

    def _wanted(
        self, readers: Sequence[Reader], edits: Sequence[Edit], *, every_block: bool
    ) -> list[tuple[Any, list[_Visit]]]:
        """List what to do at which module of the whole model."""
        layers = len(self.anatomy.blocks)
        wanted = self._visits(range(layers), readers, edits, {}, every_block=every_block)
        interested = [reader for reader in readers if "final" in reader.sites]
        if interested:
            final = self._envoy(self.anatomy.final_norm_path)
            wanted.append((final, [_Visit(self.anatomy, layers, "final", interested, [], {})]))
        return wanted

    def _visits(
        self,
        layers: Iterable[int],
        readers: Sequence[Reader],
        edits: Sequence[Edit],
        dense: Mapping[str, Tensor],
        *,
        every_block: bool = False,
    ) -> list[tuple[Any, list[_Visit]]]:
        """List what to do at which module in the order in which they run: nnsight accepts no other."""
        wanted: dict[str, list[_Visit]] = {}
        for layer in layers:
            for site in self.anatomy.sites(layer):
                interested = [reader for reader in readers if site in reader.sites]
                editing = [edit for edit in edits if (edit.layer, edit.site) == (layer, site)]
                if interested or editing or (every_block and site == "residual"):
                    visit = _Visit(self.anatomy, layer, site, interested, editing, dense)
                    wanted.setdefault(self.anatomy.path(layer, site), []).append(visit)
        return [(self._envoy(path), visits) for path, visits in wanted.items()]

    def _envoy(self, path: str) -> Any:
        found = self._traced
        for name in path.split("."):
            found = found[int(name)] if name.isdigit() else attrgetter(name)(found)
        return found


@dataclass(frozen=True)
class _Visit:
    """One site of one module's output, who changes it, and who wants it."""

    anatomy: Anatomy
    layer: int
    site: str
    readers: list[Reader]
    edits: list[Edit]
    dense: Mapping[str, Tensor]

    def __call__(self, output: Any, batch: Batch) -> Any:
        """Return the module's output with the edits made."""
        value = output if self.site == "final" else self.anatomy.site(self.layer, self.site, output, batch.ids.shape)
        for edit in self.edits:
            value = edit.change(value, batch)
        if self.edits:
            output = self.anatomy.with_site(self.layer, self.site, output, value)
        for reader in self.readers:
            reader.read(self.layer, self.site, value, batch, self.dense.get(self.site) if reader.compares else None)
        return output
