"""Methods that prune or quantize: pure functions of weights and statistics. Weights with the lowest scores go.

To add a method, add a file here that calls :func:`register`, and import it below.
"""

from __future__ import annotations

from .registry import Coded, Method, Solved, known_methods, method_named, register

from . import (  # isort: skip  (they register themselves)
    awq,
    block_influence,
    flap,
    gblm,
    gptq,
    grasp,
    m_wanda,
    magnitude,
    random,
    ria,
    rtn,
    snip,
    sparsegpt,
    wanda,
    wanda_sp,
)

__all__ = [
    "Coded",
    "Method",
    "Solved",
    "awq",
    "block_influence",
    "flap",
    "gblm",
    "gptq",
    "grasp",
    "known_methods",
    "m_wanda",
    "magnitude",
    "method_named",
    "random",
    "register",
    "ria",
    "rtn",
    "snip",
    "sparsegpt",
    "wanda",
    "wanda_sp",
]
