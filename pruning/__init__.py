"""Pruning backend: calibration text → scores → masks → a pruned variant on disk."""

from __future__ import annotations

from .anatomy import ROLES, Anatomy, supported_architectures
from .architectures import Experts, Fused, Layout, register_architecture
from .calibration import CalibrationSet
from .errors import PrunescopeError
from .masks import MaskSet
from .methods import Method, known_methods, register
from .models import load_model
from .patterns import known_patterns
from .recipes import Recipe
from .remedy import Remedy
from .text import Corpus, Segment, text_source
from .variants import Variant, prune

__all__ = [
    "ROLES",
    "Anatomy",
    "CalibrationSet",
    "Corpus",
    "Experts",
    "Fused",
    "Layout",
    "MaskSet",
    "Method",
    "PrunescopeError",
    "Recipe",
    "Remedy",
    "Segment",
    "Variant",
    "known_methods",
    "known_patterns",
    "load_model",
    "prune",
    "register",
    "register_architecture",
    "supported_architectures",
    "text_source",
]
