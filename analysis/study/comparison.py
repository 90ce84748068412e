"""The study that compares a model pruned elsewhere with its dense parent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pruning.text.sources import BUNDLED_LANGUAGES

from .configuration import LONGEST_NAME, StudyConfig, taken_names
from .sections import EvaluationConfig, TextConfig
from .study_file import parse_study


def comparison_study(
    dense: str,
    pruned: str,
    *,
    languages: Sequence[str] = BUNDLED_LANGUAGES,
    text: str = "bundled",
    segments: int = EvaluationConfig.model_fields["segments"].default,
) -> StudyConfig:
    """Return the study that compares a model pruned elsewhere with its dense parent.

    Parameters
    ----------
    dense, pruned
        Hub ids or folders with checkpoints; ``"demo"`` for the embedded model.
    languages
        BCP-47 tags.
    text
        Source of all text.
    segments
        Number of held-out segments per language, and of parallel segments to fit the subspaces.

    Raises
    ------
    StudyError
        If one of the arguments is invalid.
    """
    name = re.sub(r"[^\w.+=-]+", "_", Path(pruned).name).strip("_").lstrip(".+=-")[:LONGEST_NAME] or "pruned"
    if name in taken_names():  # the user did not choose the name, so this cannot be an error
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
