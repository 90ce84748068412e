"""A variant without whole structures as a really smaller model of the same architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.anatomy import Anatomy
from ..models.families import families
from ..models.layouts import role_kind
from ..patterns import BLOCKS, HEADS, NEURONS
from ..projections import Key
from .masks import MaskSet
from .others import replaced

#: Names of a configuration's number of neurons: of an MLP, of every expert, of a shared expert.
_WIDTHS = {
    "down": ("intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    "expert": ("moe_intermediate_size", "intermediate_size"),
    "shared_down": ("shared_expert_intermediate_size",),
}
_CALLED = {"down": "MLP", "expert": "expert", "shared_down": "shared expert"}
#: Switches of a configuration that give projections biases.
_SWITCHES = {"o": "attention_bias", "gate": "mlp_bias", "up": "mlp_bias", "down": "mlp_bias"}
#: Largest difference of logits, relative to the largest logit, that counts as rounding.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@runtime_checkable
class Shrinkable(Protocol):
    """What must be known of a variant."""

    @property
    def masks(self) -> MaskSet:
        """The masks."""

    @property
    def biases(self) -> Any:
        """Biases that differ from the dense model's."""

    @property
    def others(self) -> Mapping[str, Tensor]:
        """Parameters beside the projections that differ from the dense model's."""

    def weight(self, key: Key, dense: Tensor) -> Tensor:
        """Return the weight of one projection, given the dense model's."""

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager that turns a model into the variant."""


class _Unfit(Exception):
    """The architecture has no smaller model for this variant; the message says why."""


def needs_biases(variant: Shrinkable, anatomy: Anatomy) -> bool:
    """Whether a variant has biases where the dense model has none: its checkpoint needs another configuration."""
    return any(anatomy.bias(*key) is None for key in variant.biases)


def smallest(variant: Shrinkable, anatomy: Anatomy, structure: tuple[str, ...]) -> tuple[Any, str]:
    """Return the first that :func:`rebuilt` can make: without all kinds of structure, or without one of them."""
    model, said = rebuilt(variant, anatomy, structure)
    for kind in structure if len(structure) > 1 else ():
        if model is None:
            model, partly = rebuilt(variant, anatomy, (kind,))
            said = said if model is None else f"{partly}, the rest with zeros: {said}"
    return model, said


@torch.no_grad()
def rebuilt(variant: Shrinkable, anatomy: Anatomy, structure: tuple[str, ...]) -> tuple[Any, str]:
    """Return a variant as a model of its own, and in words what it lacks.

    It is smaller if its structures can be cut out: if every block lost as many neurons, and as many heads, and the
    configuration has a size for that. It is checked on a few tokens that its logits are those of the dense model with
    the variant's weights.

    Parameters
    ----------
    variant
        The variant.
    anatomy
        Anatomy of the dense model, in memory.
    structure
        Kinds of structure to cut out; none to keep the model's size.

    Returns
    -------
    tuple
        The model, or ``None`` if there is no such model, and what was cut out, or why nothing can be.
    """
    dense: Any = anatomy.model
    try:
        cut = _Cut(variant, anatomy, structure)
        config = cut.configured(copy.deepcopy(dense.config))
        with torch.random.fork_rng(devices=[]):  # the weights that it begins with are drawn on the CPU
            try:
                model = type(dense)._from_config(config, dtype=dense.dtype).to(anatomy.device).eval()
            except (ValueError, RuntimeError, AttributeError) as error:
                raise _Unfit(f"{anatomy.kind} has no such sizes") from error
        with replaced(anatomy, variant.others):
            cut.fill(model)
        _compare(variant, anatomy, model)
    except _Unfit as reason:
        return None, str(reason)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model, cut.said


class _Cut:
    """What is cut out of a model: blocks, and in the others the removed neurons and heads."""

    def __init__(self, variant: Shrinkable, anatomy: Anatomy, structure: tuple[str, ...]) -> None:
        self.variant = variant
        self.anatomy = anatomy
        self.layers = list(range(len(anatomy.blocks)))
        if BLOCKS in structure:
            self.layers = [n for n in self.layers if any(_kept(variant, n, role) for role in anatomy.roles(n))]
        self.rows: dict[Key, Tensor] = {}
        self.columns: dict[Key, Tensor] = {}
        self.widths: dict[str, int] = {}
        self.heads: tuple[int, int, int] | None = None  # query heads, key heads, size of each
        self.biased = {key for key in variant.biases if anatomy.bias(*key) is None}
        kinds = tuple(kind for kind in structure if kind in (NEURONS, HEADS))
        for layer in self.layers:
            self._narrow(layer, kinds)
        parts = (
            [f"{len(self.layers)} of {len(anatomy.blocks)} blocks"] if len(self.layers) < len(anatomy.blocks) else []
        )
        parts += [f"{width} neurons in each {_CALLED[name]}" for name, width in self.widths.items()]
        parts += [f"{self.heads[0]} heads in each block"] if self.heads else []
        self.said = ", ".join(parts)

    def _narrow(self, layer: int, kinds: tuple[str, ...]) -> None:
        for family in families(self.anatomy, layer, kinds):
            key = layer, family.reader
            size = self.anatomy.shape(*key)[1]
            kept = self.variant.masks[key].any(dim=0) if key in self.variant.masks else torch.ones(size).bool()
            units = kept.unflatten(0, (family.units, family.width)).any(dim=1)
            left = int(units.sum())
            if family.kind == NEURONS:
                name = "expert" if "." in family.reader else role_kind(family.reader)
                same = self.widths.setdefault(name, left) == left
            else:
                queries = left * family.sharing
                keys = left if "k" in family.rows or "cross_k" in family.rows else 1
                heads = queries, keys, family.width // family.sharing
                self.heads = self.heads or heads
                same = self.heads == heads
            if not same or left == 0:
                raise _Unfit(f"its blocks have different numbers of {family.kind}, and a configuration has one for all")
            where = units.nonzero().flatten().to(self.anatomy.device)
            self.columns[key] = _expanded(where, family.width)
            for role, each in family.rows.items():
                self.rows[layer, role] = _expanded(where, each)

    def configured(self, config: Any) -> Any:
        """Return the configuration of the smaller model; the one given is changed."""
        text = getattr(config, "text_config", None) or config
        if len(self.layers) < len(self.anatomy.blocks):
            self._shorten(text)
        for name, width in self.widths.items():
            known = [attribute for attribute in _WIDTHS[name] if hasattr(text, attribute)]
            if not known:
                raise _Unfit(f"the configuration of {self.anatomy.kind} has no number of neurons")
            for attribute in known if name == "down" else known[:1]:
                setattr(text, attribute, width)
        if self.heads is not None:
            queries, keys, size = self.heads
            text.num_attention_heads = queries
            if getattr(text, "num_key_value_heads", None) is not None:
                text.num_key_value_heads = keys
            if not hasattr(text, "d_kv"):
                text.head_dim = size
        for role in sorted({role for _, role in self.biased}):
            if _SWITCHES.get(role) is None or not hasattr(text, _SWITCHES[role]):
                raise _Unfit(f"a {self.anatomy.kind} checkpoint has no bias of {role}")
            setattr(text, _SWITCHES[role], True)
        return config

    def _shorten(self, text: Any) -> None:
        counts = [sum(stack.first <= n < stack.stop for n in self.layers) for stack in self.anatomy.stacks]
        before = self.anatomy.stacks[-1].stop - self.anatomy.stacks[-1].first
        kept = [n - self.anatomy.stacks[-1].first for n in self.layers if n >= self.anatomy.stacks[-1].first]
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and name.endswith("_layers") and all(isinstance(n, int) for n in value):
                if set(value) <= {0, 1} and len(value) == before:
                    setattr(text, name, [value[n] for n in kept])
                else:
                    setattr(text, name, [kept.index(n) for n in value if n in kept])
            elif isinstance(value, list) and len(value) == before:
                setattr(text, name, [value[n] for n in kept])
        if self.anatomy.encoder_decoder:
            text.num_layers, text.num_decoder_layers = counts
        else:
            text.num_hidden_layers = counts[0]

    def fill(self, model: nn.Module) -> None:
        """Write the variant's parameters and stored buffers, without what is cut out, into the smaller model."""
        try:
            target = Anatomy(model)
        except ModelError as error:
            raise _Unfit(str(error)) from error
        source = self.anatomy
        if len(target.blocks) != len(self.layers):
            raise _Unfit(f"the configuration of {source.kind} does not determine the number of blocks")
        projections = set(target.block_parameters())
        projections |= {f"{target.path(*key)}.bias" for key in target if key[1] in target.sites(key[0])}
        old = source.model.state_dict()
        for name, tensor in model.state_dict().items():  # they share the model's memory
            if name not in projections:
                before = old.get(self._before(name, target))
                if before is None or before.shape != tensor.shape:
                    raise _Unfit(f"{name} of {source.kind} depends on what would be cut out")
                tensor.copy_(before)
        for layer, role in target:
            key = self.layers[layer], role
            weight = self.variant.weight(key, source.weight(*key))
            weight = weight[self.rows[key]] if key in self.rows else weight
            weight = weight[:, self.columns[key]] if key in self.columns else weight
            if weight.shape != target.shape(layer, role):
                outputs, inputs = weight.shape
                raise _Unfit(f"a {source.kind} checkpoint has no {role} of {outputs} × {inputs}")
            target.set_weight(layer, role, weight)
            there = target.bias(layer, role)
            bias = self.variant.biases.get(key, source.bias(*key))
            if bias is not None and there is None:
                raise _Unfit(f"a {source.kind} checkpoint has no bias of {role}")
            if there is not None:
                value = torch.zeros_like(there)
                if bias is not None:
                    value = bias.to(there)[self.rows[key]] if key in self.rows else bias.to(there)
                target.set_bias(layer, role, value)

    def _before(self, name: str, target: Anatomy) -> str:
        """Return what a parameter of the smaller model is called in the whole one, whose blocks have other numbers."""
        for layer, old in enumerate(self.layers):
            block = f"{target.path(layer, 'residual')}."
            if name.startswith(block):
                return f"{self.anatomy.path(old, 'residual')}.{name.removeprefix(block)}"
        return name


def _kept(variant: Shrinkable, layer: int, role: str) -> bool:
    return (layer, role) not in variant.masks or variant.masks.kept((layer, role)) > 0


def _expanded(units: Tensor, each: int) -> Tensor:
    """Return the indices of the rows or columns of some units."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


def _compare(variant: Shrinkable, anatomy: Anatomy, model: Any) -> None:
    """Raise unless the logits of a model on a few tokens are those of the dense model with the variant's weights."""
    whole: Any = anatomy.model
    ids = (torch.arange(16, device=anatomy.device)[None] * 7 + 5) % anatomy.vocabulary
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if anatomy.encoder_decoder else {})
    with variant.applied(whole):
        expected = whole(**inputs, use_cache=False).logits.float()
    found = model(**inputs, use_cache=False).logits.float()
    worst = float((found - expected).abs().max() / expected.abs().max())
    if not worst <= _TOLERANCE.get(whole.dtype, 1e-4):
        raise _Unfit(f"a smaller {anatomy.kind} model computes something else (logits differ by {worst:.1g})")
