"""The study that measures one model that was pruned elsewhere against its dense parent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pruning.text.sources import BUNDLED_LANGUAGES

from .configuration import LONGEST_NAME, Study, taken_names
from .sections import EvaluationConfig, TextConfig
from .study_file import parse_study


def comparison_study(
    dense: str,
    pruned: str,
    *,
    languages: Sequence[str] = BUNDLED_LANGUAGES,
    text: str = "bundled",
    segments: int = EvaluationConfig.model_fields["segments"].default,
) -> Study:
    """Return the study that measures one model that was pruned elsewhere against its dense parent.

    Parameters
    ----------
    dense, pruned
        Hub ids or folders with checkpoints; ``"demo"`` for the embedded model.
    languages
        BCP-47 tags.
    text
        Where all text comes from.
    segments
        Held-out segments a language, and parallel ones to fit the subspaces.

    Raises
    ------
    StudyError
        If one of these cannot be.
    """
    name = re.sub(r"[^\w.+=-]+", "_", Path(pruned).name).strip("_").lstrip(".+=-")[:LONGEST_NAME] or "pruned"
    if name in taken_names():  # nobody was asked for a name here, so nobody is told to choose another
        name += "-checkpoint"
    return parse_study(
        {
            "model": dense,
            "languages": list(languages),
            "text": dict.fromkeys(TextConfig.model_fields, text),
            "calibration": {"sets": []},
            "recipes": [],
            "imported": {name: pruned},
            "evaluation": {"segments": segments, "fit_segments": segments},
        },
        "compare",
    )
