"""The components that a diagnosis examines: masks, outputs, heads, parts of the stream, neurons, and their controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from probes.batches import TOKEN_CLASSES
from probes.patching import (
    Component,
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
from pruning.models.anatomy import HEADS, Anatomy

from .controls import DRAWS, random_neurons, random_subspaces
from .lsar import LSAR

#: Kinds of the components that are the stream at one class of the tokens of minimal pairs: words in which the two
#: prompts differ, the last token and those of a choice, all others.
AT_TOKENS = tuple(f"residual_{tokens}" for tokens in TOKEN_CLASSES)


def components_of(
    anatomy: Anatomy,
    projections: Sequence[tuple[int, str]],
    subspaces: Sequence[LSAR],
    language_neurons: Mapping[int, Sequence[int]] | None = None,
    *,
    errors: Sequence[np.ndarray] | None = None,
    rates: np.ndarray | None = None,
    pairs: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Component]:
    """Return the components that a diagnosis examines.

    Parameters
    ----------
    anatomy
        Of the model.
    projections
        Those that were pruned.
    subspaces
        The language-specific subspace after each block (:func:`analysis.metrics.lsar.fit_layers`); beside each its
        complement, and random subspaces as controls.
    language_neurons
        Neurons that are specific to the language (LAPE), by block; beside them random ones as controls.
    errors
        Dense minus pruned states after each block, ``[segments, hidden]``: what random subspaces are matched in.
        Without them they have the rank alone in common.
    rates
        How often neurons fire in the dense model, ``[layers, neurons]``: what random neurons are matched in.
    pairs
        Whether minimal pairs are asked, so that the stream can be restored at :data:`AT_TOKENS` apart.
    draws, seed
        Of the controls.
    """
    found: list[Component] = [role_weights(*key) for key in projections]
    found += [role_output(layer, role) for layer, role in anatomy if role in anatomy.sites(layer)]
    for layer in range(len(anatomy.blocks)):
        for site in HEADS:
            found += [head(anatomy, layer, number, site) for number in range(anatomy.n_heads(layer, site))]
        if anatomy.n_experts(layer):
            found.append(experts_output(layer))
            found += [expert_output(layer, expert) for expert in range(anatomy.n_experts(layer))]
    for layer, subspace in enumerate(subspaces):
        basis = torch.from_numpy(subspace.basis_).float()
        found.append(residual(layer))
        found.append(stream_part("specific", layer, basis))
        found.append(stream_part("agnostic", layer, basis, outside=True))
        own = None if errors is None else errors[layer]
        drawn = random_subspaces(subspace.basis_, own, draws=draws, seed=seed * 10_007 + layer)
        for draw, control in enumerate(drawn):
            found.append(stream_part("random", layer, torch.from_numpy(control.basis).float(), draw=draw))
    chosen = {layer: sorted(own) for layer, own in (language_neurons or {}).items() if len(own)}
    if chosen:
        found.append(neurons("neurons", anatomy, {layer: torch.tensor(own) for layer, own in chosen.items()}))
        for draw, others in enumerate(random_neurons(chosen, anatomy.n_neurons, rates, draws=draws, seed=seed)):
            found.append(neurons("random_neurons", anatomy, others, draw=draw))
    return [*found, *(_at_tokens(anatomy) if pairs else ())]


def _at_tokens(anatomy: Anatomy) -> Iterator[Component]:
    """Yield the stream at the classes of tokens that each block has: the decoder of an encoder has last ones only."""
    for stack in anatomy.stacks:
        in_encoder, in_decoder = (anatomy.encoder_decoder and own for own in (stack.first == 0, stack.first > 0))
        for layer in range(stack.first, stack.stop):
            for tokens in TOKEN_CLASSES:
                if not (in_encoder if tokens == "last" else in_decoder):
                    yield residual_at(layer, tokens)
