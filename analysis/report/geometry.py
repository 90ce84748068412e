"""What the frame ``geometry`` says, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from probes import DENSE

from ..frames import Frames, of_recipe
from ..metrics.geometry import LOST, ROTATED, ROTATED_INSIDE, SCATTERED, TOLERANCE, UNCHANGED, UNDECIDED, verdicts

_WORDS = {
    ROTATED: "rotated (its own subspace has turned away from the dense one, and languages are found in it as before)",
    ROTATED_INSIDE: "rotated within the dense subspace",
    LOST: "lost (languages are found less well in its own subspace and whole state, and their means have come closer)",
    SCATTERED: "scattered (languages are found less well in its own subspace, but as before in the whole state)",
    UNCHANGED: "unchanged",
    UNDECIDED: "undecided (an interval is too wide, or languages are found less well, but their means are no closer)",
}


def geometry_of_dense(frame: pd.DataFrame) -> Iterator[str]:
    """Yield what a linear probe finds in the two parts of the dense model."""
    dense = _means(frame[frame["method"] == DENSE])
    if "own_specific_decoding" in dense:
        guess = 1 / max(frame["language"].nunique(), 1)
        yield (
            "In the dense model, a linear discriminant identifies the language of a segment from the language-specific "
            f"part with {dense['own_specific_decoding']:.0%} accuracy and from the language-agnostic part with "
            f"{dense['own_agnostic_decoding']:.0%} (chance: {guess:.0%}; means over layers; the subspace is estimated, "
            "so some language is left outside of it)."
        )


def geometry_of_recipe(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield whether languages were rotated or lost, as far as the intervals say, and where they are found then."""
    frame = frames["geometry"]
    pruned = of_recipe(frame, recipe)
    after, before = _means(pruned), _means(frame[frame["method"] == DENSE])
    if "own_specific_decoding" not in after:
        return
    found = verdicts(pruned)
    found = found[found["layer"].notna()]["verdict"]
    counts = {name: int((found == name).sum()) for name in _WORDS}
    said = ", ".join(f"{_WORDS[name]} in {count}" for name, count in counts.items() if count)
    few = counts[UNDECIDED] * 2 > len(found)
    more = " More held-out segments would decide more (evaluation.segments)." if few else ""
    yield (
        f"Of {len(found)} cases (each block of each model), what tells languages apart is {said}. Changes of up to "
        f"{100 * TOLERANCE:.0f} points count as none, larger ones only if the whole 95 % interval is beyond.{more}"
    )
    yield (
        f"The language-specific subspaces of pruned and dense model overlap by {after['subspace_overlap']:.2f} (each "
        f"with itself, on other segments: {after['self_overlap']:.2f} and {before['self_overlap']:.2f}; chance: "
        f"{before['overlap_chance']:.2f}). Languages are identified with {after['dense_agnostic_decoding']:.0%} "
        f"accuracy outside the dense model's subspace, with {after['own_agnostic_decoding']:.0%} outside the pruned "
        f"model's own (dense model: {before['own_agnostic_decoding']:.0%}), and with "
        f"{after['own_specific_decoding']:.0%} inside its own (dense model: {before['own_specific_decoding']:.0%})."
    )


def _means(frame: pd.DataFrame) -> pd.Series:
    rows = frame[frame["language"].isna() & frame["layer"].notna()]
    return rows.groupby("metric", observed=True)["value"].mean()
