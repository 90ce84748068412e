"""The engine that runs a grid of recipes and calibration sets on one model."""

from __future__ import annotations

from .jobs import Job, Schedule, check_fits, planned_jobs
from .sweep import Pruned, Swept, sweep
from .workspace import Workspace

__all__ = ["Job", "Pruned", "Schedule", "Swept", "Workspace", "check_fits", "planned_jobs", "sweep"]
