"""Lenses: what each model would predict after every block, and in which language.

A block's prediction is that of its states through the final norm and the head, as if no block followed: as they are
(logit lens), or translated by an affine map that was fitted on the dense model (tuned lens). It is compared
with the dense model's final one. In early blocks the lens itself misses much: states are not yet in the basis that the
head reads, so that their divergence is large in the dense model too. What pruning did is therefore the change from the
dense model's prediction after the same block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from probes import DENSE, LensReadings
from probes.lens import LENSES
from probes.readers.lens import LENS_SUMS

from ..frames import tidy
from ..stats.bootstrap import segment_interval

#: Names of the metrics of :data:`probes.readers.lens.LENS_SUMS`.
_METRICS = {"kl": "kl", "entropy": "entropy", "loss": "next_token_loss", "agreement": "agreement"}

#: Metric and kind of tokens to sums over the positions of each segment.
_Estimates = dict[tuple[str, str | None], Float[np.ndarray, "segments layers"]]
_Sums = Float[np.ndarray, "segments layers sums"]


def analyze(
    readings: Mapping[tuple[str, str], LensReadings],
    columns: Mapping[str, Mapping[str, Any]],
) -> pd.DataFrame:
    """Return the frame ``lens``; it is empty without readings.

    Intervals are over segments: positions of one segment are not independent.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; the dense model is the variant ``"dense"``.
    columns
        Variant to the columns that describe it.
    """
    rows: list[dict[str, Any]] = []
    if readings:
        first = next(iter(readings.values()))
        vocabulary = first.vocabulary.numpy()
        shares = {"metric": ["vocabulary_share"] * len(vocabulary), "value": vocabulary / vocabulary.sum()}
        rows.append({**columns[DENSE], "other_language": list(first.kinds), **shares})
        for layer, share in zip(first.layers.tolist(), first.explained.tolist(), strict=False):
            where = {"lens": LENSES[1], "layer": layer}
            rows.append({**columns[DENSE], **where, "metric": "translated_share", "value": share})
    for (variant, language), read in readings.items():
        dense = None if variant == DENSE else readings[DENSE, language]
        for number, name in enumerate(LENSES[: len(read.sums)]):
            place = {**columns[variant], "language": language, "lens": name}
            rows += ({**place, **own} for own in _of_lens(read, dense, number, language))
    return tidy("lens", rows)


def _of_lens(read: LensReadings, dense: LensReadings | None, number: int, language: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model in one language through one lens, given the dense model's for a variant."""
    names = read.kinds
    there = (read.sampled > 0).numpy()
    sampled = read.sampled.numpy()[there].astype(np.float64)
    sums, mass = (value[number].numpy().swapaxes(0, 1)[there] for value in (read.sums, read.mass))
    estimates: _Estimates = {(_METRICS[name], None): sums[..., place] for place, name in enumerate(LENS_SUMS)}
    estimates |= {("token_share", kind): mass[..., place] for place, kind in enumerate(names)}
    own = mass[..., names.index(language)]
    others = {kind: mass[..., place] for place, kind in enumerate(names[:-2]) if kind != language}
    estimates |= {("token_share_lead", kind): other - own for kind, other in others.items()}
    if dense is not None:
        before_sums, before_mass = (value[number].numpy().swapaxes(0, 1)[there] for value in (dense.sums, dense.mass))
        estimates["kl_change", None] = (sums - before_sums)[..., LENS_SUMS.index("kl")]
        changes = mass - before_mass
        estimates |= {("token_share_change", kind): changes[..., place] for place, kind in enumerate(names)}
    values = _means(np.stack(list(estimates.values()), axis=-1), sampled)
    for place, (metric, kind) in enumerate(estimates):
        value, low, high = (each[:, place] for each in values)
        where = {"layer": read.layers.numpy(), "other_language": kind, "n": int(there.sum())}
        yield {**where, "metric": [metric] * len(value), "value": value, "low": low, "high": high}


def _means(sums: _Sums, sampled: Float[np.ndarray, " segments"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return means over positions with their intervals, each ``[layers, sums]``."""
    flat = sums.reshape(len(sums), -1)
    counted = sampled[:, None]

    def of(weights: np.ndarray) -> np.ndarray:
        found: np.ndarray = (weights @ flat) / (weights @ counted)
        return found

    value, low, high = (each.reshape(sums.shape[1:]) for each in segment_interval(of, len(sums)))
    return value, low, high
