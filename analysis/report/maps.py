"""What diagnoses of one variant in several languages have in common, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from ..metrics.maps import likeness, shared, summary
from .recovery import describe

_NAMES = {"weights": "weights", "output": "outputs", "head": "heads"}
#: Components that are listed.
_LISTED = 3


def map_findings(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """Say how alike the maps of several languages are, and what they have in common.

    Parameters
    ----------
    frames
        Language to the frame ``recovery`` of one diagnosis in it; all of one variant and category.
    """
    said = []
    for kind, table in likeness(frames).items():
        between, low, high, within = summary(table)
        said.append(f"{_NAMES[kind]} {between:.2f} [{low:.2f}, {high:.2f}], a language with itself {within:.2f}")
    if not said:
        return []
    return [
        f"Agreement between the maps of {len(frames)} languages, one on the first half of its questions and the other "
        f"on the second (Spearman's ρ: mean over pairs, with the lowest and the highest): {'; '.join(said)}.",
        *_common(frames),
    ]


def _common(frames: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    for kind in ("weights", "output"):
        table = shared(frames, kind).head(_LISTED)
        rows = [{"component": kind, "layer": layer, "role": role} for layer, role in table.index]
        listed = [f"{describe(row)} ({of} of {len(frames)})" for row, of in zip(rows, table["languages"], strict=True)]
        if listed:
            yield (
                f"What recovers most on average over languages, as gradients estimate it ({_NAMES[kind]}; in brackets, "
                f"the number of languages in which it recovers something on both halves): {'; '.join(listed)}."
            )
