"""Activation and weight patching between the dense and the pruned model, to locate where pruning does its damage.

A *component* is what is patched: the residual stream after a block, a subspace of it, the output of a role, what one
expert adds to the stream (nothing to tokens that are not routed to it), what an attention head puts out, some neurons,
or the weights of one or several projections. In an encoder-decoder it lies in either stack: what is patched in the
encoder acts on the rest of the encoder, and through its output on the whole decoder. *Restoring* patches the dense
model's values into the pruned model; *damaging* patches the pruned model's values into the dense one. Both runs read
the same tokens, so values correspond position by position. By default activations are patched where tokens count
(:meth:`probes.batches.Batcher.counts`), so not at the first one unless the session was told to count it; weights act on
every token. The start token of a decoder is always patched: the first token is predicted from it. Of minimal pairs the
stream can also be patched at one class of tokens alone (:data:`probes.batches.TOKEN_CLASSES`).

Exact patching needs one run per component. Attribution patching (Nanda, 2023; Syed et al., 2024, 2310.10348) estimates
all effects at once from gradients of the patched run. It is a first-order approximation, and of a component in several
blocks a rougher one (:func:`attribute`); the exact runs tell how good.
"""

from __future__ import annotations

from .attribution import attribute
from .components import (
    Component,
    Place,
    expert_output,
    experts_output,
    head,
    neurons,
    residual,
    residual_at,
    role_output,
    role_weights,
    stream_part,
)
from .crossing import Crossed, cross
from .damaged import DamagedModel
from .exact import patch
from .runs import COUNTED, DAMAGE, EVERY, RESTORE, Direction, Patched, Positions

__all__ = [
    "COUNTED",
    "DAMAGE",
    "EVERY",
    "RESTORE",
    "Component",
    "Crossed",
    "DamagedModel",
    "Direction",
    "Patched",
    "Place",
    "Positions",
    "attribute",
    "cross",
    "expert_output",
    "experts_output",
    "head",
    "neurons",
    "patch",
    "residual",
    "residual_at",
    "role_output",
    "role_weights",
    "stream_part",
]
