"""What exact patching and its estimates share: directions, tokens, runs whose activations are kept, and the result."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from pruning.models.anatomy import HEADS, ROLES, Anatomy

from ..batches import Batch, TokenClass, within_memory
from ..readers.base import Reader
from ..readers.keep import Keep
from ..scoring import ChoiceScores, Progress, Question, QuestionBatch, ScoreTable, final_states, question_batches
from ..session import Session
from .components import Place, Site
from .damaged import DamagedModel

Direction = Literal["restore", "damage"]
#: Tokens whose activations are patched: those that count, or all of them, the first and special ones too.
Positions = Literal["counted", "all"]
RESTORE: Direction = "restore"
DAMAGE: Direction = "damage"
COUNTED: Positions = "counted"
EVERY: Positions = "all"
#: Bytes of source-run activations held at a time.
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Patched:
    """Scores of the same questions by the dense model, the pruned model, and the patched models.

    Attributes
    ----------
    dense, pruned
        Scores of the two models.
    exact
        Index of the component → scores of the model with it patched.
    attributed
        Index of the component → estimated effect on the objective (:func:`probes.scoring.objective`), float64
        ``[questions]``; for weights only the sum over questions is known, a single value.
    """

    dense: ChoiceScores
    pruned: ChoiceScores
    exact: Mapping[int, ChoiceScores] = field(default_factory=dict)
    attributed: Mapping[int, np.ndarray] = field(default_factory=dict)


@contextmanager
def turned(damage: DamagedModel, pruned: bool) -> Iterator[None]:
    """Context manager within which the model is pruned, or dense as it is."""
    if pruned:
        with damage.damaged():
            yield
    else:
        yield


def sites_of(places: Iterable[Place]) -> dict[Site, None]:
    """Return the sites of some places, each once, in their order."""
    return dict.fromkeys((place.layer, place.site) for place in places)


def patched_tokens(batch: Batch, positions: Positions, tokens: TokenClass | None = None) -> Tensor:
    """Return which tokens are patched, bool ``[batch, tokens]``: all, or those of one class."""
    patched = (batch.counted if positions == COUNTED else batch.real).bool()
    return patched if tokens is None else patched & batch.of_class(tokens)


def run(
    session: Session,
    batch: QuestionBatch,
    scores: ScoreTable,
    sites: Mapping[Site, None],
    progress: Progress,
    outputs: dict[int, Any] | None = None,
    readers: Sequence[Reader] = (),
) -> dict[Site, Tensor]:
    """Score one batch with the model as it is, and return its activations at some sites."""
    keep = Keep(sites)
    final = final_states(session, batch.batch, [keep, *readers], outputs=outputs)
    scores.take(batch, batch.scores(session.anatomy, final))
    progress(batch.batch.n_tokens)
    return keep.values


def groups(
    session: Session,
    questions: Sequence[Question],
    sites: Mapping[Site, None],
    inside: Collection[int] = (),
    smaller: int = 1,
) -> Iterator[list[QuestionBatch]]:
    """Yield groups of batches whose kept activations fit into the memory set aside for them."""
    anatomy = session.anatomy
    width = sum(anatomy.hidden_size * int(anatomy.config.num_experts_per_tok) for _ in inside)
    width += sum(_width(anatomy, *site) for site in sites) + len(anatomy.blocks) * anatomy.hidden_size
    batches = question_batches(session, questions, smaller)
    tokens = [max(batch.batch.ids.numel(), batch.batch.last.ids.numel()) for batch in batches]
    sizes = [number * width * anatomy.element_size for number in tokens]
    return within_memory(batches, sizes, _KEPT_BYTES)


def _width(anatomy: Anatomy, layer: int, site: str) -> int:
    if site in ROLES:
        return anatomy.shape(layer, site)[0]
    if site in HEADS:
        return anatomy.shape(layer, HEADS[site])[1]
    return anatomy.n_neurons if site == "activation" else anatomy.hidden_size
