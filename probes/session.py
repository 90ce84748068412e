"""One model wrapped in nnsight: traces of the whole model and of single blocks, with readers and edits.

An *edit* replaces the value at a site; everything downstream sees the new value.

A *reader* (:mod:`probes.readers`) names the sites that it reads (the roles of every block, the MLP activation, the
residual stream after a block, the final state) and reduces each value inside the trace. The model runs once, however
many readers there are. Blocks that lack a site (experts, the gate of an MLP without one) are skipped. At the site
``routing`` readers get a :class:`probes.routing.Routed`, elsewhere tensors.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from pruning.engine.streams import Arguments, StackStarter
from pruning.errors import ModelError
from pruning.models.anatomy import CONTEXT_ROLES, HEADS, ROUTING, Anatomy, Stack
from pruning.models.arithmetic import fast_float32
from pruning.projections import Key
from pruning.text.sources import Segment
from pruning.variants.owner import DenseModel

from .batches import Batch, Batcher, Side
from .readers.base import Reader
from .readers.keep import Keep
from .routing import Routed


class Edit(Protocol):
    """The interface of an edit."""

    @property
    def layer(self) -> int:
        """The block, counted from 0."""

    @property
    def site(self) -> str:
        """The site: a role, ``heads``, ``activation`` or ``residual``."""

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        """Return the new value of a site, ``[batch, tokens, width]``; must not change `value` in place."""


class Session:
    """The sole owner of a loaded model: its nnsight wrapper, its dense weights, and its batching.

    Parameters
    ----------
    model, tokenizer
        As returned by :func:`pruning.load_model`. A model that is streamed from its checkpoint can only be read block
        by block (:func:`probes.read_streams`).
    max_length
        Segments are truncated to this many tokens, special tokens included.
    batch_tokens
        Maximum number of tokens per batch, padding included; bounds the memory.
    padding
        Side on which short segments are padded. Makes no difference beyond rounding.
    skip_first
        Whether the first token of a text (BOS or, from a tokenizer that adds none, the first of the text) does not
        count, nor any special token: in means, frequencies, signal and loss, and where activations are patched. It has
        by far the largest hidden states, the same in every text, and would swamp the rest.

    Attributes
    ----------
    owner
        Holds the dense weights, and switches the model to a variant and back.

    Raises
    ------
    ModelError
        If the architecture is unknown, or an encoder-decoder without a start token for its decoder.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 256,
        batch_tokens: int = 1024,
        padding: Side = "right",
        skip_first: bool = True,
    ) -> None:
        from nnsight import NNsight

        self.model = model
        self.tokenizer = tokenizer
        self.owner = DenseModel(model)
        self.anatomy = self.owner.anatomy
        device = self.anatomy.device
        self.batcher = Batcher(
            tokenizer,
            torch.device("cpu") if device.type == "meta" else device,  # a model that is only planned for
            max_length=max_length,
            batch_tokens=batch_tokens,
            padding=padding,
            skip_first=skip_first,
            decoder_start=self.anatomy.decoder_start,
        )
        self._accepted = inspect.signature(type(model).forward).parameters.keys()
        self._differentiating = False
        # Not nnsight's LanguageModel: it moves all parameters to a device, and here they may be on disk.
        self._traced = NNsight(model)

    def batches(self, segments: Sequence[Segment]) -> list[Batch]:
        """Batch segments of similar length; see :meth:`probes.batches.Batcher.batches`."""
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
        """Run the model once on a batch, in one nnsight trace, with all readers.

        Inside :meth:`differentiable`, the values that are read are differentiable.

        Parameters
        ----------
        batch
            What to read.
        readers
            They see the values after edits.
        edits
            Edits to make.
        outputs
            An empty dictionary is filled with the output of every block. A filled one, from an earlier run on the same
            batch, supplies the outputs of the blocks before `start`.
        start
            The first block to run; the blocks before it are skipped. Sites that are read or edited must not be in
            skipped blocks.

        Raises
        ------
        ModelError
            If the model is streamed from its checkpoint.
        """
        if self.anatomy.streamed:
            raise ModelError("this needs the whole model in memory, but it is streamed from disk; load it whole")
        keep = outputs if outputs is not None and not outputs else None
        wanted = self._wanted(readers, edits, batch, every_block=keep is not None)
        skipped = [
            (self._envoy(self.anatomy.path(layer, "residual")), outputs[min(start, stack.stop) - 1])
            for stack in self.anatomy.stacks
            for layer in range(stack.first, min(start, stack.stop))
            if outputs is not None
        ]
        root, inputs = self._traced, self.inputs(batch) | self._spared
        if self._only_encoder(batch):
            encoder = self.anatomy.stacks[0]
            root, inputs = self._envoy(encoder.path), self.stack_inputs(batch, encoder)
        with (
            torch.set_grad_enabled(self._differentiating),
            fast_float32(self.anatomy.device),
            root.trace(**inputs) as trace,
        ):
            for block, goes_on_from in skipped:
                block.skip(goes_on_from)
            for module, visits in wanted:
                routed = visits[0].routed(module)
                at_input = visits[0].at_input
                before = module.input if at_input else module.output
                output = before
                for visit in visits:
                    output = visit(output, batch, routed)
                    if keep is not None and visit.site == "residual":
                        keep[visit.layer] = output
                if output is not before and at_input:
                    module.input = output
                elif output is not before:
                    module.output = output
            trace.stop()
        for reader in readers:
            reader.flush()

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's arguments for a batch, restricted to those that it accepts."""
        inputs = _inputs(batch)
        if batch.decoder is not None:
            inputs |= {f"decoder_{name}": value for name, value in _inputs(batch.decoder).items()}
        return {name: value for name, value in inputs.items() if name in self._accepted}

    def _only_encoder(self, batch: Batch) -> bool:
        return self.anatomy.encoder_decoder and batch.decoder is None

    @property
    def _spared(self) -> dict[str, Any]:
        spared = {"use_cache": False, "logits_to_keep": 1}
        return {name: value for name, value in spared.items() if name in self._accepted}

    @contextmanager
    def differentiable(self, biases: Collection[Key] = ()) -> Iterator[dict[str, Parameter]]:
        """Context manager within which reads are differentiable; yields the projections' parameters by path.

        With `biases`, those of these projections are among the parameters.

        Only the values read and these parameters can have gradients, which saves memory.
        """
        before = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        projections = self.anatomy.block_parameters() | self.anatomy.bias_parameters(biases)
        try:
            for parameter in before:
                parameter.requires_grad_(False)
            for parameter in projections.values():
                parameter.requires_grad_(True)
            self._differentiating = True
            with fast_float32(self.anatomy.device):  # for the backward passes
                yield projections
        finally:
            self._differentiating = False
            for parameter, required in before.items():
                parameter.requires_grad_(required)

    # -- block by block --------------------------------------------------------------------------------------

    def stack_inputs(self, batch: Batch, stack: Stack | None = None, memory: Tensor | None = None) -> dict[str, Tensor]:
        """Return a stack's arguments for a batch, restricted to those that it accepts.

        Parameters
        ----------
        batch
            What is read.
        stack
            One of the model's stacks; the first by default.
        memory
            For the decoder of an encoder-decoder: the output of its encoder, ``[batch, tokens, hidden]``.
        """
        stack = stack or self.anatomy.stacks[0]
        inputs = _inputs(batch if stack.first == 0 else batch.last)
        if memory is not None:
            inputs |= {"encoder_hidden_states": memory, "encoder_attention_mask": batch.real}
        accepted = inspect.signature(type(self.anatomy.stack_module(stack)).forward).parameters
        return {name: value for name, value in inputs.items() if name in accepted}

    def starter(self, stack: Stack | None = None) -> StackStarter:
        """Return what computes the inputs of a stack's first block (the first stack's, by default).

        It needs the embeddings (``anatomy.loaded_for_start``).
        """
        return StackStarter(self.anatomy, stack or self.anatomy.stacks[0])

    def read_block(
        self,
        layer: int,
        hidden: Tensor,
        arguments: Arguments,
        batch: Batch,
        readers: Sequence[Reader] = (),
        dense: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run one block on a batch, in one nnsight trace, with its current weights.

        Parameters
        ----------
        layer
            The block, whose weights must be loaded.
        hidden
            Hidden states before it, ``[batch, tokens, hidden]``.
        arguments
            The block's other arguments.
        batch
            What is read.
        readers
            Not flushed: the caller does that, after several batches.
        dense
            Site to the dense model's activations, for readers that compare.

        Returns
        -------
        Tensor
            Hidden states after the block, ``[batch, tokens, hidden]``.
        """
        after = Keep({"residual"})
        wanted = self._visits([layer], [*readers, after], (), dense or {})
        block = self._envoy(self.anatomy.path(layer, "residual"))
        with (
            torch.no_grad(),
            fast_float32(self.anatomy.device),
            block.trace(hidden, *arguments.positional, **arguments.named),
        ):
            for module, visits in wanted:
                routed = visits[0].routed(module)
                output = module.input if visits[0].at_input else module.output
                for visit in visits:
                    visit(output, batch, routed)
        return after.values[layer, "residual"]

    def read_final(self, hidden: Tensor, batch: Batch, readers: Sequence[Reader]) -> None:
        """Apply the final norm to states after the last block, for readers of ``final``, which are not flushed."""
        norm = self._envoy(self.anatomy.final_norm_path)
        layers = len(self.anatomy.blocks)
        interested = [reader for reader in readers if reader.wants(layers, "final")]
        with torch.no_grad(), fast_float32(self.anatomy.device), norm.trace(hidden):
            value = norm.output
            for reader in interested:
                reader.read(layers, "final", value, batch.last)

    # -- where things are ------------------------------------------------------------------------------------

    def _wanted(
        self, readers: Sequence[Reader], edits: Sequence[Edit], batch: Batch, *, every_block: bool
    ) -> list[tuple[Any, list[_Visit]]]:
        """List the visits at every module that runs on a batch."""
        layers = len(self.anatomy.blocks)
        if self._only_encoder(batch):
            return self._visits(range(self.anatomy.stacks[0].stop), readers, edits, {}, every_block=every_block)
        wanted = self._visits(range(layers), readers, edits, {}, every_block=every_block)
        interested = [reader for reader in readers if reader.wants(layers, "final")]
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
        """List the visits at every module, its input before its output, in order of execution: nnsight requires it."""
        wanted: dict[tuple[str, bool], list[_Visit]] = {}
        edits_at = defaultdict(list)
        for edit in edits:
            edits_at[edit.layer, edit.site].append(edit)
        for layer in layers:
            for site in self.anatomy.sites(layer):
                interested = [reader for reader in readers if reader.wants(layer, site)]
                editing = edits_at.get((layer, site), [])
                if interested or editing or (every_block and site == "residual"):
                    visit = _Visit(self.anatomy, layer, site, interested, editing, dense)
                    wanted.setdefault((self.anatomy.path(layer, site), visit.at_input), []).append(visit)
        return [(self._envoy(path), visits) for (path, _), visits in wanted.items()]

    def _envoy(self, path: str) -> Any:
        found = self._traced
        for name in path.split("."):
            found = found[int(name)] if name.isdigit() else attrgetter(name)(found)
        return found


def part_at(anatomy: Anatomy, layer: int, site: str, batch: Batch) -> Batch:
    """Return whose tokens a site has values of: those of a batch, or of its part for the decoder.

    Keys and values of cross-attention are made from the encoder's output.
    """
    decoded = layer >= anatomy.stacks[-1].first and site not in CONTEXT_ROLES
    return batch.last if decoded else batch


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.ids, "attention_mask": batch.real, "position_ids": batch.positions}


@dataclass(frozen=True)
class _Visit:
    """One site of a module's output (or, of heads, its input), with its edits and readers."""

    anatomy: Anatomy
    layer: int
    site: str
    readers: list[Reader]
    edits: list[Edit]
    dense: Mapping[str, Tensor]

    @property
    def at_input(self) -> bool:
        """Whether the value is what the module reads."""
        return self.site in HEADS

    @property
    def inside_experts(self) -> bool:
        """Whether the value is in the arguments of the module of all experts, or made from them."""
        return self.site == ROUTING or self.site.startswith("expert.")

    def routed(self, module: Any) -> Routed | None:
        """Return what the module of all experts is given, if the value is made from that.

        All sites of the module share it, so that a device waits for the experts' tokens once.
        """
        return Routed.of(self.anatomy, self.layer, module.inputs) if self.inside_experts else None

    def __call__(self, output: Any, batch: Batch, routed: Routed | None = None) -> Any:
        """Apply the edits, call the readers, and return the module's output (or input)."""
        batch = part_at(self.anatomy, self.layer, self.site, batch)
        if self.inside_experts:
            assert routed is not None
            return self._inside(output, batch, routed)
        value = output if self.site == "final" else self.anatomy.site(self.layer, self.site, output, batch.ids.shape)
        for edit in self.edits:
            value = edit.change(value, batch)
        if self.edits:
            output = self.anatomy.with_site(self.layer, self.site, output, value)
        self._show(value, batch)
        return output

    def _inside(self, output: Tensor, batch: Batch, routed: Routed) -> Tensor:
        """Show the readers how tokens are routed, or what one expert adds; and replace that."""
        if self.site == ROUTING:
            self._show(routed, batch)
            return output
        before = routed.contribution(int(self.site.partition(".")[2])).view(*batch.ids.shape, -1)
        value = before
        for edit in self.edits:
            value = edit.change(value, batch)
        self._show(value, batch)
        return output + (value - before).view(output.shape) if self.edits else output

    def _show(self, value: Any, batch: Batch) -> None:
        for reader in self.readers:
            reader.read(self.layer, self.site, value, batch, self.dense.get(self.site) if reader.compares else None)
