"""Probes: what goes on inside a model, read through nnsight and reduced on the way."""

from __future__ import annotations

from .items import Item, ItemSource, first_twins
from .patching import Component, DamagedModel, attribute, patch
from .readers.firing import NeuronFiring
from .readers.hidden_states import PooledStates
from .readers.loss import TokenLoss
from .readers.signal import DenseSignal, SignalError
from .reading import DENSE, Readings, pooled_states, read_against_dense
from .scoring import ChoiceScores, item_questions, score, text_questions
from .session import Batch, Reader, Session

__all__ = [
    "DENSE",
    "Batch",
    "ChoiceScores",
    "Component",
    "DamagedModel",
    "DenseSignal",
    "Item",
    "ItemSource",
    "NeuronFiring",
    "PooledStates",
    "Reader",
    "Readings",
    "Session",
    "SignalError",
    "TokenLoss",
    "attribute",
    "first_twins",
    "item_questions",
    "patch",
    "pooled_states",
    "read_against_dense",
    "score",
    "text_questions",
]
