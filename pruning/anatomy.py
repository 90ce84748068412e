"""Where a model keeps its blocks, projections and MLP activation.

Everything else in prunescope speaks of *roles* (``q k v o gate up down``) and *sites* (the roles, the MLP
``activation``, the ``residual`` stream after a block and the ``final`` normed state); only this file knows the
attribute paths behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from .errors import ModelError, did_you_mean

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Layout:
    """Attribute paths of one family of architectures.

    Attributes
    ----------
    body
        The module that turns token ids into normed hidden states (everything but the head).
    blocks, final_norm
        Paths below the body.
    roles
        Role to path below a block, in the order in which the modules run.
    activation
        The MLP's activation function, below a block; its sign says whether a neuron fires.
    shared_inputs
        Roles that read the same input, led by the one that runs first.
    """

    body: str = "model"
    blocks: str = "layers"
    final_norm: str = "norm"
    roles: dict[str, str] = field(
        default_factory=lambda: {
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
    )
    activation: str = "mlp.act_fn"
    shared_inputs: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


_LLAMA = Layout()
_LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gemma3": Layout(body="model.language_model"),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
}

#: Order in which the sites of a block can be read during a forward pass.
BLOCK_SITES = ("q", "k", "v", "o", "gate", "activation", "up", "down", "residual")


def supported_architectures() -> tuple[str, ...]:
    """Return the ``model_type`` of every architecture that prunescope knows."""
    return tuple(sorted(_LAYOUTS))


class Anatomy:
    """The parts of one loaded model, by their canonical names.

    Parameters
    ----------
    model
        A causal language model of a supported architecture, as ``transformers`` loads it.

    Raises
    ------
    ModelError
        If the architecture is unknown, or the model lacks a part that its architecture should have.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        kind = config.model_type
        if kind not in _LAYOUTS:
            raise ModelError(f'unknown model architecture "{kind}"; {did_you_mean(kind, _LAYOUTS)}')
        self.model = model
        self.layout = _LAYOUTS[kind]
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        try:
            self.body: nn.Module = attrgetter(self.layout.body)(model)
            self.blocks: list[nn.Module] = list(attrgetter(self.layout.blocks)(self.body))
            for layer, role in self:
                self.weight(layer, role)
        except AttributeError as error:
            raise ModelError(
                f'this "{kind}" model has no part {error.name!r}; load it with AutoModelForCausalLM, unmodified'
            ) from error

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the ``(layer, role)`` of every prunable projection, in the order in which they run."""
        for layer in range(len(self.blocks)):
            for role in self.layout.roles:
                yield layer, role

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def n_neurons(self) -> int:
        """MLP neurons of a block."""
        return int(self.weight(0, "gate").shape[0])

    def projection(self, layer: int, role: str) -> nn.Module:
        """Return the module of one projection."""
        module: nn.Module = attrgetter(self.layout.roles[role])(self.blocks[layer])
        return module

    def weight(self, layer: int, role: str) -> Float[Tensor, "outputs inputs"]:
        """Return the live weight of one projection: writing to it changes the model."""
        weight = self.projection(layer, role).weight
        assert isinstance(weight, Tensor)
        return weight.data

    def leader(self, role: str) -> str:
        """Return the first role that reads the same input as `role`."""
        return next(group[0] for group in self.layout.shared_inputs if role in group)

    def path(self, layer: int, site: str) -> str:
        """Return the attribute path, from the model's root, of the module whose output is `site`."""
        block = f"{self.layout.body}.{self.layout.blocks}.{layer}"
        if site == "residual":
            return block
        below = self.layout.activation if site == "activation" else self.layout.roles[site]
        return f"{block}.{below}"

    @property
    def final_norm_path(self) -> str:
        """Attribute path of the last normalisation, whose output the head reads."""
        return f"{self.layout.body}.{self.layout.final_norm}"

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the head scores."""
        return int(self._head.weight.shape[0])

    def logits(
        self, hidden: Float[Tensor, "*batch hidden"], vocabulary: slice = slice(None)
    ) -> Float[Tensor, "*batch vocabulary"]:
        """Turn normed final hidden states into logits exactly as the model's own forward does.

        Parameters
        ----------
        hidden
            Output of the last normalisation.
        vocabulary
            The tokens whose logits are wanted; all by default. Covers Cohere's logit scale and Gemma 2's soft cap.
        """
        head = self._head
        bias = None if head.bias is None else head.bias[vocabulary]
        logits = linear(hidden, head.weight[vocabulary], bias)
        scale = getattr(self.config, "logit_scale", None)
        if scale is not None:
            logits = logits * scale
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def _head(self) -> nn.Linear:
        head: nn.Linear = self.model.lm_head  # type: ignore[assignment]
        return head

    def fingerprint(self) -> str:
        """Identify the model by shape and sampled values of every prunable weight (SHA-256, hexadecimal).

        A fine-tuned sibling or another size differs; loading the same checkpoint in another folder does not.
        At most 512 evenly spaced values a projection are read, so that it takes milliseconds; it tells models
        apart and is not a proof of integrity.
        """
        digest = hashlib.sha256(str(self.config.model_type).encode())
        for layer, role in self:
            weight = self.weight(layer, role)
            sample = weight.flatten()[:: max(1, weight.numel() // 512)][:512]
            digest.update(f"{layer}.{role}.{tuple(weight.shape)}".encode())
            digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()
