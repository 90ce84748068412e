"""The components that a diagnosis examines: masks, outputs, heads, parts of the stream, neurons, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from probes.patching import (
    Component,
    expert_output,
    experts_output,
    head,
    neurons,
    residual,
    role_output,
    role_weights,
    stream_part,
)
from pruning.models.anatomy import HEADS, Anatomy

from .controls import DRAWS, random_neurons, random_subspaces
from .lsar import LSAR


def components_of(
    anatomy: Anatomy,
    projections: Sequence[tuple[int, str]],
    subspaces: Sequence[LSAR],
    language_neurons: Mapping[int, Sequence[int]] | None = None,
    *,
    errors: Sequence[np.ndarray] | None = None,
    rates: np.ndarray | None = None,
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
    return found
