"""Scoring methods: pure functions of a weight and the statistics of its inputs. The higher, the more it matters.

A method is one file beside this one that calls :func:`register` once, and one line in the imports below.
"""

from __future__ import annotations

from .registry import Method, known_methods, method_named, register

from . import magnitude, wanda  # isort: skip  (they register themselves)

__all__ = ["Method", "known_methods", "magnitude", "method_named", "register", "wanda"]
