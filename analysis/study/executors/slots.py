"""How many workers each node of a cluster has room for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pruning.errors import StudyError

from ..configuration import StudyConfig


@dataclass(frozen=True)
class Node:
    """A node, with the resources that workers may take of it.

    Attributes
    ----------
    id, name
        What identifies it, and its name for people.
    cpus, gpus
        Number of CPUs and GPUs.
    memory
        Bytes of memory; 0 if unknown.
    """

    id: str
    name: str
    cpus: float
    gpus: float
    memory: int


@dataclass(frozen=True)
class Slot:
    """Room for one worker.

    Attributes
    ----------
    node
        The node.
    number
        Which of the node's workers it is, from 0.
    memory
        Bytes of memory that the worker may take.
    """

    node: Node
    number: int
    memory: int

    @property
    def name(self) -> str:
        """Name of the worker."""
        return f"{self.node.name}:{self.number}"


def threads_of_a_worker() -> int:
    """Return how many threads, and so how many CPUs, a worker has: ``OMP_NUM_THREADS``, or one.

    Raises
    ------
    StudyError
        If the variable is no number of threads.
    """
    stated = os.environ.get("OMP_NUM_THREADS") or "1"
    if not stated.isdigit() or int(stated) < 1:
        raise StudyError(f'OMP_NUM_THREADS is "{stated}"; set it to the number of threads that a worker should have')
    return int(stated)


def uses_gpus(study: StudyConfig, nodes: Sequence[Node]) -> bool:
    """Whether a study's units run on GPUs: if it asks for them, or leaves it open and a node has any.

    Raises
    ------
    StudyError
        If it asks for one GPU by its number.
    """
    kind, _, number = study.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or number:
        raise StudyError(
            f'device = "{study.device}" names a device of one machine, and workers are given theirs; '
            'write device = "cuda", "cpu" or "auto"'
        )
    return kind == "cuda" or (kind == "auto" and any(node.gpus >= 1 for node in nodes))


def places(nodes: Sequence[Node], threads: int, *, on_cpu: bool, needed: int, cap: int | None) -> list[Slot]:
    """Return room for as many workers as nodes have CPUs or GPUs for, if their memory holds a model for each.

    Parameters
    ----------
    nodes
        The nodes.
    threads
        CPUs of a worker.
    on_cpu
        Whether workers compute on CPUs; if not, each has a GPU.
    needed
        Bytes that a worker with the whole model needs.
    cap
        Bytes that a worker may take, if the user says so. By default the workers of a node share its memory, and a
        model too large for a node is read from its shards by a single one.
    """
    slots = []
    for node in nodes:
        most = int(node.cpus // threads) if on_cpu else min(int(node.cpus // threads), int(node.gpus))
        by_memory = node.memory // (cap or needed) if node.memory else most
        workers = min(most, max(by_memory, 1))
        for number in range(workers):
            share = node.memory // workers if node.memory else needed
            slots.append(Slot(node, number, min(cap or share, share)))
    return slots
