"""Attribute paths of the blocks, projections and MLP activation of each architecture.

Every projection has a canonical *role*, whatever its name and storage. The layout of an architecture that is not in
the table is inferred from its structure if that is unambiguous, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..extensions import Extension, extensions
from .head import head_logits

#: Every kind of prunable projection. A role is a kind, or that of one expert, as in ``"gate.3"``.
ROLES = (
    "q",
    "k",
    "v",
    "o",
    "cross_q",
    "cross_k",
    "cross_v",
    "cross_o",
    "gate",
    "up",
    "down",
    "shared_gate",
    "shared_up",
    "shared_down",
)
#: Kinds that read the same input, if a block has them.
SHARED_INPUTS = (
    ("q", "k", "v"),
    ("o",),
    ("cross_q",),
    ("cross_k", "cross_v"),
    ("cross_o",),
    ("gate", "up"),
    ("down",),
    ("shared_gate", "shared_up"),
    ("shared_down",),
)

#: Kinds that read the residual stream through a norm: those of attention, and those of the MLP.
ATTENTION_READERS = ("q", "k", "v")
MLP_READERS = ("gate", "up", "shared_gate", "shared_up")
STREAM_READERS = (*ATTENTION_READERS, *MLP_READERS)
#: Kinds that read the output of the encoder.
CONTEXT_ROLES = ("cross_k", "cross_v")


def role_kind(role: str) -> str:
    """Return the kind of a role: for an expert's role the part before its number.

    >>> role_kind("gate.3"), role_kind("q")
    ('gate', 'q')
    """
    return role.partition(".")[0]


@dataclass(frozen=True)
class Fused:
    """One part of a module that fuses several projections.

    Attributes
    ----------
    path
        The module, below a block.
    part
        Index of the part, from 0: q, k, v or gate, up, unless the architecture has another order.
    split
        ``rows``: each part is a run of output rows (q has as many as ``o`` has inputs, k and v share the rest; gate
        and up have half each). ``heads``: interleaved by head, each head with its own q, k and v rows.
    """

    path: str
    part: int
    split: Literal["rows", "heads"] = "rows"


def path_of(place: str | Fused) -> str:
    """Return the path of the module that holds a role, below a block."""
    return place if isinstance(place, str) else place.path


@dataclass(frozen=True)
class Experts:
    """A module that stores all experts of a block in two parameters.

    Attributes
    ----------
    path
        The module, below a block. Blocks without it have an ordinary MLP.
    gate_up, down
        Its parameters, ``[experts, 2 * neurons, hidden]`` (gate, then up) and ``[experts, hidden, neurons]``.
    """

    path: str
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Layout:
    """Attribute paths of one family of architectures.

    Attributes
    ----------
    body
        The module that turns token ids into normed hidden states (everything but the head).
    blocks, norm
        Paths, below the body, of its blocks and its final norm, whose output the head reads.
    sites
        Every role and the MLP's ``activation`` (whose sign tells whether a neuron fires), in order of execution, to a
        module's path below a block or a part of a fused module. An MLP without ``gate`` has only ``up`` and ``down``.
        Blocks with experts have the ``shared_*`` sites, others ``gate``, ``activation``, ``up`` and ``down``.
    experts
        Where a mixture of experts stores its experts, which run last in their block.
    transposed
        Whether weights are stored as ``[inputs, outputs]``, as in GPT-2's ``Conv1D``.
    encoder
        Layout of the encoder of an encoder-decoder.
    attention_norm, mlp_norm
        Paths, below a block, of the norms through which q, k and v, and gate and up, read the residual stream; empty if
        they are not known.
    """

    sites: Mapping[str, str | Fused]
    body: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    experts: Experts | None = None
    transposed: bool = False
    encoder: Layout | None = None
    attention_norm: str = ""
    mlp_norm: str = ""

    @property
    def stacks(self) -> tuple[Layout, ...]:
        """The layouts of all stacks, in order of execution."""
        return (self,) if self.encoder is None else (*self.encoder.stacks, self)

    def sites_of(self, block: nn.Module) -> dict[str, str | Fused]:
        """Return the sites that this block has."""
        sparse = self.experts_of(block) is not None
        absent = {"gate", "activation", "up", "down"} if sparse else _SHARED.keys()
        return {site: place for site, place in self.sites.items() if site not in absent}

    def experts_of(self, block: nn.Module) -> nn.Module | None:
        """Return the module that holds the experts of this block, if it has any."""
        return None if self.experts is None else _child(block, self.experts.path)


_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
_GATED = {"gate": "mlp.gate_proj", "activation": "mlp.act_fn", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_SHARED = {
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_activation": "mlp.shared_expert.act_fn",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
}
_BEFORE_ATTENTION, _BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
_LLAMA = Layout(_ATTENTION | _GATED, attention_norm=_BEFORE_ATTENTION, mlp_norm=_BEFORE_MLP)
_COHERE = replace(_LLAMA, mlp_norm="input_layernorm")  # attention and MLP read the same
_GEMMA_2 = replace(_LLAMA, mlp_norm="pre_feedforward_layernorm")
_PHI3 = Layout(
    {
        "q": Fused("self_attn.qkv_proj", 0),
        "k": Fused("self_attn.qkv_proj", 1),
        "v": Fused("self_attn.qkv_proj", 2),
        "o": "self_attn.o_proj",
        "gate": Fused("mlp.gate_up_proj", 0),
        "up": Fused("mlp.gate_up_proj", 1),
        "activation": "mlp.activation_fn",
        "down": "mlp.down_proj",
    },
    attention_norm=_BEFORE_ATTENTION,
    mlp_norm=_BEFORE_MLP,
)
_GPT_NEOX = Layout(
    {
        "q": Fused("attention.query_key_value", 0, "heads"),
        "k": Fused("attention.query_key_value", 1, "heads"),
        "v": Fused("attention.query_key_value", 2, "heads"),
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "activation": "mlp.act",
        "down": "mlp.dense_4h_to_h",
    },
    body="gpt_neox",
    norm="final_layer_norm",
    attention_norm=_BEFORE_ATTENTION,
    mlp_norm=_BEFORE_MLP,
)
_BLOOM = Layout(
    {
        "q": Fused("self_attention.query_key_value", 0, "heads"),
        "k": Fused("self_attention.query_key_value", 1, "heads"),
        "v": Fused("self_attention.query_key_value", 2, "heads"),
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "activation": "mlp.gelu_impl",
        "down": "mlp.dense_4h_to_h",
    },
    body="transformer",
    blocks="h",
    norm="ln_f",
    attention_norm=_BEFORE_ATTENTION,
    mlp_norm=_BEFORE_MLP,
)
_OPT = Layout(
    _ATTENTION | {"o": "self_attn.out_proj", "up": "fc1", "activation": "activation_fn", "down": "fc2"},
    body="model.decoder",
    norm="final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
)
_GPT2 = Layout(
    {
        "q": Fused("attn.c_attn", 0),
        "k": Fused("attn.c_attn", 1),
        "v": Fused("attn.c_attn", 2),
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "activation": "mlp.act",
        "down": "mlp.c_proj",
    },
    body="transformer",
    blocks="h",
    norm="ln_f",
    transposed=True,
    attention_norm="ln_1",
    mlp_norm="ln_2",
)
_EXPERTS = Experts("mlp.experts")


def _t5(*, gated: bool) -> Layout:
    """Return the layout of T5 and its relatives."""

    def stack(body: str, mlp: str, cross: dict[str, str], encoder: Layout | None) -> Layout:
        up = {"gate": f"{mlp}.wi_0", "activation": f"{mlp}.act", "up": f"{mlp}.wi_1"}
        if not gated:
            up = {"up": f"{mlp}.wi", "activation": f"{mlp}.act"}
        attention = {role: f"layer.0.SelfAttention.{role}" for role in ("q", "k", "v", "o")}
        sites = attention | cross | up | {"down": f"{mlp}.wo"}
        return Layout(sites, body, blocks="block", norm="final_layer_norm", encoder=encoder)

    encoder = stack("encoder", "layer.1.DenseReluDense", {}, None)
    cross = {f"cross_{role}": f"layer.1.EncDecAttention.{role}" for role in ("q", "k", "v", "o")}
    return stack("decoder", "layer.2.DenseReluDense", cross, encoder)


_T5 = (_t5(gated=True), _t5(gated=False))
#: If an architecture has several layouts, the first one whose parts all exist is used.
_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "gemma": (_LLAMA,),
    "gemma2": (_GEMMA_2,),
    "gemma3_text": (_GEMMA_2,),
    "gemma3": (replace(_GEMMA_2, body="model.language_model"),),
    "cohere": (_COHERE,),
    "cohere2": (_COHERE,),
    "phi3": (_PHI3,),
    "gpt_neox": (_GPT_NEOX,),
    "bloom": (_BLOOM,),
    # OPT-350M's head reads a projection, without a norm, and its blocks normalise the sum
    "opt": (replace(_OPT, norm="project_out", attention_norm="", mlp_norm=""), _OPT),
    "gpt2": (_GPT2,),
    "mixtral": (replace(_LLAMA, sites=_ATTENTION, experts=_EXPERTS),),
    "qwen2_moe": (replace(_LLAMA, sites=_ATTENTION | _SHARED | _GATED, experts=_EXPERTS),),
    "qwen3_moe": (replace(_LLAMA, experts=_EXPERTS),),
    "mt5": _T5,
    "t5": _T5,
    "umt5": _T5,
}


def supported_architectures() -> tuple[str, ...]:
    """Return the ``model_type`` of every architecture in the table, and of those that other packages add.

    Others may be inferred from their structure.
    """
    return tuple(sorted({*_LAYOUTS, *_added()}))


def _added() -> dict[str, Extension]:
    return extensions("architectures", _check_added)


def _check_added(kind: str, found: object) -> None:
    if kind in _LAYOUTS:
        raise ModelError(f'the architecture "{kind}" is known already')
    if not all(isinstance(layout, Layout) for layout in _several(found)):
        raise ModelError("it should be a pruning.Layout, or a tuple of some")


def _several(layouts: object) -> tuple[object, ...]:
    return layouts if isinstance(layouts, tuple) else (layouts,)


def _layouts(kind: str) -> tuple[Layout, ...]:
    """Return the layouts of an architecture in the table, or of another package; none if it is in neither."""
    if kind in _LAYOUTS or kind not in _added():
        return _LAYOUTS.get(kind, ())
    return tuple(layout for layout in _several(_added()[kind].found) if isinstance(layout, Layout))


def register_architecture(kind: str, *layouts: Layout) -> None:
    """Add an architecture to the table, or replace one.

    Parameters
    ----------
    kind
        Its ``model_type``.
    layouts
        Where its parts are; of several, the first one whose parts all exist is used. The head must be linear, with only
        the scaling and capping that :func:`~pruning.models.head.head_logits` supports.
    """
    _LAYOUTS[kind] = layouts


def layout_of(model: nn.Module) -> Layout:
    """Return a model's layout, from the table or else inferred from its structure.

    Raises
    ------
    ModelError
        If a part is missing, or the architecture is unknown and its structure ambiguous.
    """
    kind = _kind(model)
    if layouts := _layouts(kind):
        missing = [next(_missing(model, layout), None) for layout in layouts]
        if None in missing:
            return layouts[missing.index(None)]
        raise ModelError(
            f'this "{kind}" model has no part "{missing[-1]}"; load it with its language modelling head '
            "(AutoModelForCausalLM, or AutoModelForSeq2SeqLM for T5 and its relatives), unmodified"
        )
    if model not in _DISCOVERED:
        layout = _discovered(model)
        if any(parameter.is_meta for parameter in model.parameters()):
            return layout  # inferred from names alone, so not cached
        _DISCOVERED[model] = _verified(model, layout)
    return _DISCOVERED[model]


def _kind(model: nn.Module) -> str:
    return str(model.config.model_type)  # type: ignore[union-attr]


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _missing(model: nn.Module, layout: Layout) -> Iterator[str]:
    """Yield the layout's paths that the model lacks."""
    for stack in layout.stacks:
        blocks = _child(model, f"{stack.body}.{stack.blocks}")
        for below in (stack.blocks, stack.norm):
            if _child(model, f"{stack.body}.{below}") is None:
                yield f"{stack.body}.{below}"
        for layer, block in enumerate(blocks.children() if blocks is not None else ()):
            sites = stack.sites_of(block)
            paths = [path_of(place) for place in sites.values()]
            if stack.experts is not None and "up" not in sites:
                paths.append(stack.experts.path)
            for path in paths:
                if _child(block, path) is None:
                    yield f"{stack.body}.{stack.blocks}.{layer}.{path}"


# Inferring the layout of an architecture that is not in the table.

_ATTENTION_NAMES = {
    "q": ("q_proj", "query", "q", "wq", "q_lin"),
    "k": ("k_proj", "key", "k", "wk", "k_lin"),
    "v": ("v_proj", "value", "v", "wv", "v_lin"),
    "o": ("o_proj", "out_proj", "dense", "o", "wo", "c_proj", "out_lin"),
}
_MLP_NAMES = {
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "w3", "wi_1", "dense_h_to_4h", "lin1"),
    "down": ("down_proj", "fc2", "fc_out", "c_proj", "w2", "wo", "dense_4h_to_h", "lin2"),
}
_FUSED_NAMES = ("query_key_value", "qkv_proj", "qkv", "wqkv", "c_attn", "kv_proj", "gate_up_proj", "up_gate_proj")
_ACTIVATION_NAMES = ("act", "act_fn", "activation", "activation_fn", "gelu_impl")

_DISCOVERABLE = (*_ATTENTION_NAMES, *_MLP_NAMES)

_DISCOVERED: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def _refusal(model: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f'unknown model architecture "{_kind(model)}": {reason}; describe it with pruning.register_architecture'
    )


def _discovered(model: nn.Module) -> Layout:
    """Return the layout suggested by the module names of an unknown architecture."""
    lists = list(_block_lists(model))
    if len(lists) != 1:
        found = "no list of like blocks" if not lists else f"several lists of blocks ({', '.join(lists)})"
        raise _refusal(model, f"it has {found}")
    body, _, blocks = lists[0].rpartition(".")
    first, *others = model.get_submodule(lists[0]).children()
    for layer, block in enumerate(others, start=1):
        if _matrices(block).keys() != _matrices(first).keys():
            raise _refusal(model, f"block {layer} has other parts than block 0")
    norms = [
        name
        for name, module in model.get_submodule(body).named_children()
        if ("norm" in name or name.startswith("ln")) and all(p.ndim == 1 for p in module.parameters())
    ]
    if len(norms) != 1:
        raise _refusal(model, f'"{body}" has not one normalisation after its blocks but {len(norms)}')
    return Layout(_placed(model, first), body, blocks, norms[0])


def _block_lists(model: nn.Module, path: str = "") -> Iterator[str]:
    """Yield the paths of the outermost module lists whose modules are of one class and have weights."""
    for name, module in model.named_children():
        below = f"{path}{name}"
        like = len({type(block) for block in module.children()}) == 1
        if isinstance(module, nn.ModuleList) and like and _matrices(module):
            yield below
        else:
            yield from _block_lists(module, f"{below}.")


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.ndim > 1}


def _placed(model: nn.Module, block: nn.Module) -> dict[str, str | Fused]:
    """Assign a role to every weight of a block, by name."""
    found: dict[str, str] = {}
    if not any("att" in name.lower() for name in _matrices(block)):
        raise _refusal(model, "its blocks have no attention, and only transformers can be pruned here")
    for name in _matrices(block):
        path, _, parameter = name.rpartition(".")
        *parents, leaf = path.lower().split(".")
        if leaf in _FUSED_NAMES:
            raise _refusal(
                model, f'"{path}" in its blocks is several projections in one, in an order that is not visible'
            )
        names = _ATTENTION_NAMES if any("att" in parent for parent in parents) else _MLP_NAMES
        role = next((role for role, known in names.items() if leaf in known), None)
        if role is None or parameter != "weight" or not isinstance(block.get_submodule(path), nn.Linear):
            kind = type(block.get_submodule(path)).__name__
            raise _refusal(model, f'"{name}" in its blocks (of a {kind}) is none of {" ".join(_DISCOVERABLE)}')
        if role in found:
            raise _refusal(model, f'both "{found[role]}" and "{path}" in its blocks could be {role}')
        found[role] = path
    absent = [role for role in _DISCOVERABLE if role not in found and role != "gate"]
    if absent:
        raise _refusal(model, f"nothing in its blocks could be {' or '.join(absent)}")
    activations = [
        path
        for path, module in block.named_modules()
        if path.rpartition(".")[2] in _ACTIVATION_NAMES and not _matrices(module) and "att" not in path
    ]
    if len(activations) == 1:
        found["activation"] = activations[0]
    order = ("q", "k", "v", "o", "gate", "activation", "up", "down")
    return {site: found[site] for site in order if site in found}


@torch.no_grad()
def _verified(model: nn.Module, layout: Layout) -> Layout:
    """Verify a layout with a forward pass on two tokens, and return it with its sites in order of execution.

    Raises
    ------
    ModelError
        If the pass contradicts the roles inferred from names.
    """
    inputs: dict[tuple[int, str], Tensor] = {}
    outputs: dict[tuple[int, str], Tensor] = {}
    handles = []

    def watch(module: nn.Module, layer: int, site: str) -> None:
        def observe(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            inputs[layer, site], outputs[layer, site] = arguments[0], output

        handles.append(module.register_forward_hook(observe))

    blocks = list(model.get_submodule(f"{layout.body}.{layout.blocks}").children())
    for layer, block in enumerate(blocks):
        for site, path in layout.sites.items():
            watch(block.get_submodule(str(path)), layer, site)
    watch(model.get_submodule(f"{layout.body}.{layout.norm}"), len(blocks), "final")
    try:
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        logits = model(input_ids=torch.tensor([[len(table) // 2, len(table) // 3]], device=table.device)).logits
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refusal(model, f"two tokens did not pass through it ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()

    wanted = {(layer, site) for layer in range(len(blocks)) for site in layout.sites} | {(len(blocks), "final")}
    for layer, site in sorted(wanted - inputs.keys()):
        raise _refusal(model, f"{site} of block {layer} did not run when two tokens passed through")
    for layer in range(len(blocks)):
        for group in SHARED_INPUTS:
            leader, *others = [role for role in group if role in layout.sites] or [""]
            for role in others:
                if not _same(inputs[layer, leader], inputs[layer, role]):
                    raise _refusal(model, f"{leader} and {role} of block {layer} do not read the same input")
        source = "gate" if "gate" in layout.sites else "up"
        if "activation" in layout.sites and not _same(inputs[layer, "activation"], outputs[layer, source]):
            raise _refusal(model, f"the activation of block {layer} does not read the output of {source}")
    final = outputs[len(blocks), "final"]
    if not torch.allclose(head_logits(model, final), logits, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise _refusal(model, f'its logits are not its head times the output of "{layout.body}.{layout.norm}"')
    running = [site for layer, site in outputs if layer == 0]
    return replace(layout, sites={site: layout.sites[site] for site in running})


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())
