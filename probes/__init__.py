"""Probes: what goes on inside a model, read through nnsight and reduced on the way."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

try:
    from pruning import lazy_names
except ImportError as error:
    if error.name != "pruning":  # which is there, but is not prunescope's
        raise
    raise ImportError(
        f'{sys.modules["pruning"]!r} hides prunescope\'s own package "pruning"; rename it, or start Python in another '
        "folder (and take this one out of PYTHONPATH)"
    ) from error

if TYPE_CHECKING:
    from .batches import Batch
    from .items import Item, ItemSource, some_twins
    from .lens import LensReadings, LensStream, TokenLanguages
    from .lens_margins import LensMargins, MarginStream
    from .lockstep import read_streams
    from .pairs import paired_questions
    from .patching import Component, DamagedModel, attribute, patch
    from .readers.base import Reader
    from .readers.firing import NeuronFiring
    from .readers.hidden_states import PooledStates
    from .readers.keep import Keep
    from .readers.loss import TokenLoss
    from .readers.routing import RouterChoices
    from .readers.signal import SignalError, SignalPower
    from .reading import fit_translators, pooled_states, read_against_dense, read_lens
    from .reading_plan import ReadingPlan, plan_reading
    from .readings import Readings, StoredReadings
    from .routing import Routed
    from .scoring import ChoiceScores, item_questions, score, text_questions
    from .session import Session
    from .streams import DENSE, FittingStream, HeldoutStream, QuestionStream, Together
    from .translators import Translators
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "DENSE",
    "Batch",
    "ChoiceScores",
    "Component",
    "DamagedModel",
    "FittingStream",
    "HeldoutStream",
    "Item",
    "ItemSource",
    "Keep",
    "LensMargins",
    "LensReadings",
    "LensStream",
    "MarginStream",
    "NeuronFiring",
    "PooledStates",
    "QuestionStream",
    "Reader",
    "ReadingPlan",
    "Readings",
    "Routed",
    "RouterChoices",
    "Session",
    "SignalError",
    "SignalPower",
    "StoredReadings",
    "Together",
    "TokenLanguages",
    "TokenLoss",
    "Translators",
    "attribute",
    "fit_translators",
    "item_questions",
    "paired_questions",
    "patch",
    "plan_reading",
    "pooled_states",
    "read_against_dense",
    "read_lens",
    "read_streams",
    "score",
    "some_twins",
    "text_questions",
]
