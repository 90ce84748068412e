"""Simulated states in which it is known what happened to what tells languages apart, and the verdicts given on them.

A state is what its segment says in any language (with a spectrum that falls, as real states have it), what only this
language's version adds, and the place of its language, in a subspace of one dimension less than there are languages.
Every layer is another simulation, so one call of the analysis judges many. Directions are axes: turning both models
changes nothing (``tests/analysis/metrics/test_geometry.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from analysis.frames import dense_columns
from analysis.metrics import geometry
from probes import DENSE, Readings

LANGUAGES = 5
RANK = LANGUAGES - 1
#: Distance of the places of two languages from each other, over √2; the rest has about 1.2 in each direction.
PLACED = 6.0
_AT_ONCE = 20


def _turned(states: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the planted subspace out of itself, each axis towards one outside."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    found = states.copy()
    inside, outside = states[..., :RANK], states[..., RANK : 2 * RANK]
    found[..., :RANK], found[..., RANK : 2 * RANK] = cosine * inside - sine * outside, sine * inside + cosine * outside
    return found


#: Name to what is done to the states, given the places; a little error of pruning comes on top.
PLANTED: dict[str, tuple[float, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "unchanged": (0.3, lambda states, places: states),
    "unchanged, noisier": (1.0, lambda states, places: states),
    "rotated by 90°": (0.3, lambda states, places: _turned(states, 90)),
    "rotated by 45°": (0.3, lambda states, places: _turned(states, 45)),
    "lost": (0.3, lambda states, places: states - places),
    "lost to a fifth": (0.3, lambda states, places: states - 0.8 * places),
    "rotated by 45° and lost to a fifth": (0.3, lambda states, places: _turned(states - 0.8 * places, 45)),
}


def verdict_rates(
    segments: int, hidden: int, runs: int, seed: int = 0, planted: tuple[str, ...] = tuple(PLANTED)
) -> pd.DataFrame:
    """Return how often each verdict is given on what was planted, ``[planted, verdicts]``."""
    rng = np.random.default_rng(seed)
    counts = pd.DataFrame(0, index=list(planted), columns=list(geometry.VERDICTS))
    done = 0
    while done < runs:
        layers = min(_AT_ONCE, runs - done)
        for name, found in _verdicts(segments, hidden, layers, rng, planted).items():
            counts.loc[name] += found.value_counts().reindex(counts.columns, fill_value=0)
        done += layers
    return counts / runs


def wrongly(rates: pd.Series, name: str) -> float:
    """Return how often a verdict was wrong: it said something, and not what was planted."""
    truth = {"unchanged": geometry.UNCHANGED, "rotated": geometry.ROTATED, "lost": geometry.LOST}
    right = geometry.LOST if "lost" in name else truth[name.split()[0].rstrip(",")]
    return float(rates.drop([right, geometry.UNDECIDED]).sum())


def _verdicts(
    segments: int, hidden: int, layers: int, rng: np.random.Generator, planted: tuple[str, ...]
) -> dict[str, pd.Series]:
    shape = layers, segments, hidden
    spectrum = rng.permuted(np.tile(np.geomspace(2, 0.5, hidden), (layers, 1)), axis=1)
    said = rng.standard_normal(shape) * spectrum[:, None]
    corners = np.linalg.qr(np.ones((LANGUAGES, 1)), mode="complete")[0][:, 1:]  # centred, and equally far apart
    turns = np.linalg.qr(rng.standard_normal((layers, RANK, RANK)))[0]
    names = [f"l{number}" for number in range(LANGUAGES)]
    columns = {DENSE: dense_columns("m")}
    columns |= {name: columns[DENSE] | {"method": "planted", "calibration": name} for name in planted}
    readings = {}
    for number, language in enumerate(names):
        places = np.zeros((layers, 1, hidden))
        places[..., :RANK] = PLACED * (corners[number] @ turns)[:, None]
        states = said + 0.7 * rng.standard_normal(shape) + places
        readings[DENSE, language] = _reading(states)
        for name in planted:
            noise, change = PLANTED[name]
            readings[name, language] = _reading(change(states, places) + noise * rng.standard_normal(shape))
    ids = {language: [str(k) for k in range(segments)] for language in names}
    found = geometry.verdicts(geometry.analyze(readings, columns, ids))
    found = found[found["layer"].notna()]
    return {name: found[found["calibration"].astype(str) == name]["verdict"] for name in planted}


def _reading(states: np.ndarray) -> Readings:
    zero = torch.zeros(1)
    return Readings(torch.from_numpy(states).float(), zero, zero, zero, zero, zero, zero, zero)
