"""Plots: from a tidy frame to a figure; one file for each metric, one function for each figure.

Every function takes a frame, the recipe whose variants it shows (one of :func:`analysis.frames.recipes_of`), and
``width`` in inches, and returns a matplotlib ``Figure``.
"""

from __future__ import annotations

from . import (
    accuracy,
    combined,
    contrasts,
    crossing,
    dose,
    geometry,
    lape,
    lens,
    lsar,
    mask_overlap,
    perplexity,
    recipe_contrasts,
    recovery,
    routing,
    signal,
    task_contrasts,
)
from .style import COLUMN_WIDTH, FORMATS, PAGE_WIDTH, colour, font_size, save

__all__ = [
    "COLUMN_WIDTH",
    "FORMATS",
    "PAGE_WIDTH",
    "accuracy",
    "colour",
    "combined",
    "contrasts",
    "crossing",
    "dose",
    "font_size",
    "geometry",
    "lape",
    "lens",
    "lsar",
    "mask_overlap",
    "perplexity",
    "recipe_contrasts",
    "recovery",
    "routing",
    "save",
    "signal",
    "task_contrasts",
]
