"""Signal: how far pruning moves the output of every projection and the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from probes import DENSE, Readings
from probes.readers.signal import SIGNAL_SITES
from pruning.models.anatomy import CONTEXT_ROLES

from ..frames import tidy
from ..stats.bootstrap import segment_interval

#: Which sites have a value for each token that the encoder read, not the decoder.
_OF_THE_ENCODER = [SIGNAL_SITES.index(role) for role in CONTEXT_ROLES]


def analyze(readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``signal``: error and signal-to-noise ratio by layer and role (``residual`` for the stream).

    Readings are opened one at a time; of one, the sums of all blocks and sites are held: 0.5 MB at 32 blocks and 128
    segments, and some 20 MB of resampled values while intervals are taken.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; the dense model has no rows.
    columns
        Variant to the columns that describe it.
    """
    rows = []
    for (variant, language), read in readings.items():
        if variant == DENSE:
            continue
        segments = len(read.error)
        there = ~read.power.isnan().all(dim=0)  # a model without gates, or with experts, lacks some sites
        layer, site = (index.numpy() for index in there.nonzero(as_tuple=True))
        error = read.error[:, there].numpy()
        power = read.power[:, there].numpy()
        tokens = read.tokens[torch.from_numpy(layer)].T.numpy().astype(np.float64)  # [segments, sites]
        crossing = np.isin(site, _OF_THE_ENCODER)
        if crossing.any():
            tokens[:, crossing] = read.context[:, None]

        def of(
            weights: np.ndarray,
            error: np.ndarray = error,
            power: np.ndarray = power,
            tokens: np.ndarray = tokens,
        ) -> np.ndarray:
            lost = weights @ error
            with np.errstate(divide="ignore"):  # no error at all: an infinite ratio
                ratio = 10 * np.log10(weights @ power / lost)
            return np.concatenate([lost / (weights @ tokens), ratio], axis=-1)

        value, low, high = segment_interval(of, segments)
        rows.append(
            {
                **columns[variant],
                "language": language,
                "layer": np.tile(layer, 2),
                "role": [SIGNAL_SITES[i] for i in site] * 2,
                "metric": ["error"] * len(site) + ["snr_db"] * len(site),
                "value": value,
                "low": low,
                "high": high,
                "n": segments,
            }
        )
    return tidy("signal", rows)
