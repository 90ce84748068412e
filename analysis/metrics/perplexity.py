"""Perplexity: how well each model predicts held-out text of each language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from probes import Readings

from ..frames import tidy
from ..stats.bootstrap import segment_interval


def analyze(readings: Mapping[tuple[str, str], Readings], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``perplexity``. Readings are opened one at a time, and three numbers a segment taken of each.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read; the dense model is the variant ``"dense"``.
    columns
        Variant to the columns that describe it.
    """
    rows = []
    for (variant, language), read in readings.items():
        data = np.stack([read.nll, read.predicted, read.utf8_bytes], axis=1).astype(np.float64)

        def of(weights: np.ndarray, data: np.ndarray = data) -> np.ndarray:
            nll, predicted, utf8 = np.moveaxis(weights @ data, -1, 0)
            return np.stack([np.exp(nll / predicted), nll / np.log(2) / utf8], axis=-1)

        value, low, high = segment_interval(of, len(data))
        row = {**columns[variant], "language": language, "n": len(data)}
        row |= {"metric": ["perplexity", "bits_per_byte"], "value": value, "low": low, "high": high}
        rows.append(row)
    return tidy("perplexity", rows)
