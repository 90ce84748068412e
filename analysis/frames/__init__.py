"""Frames: the tidy schema, building and checking frames, and their files."""

from __future__ import annotations

from . import labels
from .added import AddedFrame
from .files import read_frame, write_frame
from .schema import ALL, FRAMES, RECIPE_COLUMNS, STUDY_FRAMES, TEXT, VARIANT_COLUMNS, FrameSpec, Metric
from .tables import Frames, alike, check, dense_columns, joined, of_recipe, recipes_of, series_of, tidy

__all__ = [
    "ALL",
    "FRAMES",
    "RECIPE_COLUMNS",
    "STUDY_FRAMES",
    "TEXT",
    "VARIANT_COLUMNS",
    "AddedFrame",
    "FrameSpec",
    "Frames",
    "Metric",
    "alike",
    "check",
    "dense_columns",
    "joined",
    "labels",
    "of_recipe",
    "read_frame",
    "recipes_of",
    "series_of",
    "tidy",
    "write_frame",
]
