"""Random controls that are like what they are compared with in all but what is in question.

A random subspace of the language-specific subspace's rank carries a small fraction of its pruning error, and random
neurons fire far less than those that a rule on firing has selected: restoring either must recover little, whatever the
damage. So subspaces are matched in rank and in the variance of the pruning error that they carry (dense minus pruned
mean states of held-out segments), neurons in block and firing rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

#: Draws of every control.
DRAWS = 20
#: Others that fire most nearly as often, among which a neuron's control is drawn.
_NEAREST = 20
#: Strongest preference for the directions in which the error is large.
_STEEPEST = 8.0
#: Strongest preference for those in which it is small.
_FLATTEST = -4.0


@dataclass(frozen=True)
class RandomSubspace:
    """A random subspace outside another one.

    Attributes
    ----------
    basis
        Orthonormal columns, float64 ``[hidden, rank]``.
    error_ratio
        Variance of the pruning error in it over that in the subspace that it is matched to; nan if it was not matched.
    """

    basis: np.ndarray
    error_ratio: float


def random_subspaces(
    basis: Float[np.ndarray, "hidden rank"],
    errors: Float[np.ndarray, "segments hidden"] | None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Iterator[RandomSubspace]:
    """Draw random subspaces of the same rank orthogonal to `basis`, with as much variance of the pruning error.

    Directions are Gaussian with covariance Cᵗ, C that of the error outside `basis`: t = 0 prefers none, a large t those
    with most error, a negative one those with least. t is set, draw by draw, so that the subspace carries as much error
    as `basis` does. Where no t does, the nearest is taken, and the ratio says so.

    Parameters
    ----------
    basis
        Orthonormal columns.
    errors
        Dense minus pruned states. Without them the subspaces are matched in rank alone.
    draws, seed
        How many, and which.
    """
    rng = np.random.default_rng(seed)
    hidden, rank = basis.shape

    def outside(values: np.ndarray) -> np.ndarray:
        return values - basis @ (basis.T @ values)

    if errors is None or not np.any(errors):
        for _ in range(draws):
            yield RandomSubspace(np.linalg.qr(outside(rng.normal(size=(hidden, rank))))[0], np.nan)
        return
    errors = errors.astype(np.float64)
    target = float(np.square(errors @ basis).sum())
    rest = outside(errors.T).T
    _, singular, right = np.linalg.svd(rest, full_matrices=False)
    singular = singular[singular > 1e-9 * max(singular.max(), 1e-300)]
    right = right[: len(singular)]
    floor = singular.min(initial=1.0) / max(singular.max(initial=1.0), 1e-300) / 10

    def drawn(noise: np.ndarray, steepness: float) -> np.ndarray:
        weights = (singular / singular.max()) ** steepness
        inside = right @ noise
        least = floor**steepness
        return np.linalg.qr(outside(right.T @ (weights[:, None] * inside) + least * (noise - right.T @ inside)))[0]

    def carried(found: np.ndarray) -> float:
        return float(np.square(rest @ found).sum())

    for _ in range(draws):
        noise = outside(rng.normal(size=(hidden, rank)))
        if not len(singular):
            yield RandomSubspace(np.linalg.qr(noise)[0], 0.0)
            continue
        gaps = [carried(drawn(noise, t)) - target for t in (_FLATTEST, _STEEPEST)]
        if gaps[0] >= 0 or gaps[1] <= 0:
            steepness = _FLATTEST if gaps[0] >= 0 else _STEEPEST
        else:
            gap = partial(lambda noise, t: carried(drawn(noise, t)) - target, noise)
            steepness = brentq(gap, _FLATTEST, _STEEPEST, xtol=1e-3)
        found = drawn(noise, steepness)
        yield RandomSubspace(found, carried(found) / target if target else np.nan)


def random_neurons(
    chosen: Mapping[int, Sequence[int]],
    neurons: int,
    rates: Float[np.ndarray, "layers neurons"] | None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Iterator[dict[int, Tensor]]:
    """Draw for each chosen neuron another one of its block, among those that fire most nearly as often.

    Parameters
    ----------
    chosen
        Neurons by block.
    neurons
        Number of neurons of a block.
    rates
        How often each fires in the dense model. Without them any other neuron of the block is drawn.
    draws, seed
        How many, and which.
    """
    rng = np.random.default_rng(seed)
    near: dict[int, list[np.ndarray]] = {}
    for layer, own in chosen.items():
        others = np.setdiff1d(np.arange(neurons), np.asarray(own, dtype=np.int64))
        for neuron in own:
            if rates is None:
                near.setdefault(layer, []).append(others)
                continue
            apart = np.abs(rates[layer][others] - rates[layer][neuron])
            # so many that twenty are left when the other controls of the block are drawn among them
            nearest = others[np.argsort(apart, kind="stable")][: len(own) - 1 + _NEAREST]
            near.setdefault(layer, []).append(nearest)
    for _ in range(draws):
        found = {}
        for layer, candidates in near.items():
            taken: set[int] = set()
            for nearest in candidates:
                free = [int(i) for i in nearest if int(i) not in taken]
                if free:
                    taken.add(int(rng.choice(free if rates is None else free[:_NEAREST])))
            found[layer] = torch.tensor(sorted(taken), dtype=torch.int64)
        yield found
