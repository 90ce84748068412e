"""Agreement of codes: do different calibration texts round weights to the same values?

It is to quantized models what mask overlap is to pruned ones. A code says to which value of its grid a weight was
rounded; where grids follow the text, those of two variants differ too, and equal codes need not be equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from pruning.projections import Key
from pruning.text.calibration import Drawn
from pruning.variants.codes import CodeSet

from ..frames import alike, tidy
from .mask_overlap import of_pairs

#: Codes of each variant that are compared at a time.
_AT_A_TIME = 1 << 20


def analyze(
    codes: Mapping[str, CodeSet],
    columns: Mapping[str, Mapping[str, Any]],
    text: Mapping[str, Sequence[Drawn]] | None = None,
) -> pd.DataFrame:
    """Return the rows of ``mask_overlap`` on every two quantized variants that differ in calibration set or seed only.

    Parameters
    ----------
    codes
        Variant to its codes.
    columns
        Variant to the columns that describe it.
    text
        Variant to the calibration text that it was made with, as far as it is known.
    """
    text = text or {}
    rows: list[dict[str, Any]] = []
    for group in alike({name: columns[name] for name in codes}):
        members = [codes[name] for name in group]
        found = {key: _agreement(members, key) for key in members[0]} if len(group) > 1 else {}
        rows += of_pairs(group, columns, text, ("code_agreement", "code_agreement_chance"), found)
    return tidy("mask_overlap", rows)


def _agreement(
    members: Sequence[CodeSet], key: Key
) -> tuple[Float[np.ndarray, "variants variants"], Float[np.ndarray, "variants variants"]]:
    """Return the share of equal codes of every pair in one projection, and that expected of independent codes."""
    outputs, inputs = members[0].shape(key)
    step = max(_AT_A_TIME // inputs, 1)
    equal = np.zeros((len(members), len(members)))
    frequency = np.zeros((len(members), 256))
    for start in range(0, outputs, step):
        codes = [one.rows(key, start, start + step).unpacked().codes.numpy() for one in members]
        frequency += [np.bincount(some.ravel(), minlength=256) for some in codes]
        for i, j in combinations(range(len(members)), 2):
            equal[i, j] += np.count_nonzero(codes[i] == codes[j])
    frequency /= outputs * inputs
    return equal / (outputs * inputs), frequency @ frequency.T
