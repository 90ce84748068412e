"""What the report knows of a study beside its frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pruning import CalibrationSet, Recipe


@dataclass(frozen=True)
class ReportFacts:
    """What the frames do not say.

    Attributes
    ----------
    model
        Its name.
    languages
        That were evaluated.
    sets, recipes
        Calibration sets and recipes of the variants.
    imported
        Name of each model made elsewhere to its source, and what was found to be done to it.
    set_aside
        Name of every variant that could not be made to the reason.
    segments, fit_segments
        Held-out segments, and segments that subspaces were fitted on, of each language.
    rank
        Dimensions of the language-specific subspaces.
    skip_first
        Whether the first token of each segment does not count.
    heldout_tokens
        Tokens of each language that count.
    blocks, neurons
        Of the model: blocks, and MLP neurons that were read in all.
    versions
        Of the libraries.
    """

    model: str
    languages: Sequence[str]
    sets: Sequence[CalibrationSet]
    recipes: Sequence[Recipe]
    imported: Mapping[str, str]
    set_aside: Mapping[str, str]
    segments: int
    fit_segments: int
    rank: int
    skip_first: bool
    heldout_tokens: Mapping[str, int]
    blocks: int
    neurons: int
    versions: Mapping[str, str]


def described_text(facts: ReportFacts, encoder: int) -> str:
    """Say on which text models were evaluated."""
    tokens = from_to(facts.heldout_tokens.values())
    halved = ", each read whole by the encoder; the decoder predicts its second half from the encoded first half"
    return (
        f"{facts.segments} held-out segments per language ({tokens} tokens), disjoint from the "
        f"calibration and fitting text{halved if encoder else ''}"
    )


def from_to(numbers: Iterable[int]) -> str:
    """Return the range of some numbers, in words.

    >>> from_to([312, 300]), from_to([8, 8])
    ('300 to 312', '8')
    """
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
