"""Analysis: what was read of dense and pruned models → tidy frames → figures → report."""

from __future__ import annotations

from . import frames
from .frames import read_frame, write_frame
from .metrics import accuracy, contrasts, lape, lsar, mask_overlap, perplexity, recovery, signal
from .metrics.lsar import LSAR
from .plots import style as figures
from .study.configuration import Study, demo_study, load_study
from .study.run import run_study

__all__ = [
    "LSAR",
    "Study",
    "accuracy",
    "contrasts",
    "demo_study",
    "figures",
    "frames",
    "lape",
    "load_study",
    "lsar",
    "mask_overlap",
    "perplexity",
    "read_frame",
    "recovery",
    "run_study",
    "signal",
    "write_frame",
]
