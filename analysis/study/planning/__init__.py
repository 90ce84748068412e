"""What a study will cost before it is run: memory, disk, time by stage, and a schedule over several workers."""

from __future__ import annotations

from .pace import Figures
from .plan import StudyPlan, plan_study
from .tables import plan_text

__all__ = ["Figures", "StudyPlan", "plan_study", "plan_text"]
