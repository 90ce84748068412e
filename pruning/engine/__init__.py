"""The engine that carries out a grid of recipes and calibration sets on one model."""

from __future__ import annotations

from .jobs import Job, Schedule, check_fits
from .sweep import Pruned, sweep
from .workspace import Workspace

__all__ = ["Job", "Pruned", "Schedule", "Workspace", "check_fits", "sweep"]
