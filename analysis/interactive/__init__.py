"""Results in Python: a study's folder, or a few variants of a loaded model, addressed by what they are."""

from __future__ import annotations

from .look import Look, look
from .results import Results
from .study import Study

__all__ = ["Look", "Results", "Study", "look"]
