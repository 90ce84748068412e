"""Pruning backend: calibration text → scores → masks → a pruned variant on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names
from .neighbours import check_neighbours

if TYPE_CHECKING:
    from .errors import PrunescopeError
    from .methods import Method, known_methods, register
    from .models.anatomy import ROLES, Anatomy, supported_architectures
    from .models.layouts import Experts, Fused, Layout, register_architecture
    from .models.loading import load_model
    from .patterns import known_patterns
    from .recipes import Recipe
    from .remedy import Remedy
    from .runner import PruningRun, SetAsideWarning, prune
    from .subspaces import Subspaces
    from .text.calibration import CalibrationSet
    from .text.sources import Corpus, Segment, text_source
    from .variants.masks import MaskSet
    from .variants.variant import Variant
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

check_neighbours()

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
    "PruningRun",
    "Recipe",
    "Remedy",
    "Segment",
    "SetAsideWarning",
    "Subspaces",
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
