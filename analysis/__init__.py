"""Analysis: what was read of dense and pruned models → tidy frames → figures → report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

try:
    from pruning import lazy_names
except ImportError as error:
    if error.name != "pruning":  # which is there, but is not prunescope's
        raise
    raise ImportError(
        f'{sys.modules["pruning"]!r} hides prunescope\'s own package "pruning"; rename it, or start Python in another '
        "folder (and take this one out of PYTHONPATH)"
    ) from error

if TYPE_CHECKING:
    from . import frames, plots, report, stats
    from .frames import read_frame, write_frame
    from .interactive import Results, Study
    from .interactive.look import Look, look
    from .metrics import (
        accuracy,
        contrasts,
        dose,
        geometry,
        lape,
        lens,
        lens_margins,
        lsar,
        mask_overlap,
        perplexity,
        recipe_contrasts,
        recovery,
        routing,
        signal,
        task_contrasts,
    )
    from .metrics.lsar import LSAR
    from .study.configuration import StudyConfig
    from .study.results import open_readings
    from .study.run import run_study
    from .study.study_file import demo_study, load_study
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "LSAR",
    "Look",
    "Results",
    "Study",
    "StudyConfig",
    "accuracy",
    "contrasts",
    "demo_study",
    "dose",
    "frames",
    "geometry",
    "lape",
    "lens",
    "lens_margins",
    "load_study",
    "look",
    "lsar",
    "mask_overlap",
    "open_readings",
    "perplexity",
    "plots",
    "read_frame",
    "recipe_contrasts",
    "recovery",
    "report",
    "routing",
    "run_study",
    "signal",
    "stats",
    "task_contrasts",
    "write_frame",
]
