"""Benchmarks: dense and pruned models in EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from .evaluation import ask, evaluate
from .folder import bundled_task_folder
from .presets import PRESET, STUDY_BENCHMARKS, named_tasks, preset
from .tasks import Task, check_known, known_tasks, load_tasks

__all__ = [
    "PRESET",
    "STUDY_BENCHMARKS",
    "Task",
    "ask",
    "bundled_task_folder",
    "check_known",
    "evaluate",
    "known_tasks",
    "load_tasks",
    "named_tasks",
    "preset",
]
