"""Analysis: what was read of dense and pruned models → tidy frames → figures → report."""

from __future__ import annotations

from . import contrasts, figures, frames, lape, lsar, mask_overlap, perplexity, signal
from .frames import read_frame, write_frame
from .lsar import LSAR
from .run import run_study
from .study import Study, demo_study, load_study

__all__ = [
    "LSAR",
    "Study",
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
    "run_study",
    "signal",
    "write_frame",
]
