"""Pruning methods: pure functions of a weight and statistics. The higher the score, the more a weight matters.

To add a method, add a file here that calls :func:`register`, and import it below.
"""

from __future__ import annotations

from .registry import Method, Solved, known_methods, method_named, register

from . import gblm, grasp, m_wanda, magnitude, random, ria, snip, sparsegpt, wanda, wanda_sp  # isort: skip  (they register themselves)

__all__ = [
    "Method",
    "Solved",
    "gblm",
    "grasp",
    "known_methods",
    "m_wanda",
    "magnitude",
    "method_named",
    "random",
    "register",
    "ria",
    "snip",
    "sparsegpt",
    "wanda",
    "wanda_sp",
]
