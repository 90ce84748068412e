"""Probes: what goes on inside a model, read through nnsight and reduced on the way."""

from __future__ import annotations

from .hidden_states import PooledStates
from .loss import TokenLoss
from .neurons import NeuronFiring
from .readings import DENSE, Readings, pooled_states, read_against_dense
from .session import Batch, Reader, Session
from .signal import DenseSignal, SignalError

__all__ = [
    "DENSE",
    "Batch",
    "DenseSignal",
    "NeuronFiring",
    "PooledStates",
    "Reader",
    "Readings",
    "Session",
    "SignalError",
    "TokenLoss",
    "pooled_states",
    "read_against_dense",
]
