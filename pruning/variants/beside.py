"""Comparing a model made elsewhere with its dense parent beside the projections, and saying what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn

from ..errors import VariantError
from ..models.anatomy import Anatomy
from ..models.head import head_of
from ..models.streaming import residence_of
from .others import narrowed, pieces

#: Settings that change what a model computes from the same parameters, as configurations of different architectures
#: call them.
_COMPUTING = (
    "rope_parameters",
    "rope_theta",
    "partial_rotary_factor",
    "rotary_pct",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "norm_topk_prob",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "feed_forward_proj",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
    "layer_types",
    "use_parallel_residual",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
)
EMBEDDINGS, HEAD, NORMS, BIASES, REST = "embeddings", "head", "norms", "biases", "other parameters"
_SAID = {EMBEDDINGS: "{} of {} embeddings", HEAD: "the head", NORMS: "{} of {} norm parameters"}


@dataclass
class _Kind:
    """What was found in the parameters of one kind: how many there are and differ, and the squares of their change."""

    every: int = 0
    changed: int = 0
    change: float = 0.0
    size: float = 0.0

    def __add__(self, other: _Kind) -> _Kind:
        """Return both together."""
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Kind(*(one + another for one, another in both))


@dataclass
class Beside:
    """What was found beside the projections.

    Attributes
    ----------
    kinds
        Kind of parameter to what was found.
    """

    kinds: dict[str, _Kind] = field(default_factory=dict)

    def add(self, kind: str, before: Tensor | None, after: Tensor, *, exactly: bool = False) -> bool:
        """Compare a parameter, and return whether it differs.

        What was only rounded to 16 bits does not differ, unless `exactly`. A parameter that the dense model does not
        have is compared with zeros.
        """
        changed, change, size = _compared(torch.zeros_like(after) if before is None else before, after, exactly)
        found = _Kind(1, int(changed), change if changed else 0.0, size)
        self.kinds[kind] = self.kinds.get(kind, _Kind()) + found
        return changed

    @property
    def changed(self) -> bool:
        """Whether anything differs."""
        return any(kind.changed for kind in self.kinds.values())

    def said(self, but: frozenset[str] = frozenset()) -> str:
        """Return what differs in words, with the size of the change relative to what it is a change of."""
        words = []
        for name, kind in self.kinds.items():
            if kind.changed and name not in but:
                what = _SAID.get(name, f"{{}} of {{}} {name}").format(kind.changed, kind.every)
                size = f"by {sqrt(kind.change / kind.size):.2%}" if kind.size else "from zero"
                words.append(f"{what} ({size})")
        return f"also changed: {', '.join(words)}" if words else ""


def differing_others(
    parent: Anatomy, child: Anatomy, layer: int | None, beside: Beside
) -> Iterator[tuple[str, Tensor]]:
    """Yield what differs beside projections and their biases: each path with its values, 16-bit ones in 16 bits.

    Parameters
    ----------
    parent, child
        The models.
    layer
        The block to look at, which must be loaded; ``None`` for everything outside the blocks, which is loaded one
        parameter at a time.
    beside
        Is told of everything.
    """
    names = parent.other_names() if layer is None else parent.parameter_names(layer)
    projections = parent.block_parameters().keys() | bias_paths(parent)
    for name in names:
        if name in projections:
            continue
        wanted = [] if layer is not None else [name]
        with (
            residence_of(parent.model).present(wanted, to_read=True),
            residence_of(child.model).present(wanted, to_read=True),
        ):
            before, after = parent.model.get_parameter(name), child.model.get_parameter(name)
            if name not in parent.ties:
                if beside.add(_kind(parent, name), before.detach(), after.detach()):
                    yield name, narrowed(after.detach())
            elif child.ties.get(name) != parent.ties[name] and _was_untied(child, name, parent.ties[name]):
                beside.add(HEAD if _kind(parent, name) == HEAD else EMBEDDINGS, before.detach(), after.detach())
                yield name, narrowed(after.detach())


def _was_untied(child: Anatomy, name: str, source: str) -> bool:
    """Whether a parameter has other values than the one that it is tied to in the dense model."""
    with residence_of(child.model).present([name, source], to_read=True):
        one, other = child.model.get_parameter(name), child.model.get_parameter(source)
        return not torch.equal(one, other)


def _kind(anatomy: Anatomy, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    module = anatomy.model.get_submodule(path)
    if module is head_of(anatomy.model):
        return HEAD
    if "norm" in type(module).__name__.lower():
        return NORMS
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    return BIASES if leaf == "bias" else REST


def _compared(before: Tensor, after: Tensor, exactly: bool) -> tuple[bool, float, float]:
    """Return whether two tensors differ, the square of the change, and that of what was changed."""
    kinds = (None,) if exactly else (None, torch.bfloat16, torch.float16)
    same: dict[torch.dtype | None, bool] = dict.fromkeys(kinds, True)
    change = size = 0.0
    for one, other in zip(pieces(before), pieces(after), strict=True):
        wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
        dense, own = one.to(wide), other.to(one.device, wide)
        for dtype in [dtype for dtype, so_far in same.items() if so_far]:
            same[dtype] = torch.equal(dense if dtype is None else dense.to(dtype).to(wide), own)
        change += float((own - dense).double().square().sum())
        size += float(dense.double().square().sum())
    return not any(same.values()), change, size


def bias_paths(anatomy: Anatomy) -> set[str]:
    """Return the paths that the biases of the projections have, or would have."""
    return {f"{anatomy.path(*key)}.bias" for key in anatomy if key[1] in anatomy.sites(key[0])}


def check_same_computation(parent: Anatomy, child: Anatomy, called: str) -> None:
    """Raise ``VariantError`` if a model computes something else from its parameters than its dense parent does."""
    for name in _COMPUTING:
        dense, own = (getattr(anatomy.config, name, None) for anatomy in (parent, child))
        if dense != own:
            raise VariantError(
                f'"{called}" has another {name} in its configuration ({own}) than this model ({dense}): the dense '
                "model with its parameters would compute something else, so it cannot be compared with this one"
            )
