"""Analysis: what was read of dense and pruned models → tidy frames → figures → report."""

from __future__ import annotations

from . import frames, plots, report, stats
from .frames import read_frame, write_frame
from .interactive import Look, Results, Study, look
from .metrics import (
    accuracy,
    contrasts,
    geometry,
    lape,
    lens,
    lens_margins,
    lsar,
    mask_overlap,
    perplexity,
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

__all__ = [
    "LSAR",
    "Look",
    "Results",
    "Study",
    "StudyConfig",
    "accuracy",
    "contrasts",
    "demo_study",
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
    "recovery",
    "report",
    "routing",
    "run_study",
    "signal",
    "stats",
    "task_contrasts",
    "write_frame",
]
