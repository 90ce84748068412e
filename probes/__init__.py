"""Probes: what goes on inside a model, read through nnsight and reduced on the way."""

from __future__ import annotations

from .choices import ChoiceScores, item_questions, score, text_questions
from .hidden_states import PooledStates
from .items import Item, ItemSource, first_twins
from .loss import TokenLoss
from .neurons import NeuronFiring
from .patching import Component, DamagedModel, attribute, patch
from .readings import DENSE, Readings, pooled_states, read_against_dense
from .session import Batch, Reader, Session
from .signal import DenseSignal, SignalError

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
