"""The parts of a loaded model by canonical names, whatever its architecture.

The rest of prunescope uses *roles* (the projections, :data:`ROLES`) and *sites* (the roles, the ``heads`` of attention,
the MLP ``activation``, the ``residual`` stream after a block and the ``final`` normed state; of experts also
:data:`ROUTING`, what each adds to the stream, ``"expert.3"``, and what all add, :data:`EXPERTS`); only this file and
:mod:`pruning.models.layouts` know the attribute paths and storage behind them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import ModelError
from .head import head_logits, head_of, precise_head_logits
from .layouts import (
    ATTENTION_READERS,
    CONTEXT_ROLES,
    MLP_READERS,
    ROLES,
    SHARED_INPUTS,
    Experts,
    Fused,
    layout_of,
    path_of,
    role_kind,
    supported_architectures,
)
from .streaming import residence_of

__all__ = [
    "CONTEXT_ROLES",
    "EXPERTS",
    "HEADS",
    "ROLES",
    "ROUTING",
    "Anatomy",
    "InputGroup",
    "Stack",
    "expert_site",
    "role_kind",
    "supported_architectures",
]

#: Sites of a block with experts: what they are given, and the sum of what they add to the stream.
ROUTING, EXPERTS = "routing", "experts"
#: Sites of what all heads of an attention put out, one behind the other, to the role that reads them.
HEADS = {"heads": "o", "cross_heads": "cross_o"}


def expert_site(expert: int) -> str:
    """Return the site of what one expert adds to the stream.

    >>> expert_site(3)
    'expert.3'
    """
    return f"expert.{expert}"


@dataclass(frozen=True)
class Stack:
    """A stack of consecutive blocks: a decoder-only model has one, an encoder-decoder two.

    Attributes
    ----------
    path
        Attribute path, from the model's root, of the module that runs the stack.
    blocks, norm
        Paths below it of the blocks and of the final norm.
    first, stop
        Half-open range of its blocks among the model's.
    """

    path: str
    blocks: str
    norm: str
    first: int
    stop: int


@dataclass(frozen=True)
class InputGroup:
    """Projections of a block that read the same input.

    Attributes
    ----------
    roles
        In order of execution.
    module
        Path, below the block, of a module whose first argument is that input.
    expert
        Index of the expert that they belong to, which reads only the tokens routed to it.
    inner
        Whether the input is internal to `module` and cannot be hooked: :meth:`Anatomy.expert_inner` computes it.
    """

    roles: tuple[str, ...]
    module: str
    expert: int | None = None
    inner: bool = False

    @property
    def leader(self) -> str:
        """The role that runs first."""
        return self.roles[0]


@dataclass(frozen=True)
class _Block:
    """One block: its path from the root, and its part of the layout."""

    module: nn.Module
    path: str
    sites: dict[str, str | Fused]
    experts: Experts | None
    n_experts: int
    transposed: bool
    norms: Mapping[str, str]

    @property
    def roles(self) -> tuple[str, ...]:
        plain = [site for site in self.sites if site in ROLES]
        return (*plain, *(f"{kind}.{e}" for e in range(self.n_experts) for kind in ("gate", "up", "down")))

    def place(self, role: str) -> str | Fused:
        """Return the location of a role; that of an expert is in the module of all experts."""
        if self.experts is None or role in self.sites:
            return self.sites[role]
        kind = role_kind(role)
        return self.experts.path if kind == "down" else Fused(self.experts.path, ("gate", "up").index(kind))

    def parameter(self, role: str) -> str:
        """Return the path, below the block, of the parameter that stores a role."""
        path = path_of(self.place(role))
        if self.experts is None or role in self.sites:
            return f"{path}.weight"
        return f"{path}.{self.experts.down if role_kind(role) == 'down' else self.experts.gate_up}"


class Anatomy:
    """The parts of one loaded model, by canonical names.

    Parameters
    ----------
    model
        A language model with its head, as loaded by ``transformers``. If its parameters are on the meta device, only
        what does not need their values works.

    Attributes
    ----------
    model, config, kind
        The model, its (text) configuration and its ``model_type``.
    blocks
        The blocks of all stacks, in order of execution.
    stacks
        The stacks, in order of execution.

    Raises
    ------
    ModelError
        If the architecture is unknown and cannot be inferred, or the model lacks a part that it should have.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.model = model
        self.kind = str(config.model_type)
        self.config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._blocks: list[_Block] = []
        stacks = []
        for layout in layout_of(model).stacks:
            first, path = len(self._blocks), f"{layout.body}.{layout.blocks}"
            for number, module in enumerate(model.get_submodule(path).children()):
                count = self._count_experts(layout.experts_of(module), layout.experts)
                sites = layout.sites_of(module)
                norms = dict.fromkeys(ATTENTION_READERS, layout.attention_norm)
                norms |= dict.fromkeys(MLP_READERS, layout.mlp_norm)
                block = _Block(module, f"{path}.{number}", sites, layout.experts, count, layout.transposed, norms)
                self._blocks.append(block)
            stacks.append(Stack(layout.body, layout.blocks, layout.norm, first, len(self._blocks)))
        self.stacks = tuple(stacks)
        self.blocks: list[nn.Module] = [block.module for block in self._blocks]
        self._roles = [block.roles for block in self._blocks]
        for layer in range(len(self.blocks)):
            self._check_shapes(layer)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the ``(layer, role)`` of every prunable projection, in order of execution."""
        for layer, roles in enumerate(self._roles):
            for role in roles:
                yield layer, role

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder runs before the decoder."""
        return len(self.stacks) > 1

    @property
    def decoder_start(self) -> int | None:
        """The token that the decoder of an encoder-decoder starts from; None in a decoder-only model.

        Raises
        ------
        ModelError
            If the configuration of an encoder-decoder names none.
        """
        if not self.encoder_decoder:
            return None
        start = getattr(self.model.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                f'the configuration of this "{self.kind}" model names no "decoder_start_token_id", without which its '
                "decoder cannot be read; add it to config.json (T5 and its relatives have 0, their padding)"
            )
        return int(start)

    def stack_of(self, layer: int) -> Stack:
        """Return the stack that a block belongs to."""
        return next(stack for stack in self.stacks if layer < stack.stop)

    def stack_module(self, stack: Stack) -> nn.Module:
        """Return the module that runs a stack."""
        return self.model.get_submodule(stack.path)

    def encoded(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Apply the encoder's final norm to the states after its last block, which gives the decoder's input."""
        norm = self.model.get_submodule(f"{self.stacks[0].path}.{self.stacks[0].norm}")
        output: Tensor = norm(hidden.to(self.device))
        return output

    def normed(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Apply the final norm, whose output the head reads, to states after any block; it must be loaded."""
        output: Tensor = self.model.get_submodule(self.final_norm_path)(hidden)
        return output

    def module(self, layer: int, path: str) -> nn.Module:
        """Return the module at a path below a block."""
        return self.blocks[layer].get_submodule(path)

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return residence_of(self.model).device or next(self.model.parameters()).device

    @property
    def streamed(self) -> bool:
        """Whether parameters stay on disk except within :meth:`loaded` and its like."""
        return residence_of(self.model).streamed

    def loaded(self, layer: int, *, to_read: bool = False) -> AbstractContextManager[None]:
        """Context manager that loads one block's parameters; `to_read` if they will not be modified."""
        return residence_of(self.model).present(self.parameter_names(layer), to_read=to_read)

    def loaded_for_start(self) -> AbstractContextManager[None]:
        """Context manager that loads everything but the blocks and the head: embeddings and norms."""
        return residence_of(self.model).present(self.names_for_start(), to_read=True)

    def loaded_for_end(self) -> AbstractContextManager[None]:
        """Context manager that loads what follows the last block: the final norm and the head."""
        return residence_of(self.model).present(self.names_for_end(), to_read=True)

    def parameter_names(self, layer: int) -> list[str]:
        """Return the paths, from the model's root, of all parameters of a block, pruned or not."""
        return [f"{self._blocks[layer].path}.{name}" for name, _ in self.blocks[layer].named_parameters()]

    def other_names(self) -> list[str]:
        """Return the paths of all parameters outside the blocks."""
        inside = {name for layer in range(len(self.blocks)) for name in self.parameter_names(layer)}
        return [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in inside]

    def names_for_start(self) -> list[str]:
        """Return the paths of all parameters that :meth:`loaded_for_start` loads."""
        head = {name for name, module in self.model.named_modules() if module is self.model.get_output_embeddings()}  # type: ignore[operator]
        return [name for name in self.other_names() if name.rpartition(".")[0] not in head]

    def names_for_end(self) -> list[str]:
        """Return the paths of all parameters that :meth:`loaded_for_end` loads."""
        after = (self.model.get_submodule(self.final_norm_path), head_of(self.model))
        places = {name for name, module in self.model.named_modules() if any(module is one for one in after)}
        return [name for name in self.other_names() if name.rpartition(".")[0] in places]

    def names_for_encoded(self) -> list[str]:
        """Return the paths of the parameters of the first stack's final norm, which :meth:`encoded` applies."""
        norm = f"{self.stacks[0].path}.{self.stacks[0].norm}"
        return [name for name in self.other_names() if name.rpartition(".")[0] == norm]

    @property
    def ties(self) -> Mapping[str, str]:
        """Paths of parameters that are tied to another one, such as the head to the embeddings, with that one's."""
        return getattr(self.model, "all_tied_weights_keys", None) or {}

    @property
    def other_numel(self) -> int:
        """Number of values in the parameters outside the blocks; tied ones count once."""
        return sum(self.model.get_parameter(name).numel() for name in self.other_names() if name not in self.ties)

    @property
    def element_size(self) -> int:
        """Bytes of one value of a block's parameters."""
        return next(self.blocks[0].parameters()).element_size()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def n_neurons(self) -> int:
        """Number of MLP neurons per block.

        Raises
        ------
        ModelError
            If there is no single such number: in a mixture of experts, or if blocks differ.
        """
        if any(block.n_experts for block in self._blocks):
            raise ModelError(f'"{self.kind}" is a mixture of experts: its neurons belong to experts, not to blocks')
        counts = {self.shape(layer, "up")[0] for layer in range(len(self.blocks))}
        if len(counts) > 1:
            raise ModelError(f'the blocks of this "{self.kind}" model have different numbers of neurons')
        return counts.pop()

    def roles(self, layer: int) -> tuple[str, ...]:
        """Return the roles of one block, in order of execution."""
        return self._roles[layer]

    def role_kinds(self) -> tuple[str, ...]:
        """Return the kinds of all roles of the model, in the order of :data:`ROLES`."""
        kinds = {role_kind(role) for roles in self._roles for role in roles}
        return tuple(kind for kind in ROLES if kind in kinds)

    def has_gate(self, layer: int) -> bool:
        """Whether the MLP of a block (or its experts) is gated: ``act(gate(x)) * up(x)`` rather than ``act(up(x))``."""
        return any(role_kind(role) == "gate" for role in self._roles[layer])

    def firing_roles(self, layer: int) -> tuple[str, ...]:
        """Return the roles of a block whose outputs an activation function takes: ``gate``, or ``up`` without a gate.

        Those of experts are left out, which have no biases.
        """
        pairs = (("gate", "up"), ("shared_gate", "shared_up"))
        there = self.sites(layer)
        found = (next((role for role in pair if role in there), None) for pair in pairs)
        return tuple(role for role in found if role is not None)

    def takes_bias(self, layer: int, role: str) -> bool:
        """Whether a projection has a bias or can be given one: without one, it must not share its module."""
        place = self._blocks[layer].sites.get(role)
        return place is not None and (self.bias(layer, role) is not None or not isinstance(place, Fused))

    def groups(self, layer: int) -> tuple[InputGroup, ...]:
        """Return the projections of one block, grouped by the input that they read, in order of execution."""
        block = self._blocks[layer]
        groups = []
        for kinds in SHARED_INPUTS:
            roles = tuple(role for role in block.sites if role in kinds)
            if roles:
                groups.append(InputGroup(roles, path_of(block.sites[roles[0]])))
        order = list(block.sites)
        groups.sort(key=lambda group: order.index(group.leader))
        for e in range(block.n_experts):
            module = path_of(block.place(f"gate.{e}"))
            groups.append(InputGroup((f"gate.{e}", f"up.{e}"), module, expert=e))
            groups.append(InputGroup((f"down.{e}",), module, expert=e, inner=True))
        return tuple(groups)

    def norm_before(self, layer: int, role: str) -> str:
        """Return the path, below a block, of the norm through which a role reads the residual stream.

        Empty if it reads something else (``o``, ``down``), or the norm of this architecture is not known.
        """
        return self._blocks[layer].norms.get(role_kind(role), "")

    def shape(self, layer: int, role: str) -> tuple[int, int]:
        """Return ``(outputs, inputs)`` of one projection."""
        *outputs, inputs = self._view(layer, role).shape
        return math.prod(outputs), inputs

    def weight(self, layer: int, role: str) -> Float[Tensor, "outputs inputs"]:
        """Return the weight of one projection.

        This is a live view of the model's parameter (writing to it changes the model), or a copy if the rows of several
        roles are interleaved (GPT-NeoX, BLOOM). :meth:`set_weight` works in both cases.
        """
        return self._view(layer, role).flatten(0, -2)

    def is_view(self, layer: int, role: str) -> bool:
        """Whether :meth:`weight` returns a live view of the model's parameter rather than a copy."""
        return self._view(layer, role).ndim == 2

    @torch.no_grad()
    def set_weight(self, layer: int, role: str, value: Float[Tensor, "outputs inputs"]) -> None:
        """Write the weight of one projection into the model's parameter, in place, whatever its storage."""
        view = self._view(layer, role)
        view.copy_(value.unflatten(0, view.shape[:-1]))

    def bias(self, layer: int, role: str) -> Float[Tensor, " outputs"] | None:
        """Return the bias of one projection, a live view or a copy as for :meth:`weight`; ``None`` if it has none."""
        view = self._bias_view(layer, role)
        return None if view is None else view.flatten()

    @torch.no_grad()
    def set_bias(self, layer: int, role: str, value: Float[Tensor, " outputs"] | None) -> None:
        """Write the bias of one projection in place; give it one if it has none, or take it away.

        Only a projection that does not share its module with others can be given a bias or lose it.
        """
        view = self._bias_view(layer, role)
        if view is not None and value is not None:
            view.copy_(value.unflatten(0, view.shape))
            return
        module: Any = self.module(layer, path_of(self._blocks[layer].sites[role]))
        weight = self.weight(layer, role)
        module.bias = None if value is None else nn.Parameter(value.to(weight, copy=True), requires_grad=False)

    def bias_parameters(self, keys: Iterable[tuple[int, str]]) -> dict[str, nn.Parameter]:
        """Return the parameters that store the biases of some projections, by path; not all may have one."""
        names = dict.fromkeys(f"{self.path(*key)}.bias" for key in keys if self.bias(*key) is not None)
        return {name: self.model.get_parameter(name) for name in names}

    def biases_by_projection(
        self, keys: Iterable[tuple[int, str]], values: Mapping[str, Tensor]
    ) -> dict[tuple[int, str], Tensor]:
        """Split tensors shaped like :meth:`bias_parameters`, such as gradients, by projection: ``[outputs]`` each."""
        split = {}
        for layer, role in keys:
            name = f"{self.path(layer, role)}.bias"
            if name in values:
                place = self._blocks[layer].sites[role]
                whole = values[name]
                own = self._cut(layer, role, place, whole).flatten() if isinstance(place, Fused) else whole
                split[layer, role] = own
        return split

    def _bias_view(self, layer: int, role: str) -> Tensor | None:
        place = self._blocks[layer].sites.get(role)
        if place is None:  # in experts
            return None
        bias = getattr(self.module(layer, path_of(place)), "bias", None)
        if bias is None:
            return None
        stored: Tensor = bias.data
        return self._cut(layer, role, place, stored) if isinstance(place, Fused) else stored

    def block_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that store the projections, by path from the model's root.

        One parameter may store several projections, or those of all experts.
        """
        names = dict.fromkeys(self._parameter(layer, role) for layer, role in self)
        return {name: self.model.get_parameter(name) for name in names}

    def stored_together(self, keys: Iterable[tuple[int, str]]) -> dict[str, list[tuple[int, str]]]:
        """Return the paths of the parameters that store some projections, and which of them each stores."""
        stored: dict[str, list[tuple[int, str]]] = {}
        for key in keys:
            stored.setdefault(self._parameter(*key), []).append(key)
        return stored

    def by_projection(
        self, values: Mapping[str, Tensor], keys: Iterable[tuple[int, str]] | None = None
    ) -> dict[tuple[int, str], Tensor]:
        """Split tensors shaped like :meth:`block_parameters`, such as gradients, by projection.

        Parameters
        ----------
        values
            Parameter path to tensor; parameters without one are skipped.
        keys
            The projections that are wanted; all by default.

        Returns
        -------
        dict
            ``(layer, role)`` to ``[outputs, inputs]``.
        """
        names = {key: self._parameter(*key) for key in (self if keys is None else keys)}
        return {key: self._part(*key, values[name]).flatten(0, -2) for key, name in names.items() if name in values}

    def experts(self, layer: int) -> nn.Module | None:
        """Return the module that holds the experts of a block, if it has any."""
        block = self._blocks[layer]
        return self.module(layer, block.experts.path) if block.experts is not None and block.n_experts else None

    def expert_activation(
        self, layer: int, expert: int, x: Float[Tensor, "tokens inputs"]
    ) -> Float[Tensor, "tokens neurons"]:
        """Return ``act(gate(x))`` of one expert with its current weights: positive where its neurons fire."""
        experts: Any = self.experts(layer)
        activation: Tensor = experts.act_fn(linear(x, self._view(layer, f"gate.{expert}")))
        return activation

    def expert_output(
        self, layer: int, expert: int, x: Float[Tensor, "tokens inputs"]
    ) -> Float[Tensor, "tokens inputs"]:
        """Return the output of one expert with its current weights, before the router's weight."""
        return linear(self.expert_inner(layer, expert, x), self._view(layer, f"down.{expert}"))

    def expert_inner(
        self, layer: int, expert: int, x: Float[Tensor, "tokens inputs"]
    ) -> Float[Tensor, "tokens neurons"]:
        """Return ``act(gate(x)) * up(x)`` of one expert with its current weights: the input of its ``down``."""
        experts: Any = self.experts(layer)
        both = linear(x, self._stored(layer, f"gate.{expert}")[expert])
        if hasattr(experts, "_apply_gate"):
            inner: Tensor = experts._apply_gate(both)
            return inner
        gate, up = both.chunk(2, dim=-1)
        return experts.act_fn(gate) * up

    def sites(self, layer: int) -> tuple[str, ...]:
        """Return the sites of one block, in order of execution.

        These are its roles outside experts, the ``heads`` of its attention (and the ``cross_heads``), the
        ``activation`` of its MLP (or ``shared_activation``, of its shared expert), and the ``residual`` stream after
        the block; before that, of experts, :data:`ROUTING`, what each adds, and :data:`EXPERTS`.
        """
        block = self._blocks[layer]
        heads = {role: site for site, role in HEADS.items()}
        outside = [site for role in block.sites for site in ([heads[role]] if role in heads else []) + [role]]
        inside = (ROUTING, *map(expert_site, range(block.n_experts)), EXPERTS) if block.n_experts else ()
        return (*outside, *inside, "residual")

    def path(self, layer: int, site: str) -> str:
        """Return the attribute path, from the model's root, of the module whose output contains `site`.

        Those of :data:`HEADS` are its input, and that of :data:`ROUTING` is among its arguments.
        """
        block = self._blocks[layer]
        if site == "residual":
            return block.path
        site = HEADS.get(site, site)
        if site in block.sites:
            return f"{block.path}.{path_of(block.sites[site])}"
        assert block.experts is not None
        return f"{block.path}.{block.experts.path}"

    def n_heads(self, layer: int, site: str = "heads") -> int:
        """Return the number of heads that an attention of a block has, 0 if its width is no multiple of it.

        Each is a run of as many dimensions of the site: with grouped keys and values these are the heads of queries.
        """
        role = HEADS[site]
        if role not in self._blocks[layer].sites:
            return 0
        number = int(getattr(self.config, "num_attention_heads", 0) or 0)
        return number if number and self.shape(layer, role)[1] % number == 0 else 0

    def n_experts(self, layer: int) -> int:
        """Return the number of experts of a block, 0 if it has none."""
        return self._blocks[layer].n_experts

    def neuron_groups(self, layer: int) -> dict[str, int]:
        """Return how many neurons the MLPs of a block have, by site, in the order in which they are numbered.

        The neurons of expert 0 come first, then those of expert 1 and so on; those that every token passes through (the
        shared expert's, or the MLP's in a block without experts) come last, under the site of their activation.
        """
        block = self._blocks[layer]
        groups = {expert_site(e): self.shape(layer, f"gate.{e}")[0] for e in range(block.n_experts)}
        for site, role in (("shared_activation", "shared_up"), ("activation", "up")):
            if site in block.sites:
                groups[site] = self.shape(layer, role)[0]
        return groups

    def site(self, layer: int, site: str, value: Any, shape: Sequence[int] | None = None) -> Tensor:
        """Extract one site's values, ``[batch, tokens, width]``, from the output of the module at its path.

        Parameters
        ----------
        layer, site
            Block and site.
        value
            The module's output: a tensor, or a tuple that starts with one.
        shape
            Batch and tokens. Some architectures flatten these two dimensions inside an MLP (OPT, shared experts); if
            given, they are restored.
        """
        output: Tensor = value[0] if isinstance(value, tuple) else value
        if shape is not None and output.ndim == 2:
            output = output.unflatten(0, tuple(shape))
        place = self._blocks[layer].sites.get(site)
        return self._cut(layer, site, place, output).flatten(output.ndim - 1) if isinstance(place, Fused) else output

    def with_site(self, layer: int, site: str, output: Any, value: Tensor) -> Any:
        """Return a module's output with the values of one site replaced.

        Parameters
        ----------
        layer, site
            Block and site.
        output
            The module's output, which is not modified.
        value
            The new values, in the shape returned by :meth:`site`.
        """
        whole: Tensor = output[0] if isinstance(output, tuple) else output
        place = self._blocks[layer].sites.get(site)
        if isinstance(place, Fused):
            columns = self._cut(layer, site, place, torch.arange(whole.shape[-1], device=whole.device)).flatten()
            changed = whole.index_copy(-1, columns, value.reshape(*whole.shape[:-1], -1).to(whole.dtype))
        else:
            changed = value.reshape(whole.shape).to(whole.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    @property
    def final_norm_path(self) -> str:
        """Attribute path of the final norm, whose output the head reads."""
        return f"{self.stacks[-1].path}.{self.stacks[-1].norm}"

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the head's vocabulary."""
        return int(head_of(self.model).weight.shape[0])

    def logits(
        self, hidden: Float[Tensor, "*batch hidden"], vocabulary: slice = slice(None)
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Compute logits from normed final hidden states, exactly as the model's own forward does.

        Parameters
        ----------
        hidden
            Output of the final norm.
        vocabulary
            The tokens to compute logits for; all by default.
        """
        return head_logits(self.model, hidden, vocabulary)

    def precise_logits(
        self, hidden: Float[Tensor, "*batch hidden"], vocabulary: slice | Tensor = slice(None)
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Compute logits from normed final hidden states in at least float32, for a loss.

        Equal to :meth:`logits` without its rounding in a 16-bit model.

        Parameters
        ----------
        hidden, vocabulary
            As in :meth:`logits`, or ids of tokens; the whole part of the head may be converted to float32.
        """
        return precise_head_logits(self.model, hidden, vocabulary)

    def fingerprint(self) -> str:
        """Identify the model by shape and sampled values of every prunable weight (SHA-256, hexadecimal).

        A fine-tuned version or another size has a different fingerprint; the same checkpoint in another folder does
        not. At most 512 evenly spaced values per projection are read, which takes milliseconds; the fingerprint tells
        models apart but does not prove integrity.
        """
        digest = hashlib.sha256(str(self.config.model_type).encode())
        for layer, roles in enumerate(self._roles):
            with self.loaded(layer, to_read=True):
                for role in roles:
                    weight = self.weight(layer, role)
                    sample = weight.flatten()[:: max(1, weight.numel() // 512)][:512]
                    digest.update(f"{layer}.{role}.{tuple(weight.shape)}".encode())
                    digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def _parameter(self, layer: int, role: str) -> str:
        """Return the path, from the model's root, of the parameter that stores a projection."""
        return f"{self._blocks[layer].path}.{self._blocks[layer].parameter(role)}"

    def _stored(self, layer: int, role: str) -> Tensor:
        return self.blocks[layer].get_parameter(self._blocks[layer].parameter(role)).data

    def _view(self, layer: int, role: str) -> Tensor:
        """Return a live view of a projection's weight, as :meth:`_part` does."""
        return self._part(layer, role, self._stored(layer, role))

    def _part(self, layer: int, role: str, stored: Tensor) -> Tensor:
        """Return a view of one projection's part of a parameter.

        Its shape is ``[outputs, inputs]``, or ``[heads, outputs per head, inputs]`` if heads are interleaved.
        """
        block = self._blocks[layer]
        if role not in block.sites:
            stored = stored[int(role.partition(".")[2])]
        outputs_last = stored if block.transposed else stored.T
        place = block.place(role)
        if isinstance(place, Fused):
            outputs_last = self._cut(layer, role, place, outputs_last)
        return outputs_last.movedim(0, -1)

    def _cut(self, layer: int, role: str, place: Fused, value: Tensor) -> Tensor:
        """Return a view of one part of a fused projection, whose outputs are the last dimension."""
        if place.split == "heads":
            return value.unflatten(-1, (int(self.config.num_attention_heads), 3, -1)).select(-2, place.part)
        width = value.shape[-1]
        sizes = [width // 2, width // 2]
        if role in ("q", "k", "v"):
            queries = self.shape(layer, "o")[1]
            sizes = [queries, (width - queries) // 2, (width - queries) // 2]
        return value.split(sizes, dim=-1)[place.part]

    def _count_experts(self, module: nn.Module | None, experts: Experts | None) -> int:
        if module is None or experts is None:
            return 0
        stored = [parameter for name, parameter in module.named_parameters() if name in (experts.gate_up, experts.down)]
        odd = getattr(module, "has_bias", False) or not getattr(module, "is_concatenated", True)
        if odd or [parameter.ndim for parameter in stored] != [3, 3]:
            raise ModelError(
                f'the experts of this "{self.kind}" model are not stored as "{experts.gate_up}" and "{experts.down}", '
                "of all experts at once, gate before up and without biases"
            )
        return len(stored[0])

    def _check_shapes(self, layer: int) -> None:
        """Raise ``ModelError`` unless the shapes of a block's projections are consistent."""
        roles = [role for role in self._roles[layer] if role in ROLES or role.endswith(".0")]
        try:
            shapes = {role_kind(role): self.shape(layer, role) for role in roles}
        except RuntimeError as error:
            raise ModelError(f'block {layer} of this "{self.kind}" model cannot be cut into roles: {error}') from error
        for role, (outputs, inputs) in shapes.items():
            kind = role.rpartition("_")[2]
            neurons = shapes[role.replace(kind, "up")][0] if kind in ("gate", "down") else 0
            fits = {
                "o": outputs == self.hidden_size,
                "gate": (outputs, inputs) == (neurons, self.hidden_size),
                "down": (outputs, inputs) == (self.hidden_size, neurons),
            }.get(kind, inputs == self.hidden_size)
            if not fits:
                raise ModelError(
                    f'{role} of block {layer} of this "{self.kind}" model has {outputs} outputs and {inputs} inputs, '
                    f"which does not fit its other parts (hidden size {self.hidden_size})"
                )
