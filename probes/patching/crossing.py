"""States of other questions put in at the last token of the prompt: what one question's answer is, read in another.

Within one model, a question's residual stream after a block is replaced, at the last token of its prompt alone, by that
of another question, which may be asked in another language. If the model keeps the answer there in a form that both
languages share, the question is then answered as the other one would be. Where choices begin with the same tokens, it
is the last of these, from which the first token is predicted in which they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batches import Batch
from ..readers.base import Reader
from ..scoring import Progress, Question, QuestionBatch, ScoreTable, final_states, question_batches
from ..session import Session


@dataclass(frozen=True)
class Crossed:
    """Scores of questions with and without the states of others.

    Attributes
    ----------
    layers
        The blocks, int64 ``[layers]``: all, or those of the decoder.
    clean
        Log-likelihoods without, as of :class:`probes.scoring.ChoiceScores`, ``[questions, choices]``.
    patched
        With the states of others after each block, ``[draws, layers, questions, choices]``.
    """

    layers: Int[np.ndarray, " layers"]
    clean: Float[np.ndarray, "questions choices"]
    patched: Float[np.ndarray, "draws layers questions choices"]


def cross(
    session: Session,
    questions: Sequence[Question],
    sources: Sequence[Question],
    chosen: Int[np.ndarray, "draws questions"],
    *,
    progress: Progress = lambda tokens: None,
) -> Crossed:
    """Put the last prompt token's state of other questions into questions, after each block, and score them.

    The model is as it is: dense, or within :meth:`DamagedModel.damaged`. In an encoder-decoder it is the start token of
    the decoder, after each block of that.

    Parameters
    ----------
    session
        The model's session.
    questions
        What is scored.
    sources
        Questions whose states are put in.
    chosen
        Which of the sources each question gets, for one or several draws; each costs a run from every block on.
    progress
        Called with the number of tokens read, after every batch of every run.
    """
    stack = session.anatomy.stacks[-1]
    layers = range(stack.first, stack.stop)
    kept = _last_states(session, sources, layers, progress)
    clean = ScoreTable(questions)
    patched = [[ScoreTable(questions) for _ in layers] for _ in chosen]
    for batch in question_batches(session, questions):
        last = _last_tokens(batch, questions)
        outputs: dict[int, Any] = {}
        clean.take(batch, batch.scores(session.anatomy, final_states(session, batch.batch, outputs=outputs)))
        progress(batch.batch.n_tokens)
        for own, draw in zip(patched, chosen, strict=True):
            wanted = torch.from_numpy(draw[list(batch.batch.segments)]).to(last.device)
            for scores, layer in zip(own, layers, strict=True):
                edit = _PutLast(layer, kept[layer][wanted], last)
                final = final_states(session, batch.batch, edits=[edit], outputs=outputs, start=layer)
                scores.take(batch, batch.scores(session.anatomy, final))
                progress(batch.batch.n_tokens)
    values = np.array([[table.scores.values for table in own] for own in patched])
    return Crossed(np.array(layers), clean.scores.values, values)


def _last_tokens(batch: QuestionBatch, questions: Sequence[Question]) -> Tensor:
    """Return the place of the token that decides between the choices in each row of a batch, int64 ``[rows]``."""
    read = batch.batch.last
    before = [_deciding(questions[i]) for i in read.segments]
    return read.real.argmax(dim=1) + torch.tensor(before, device=read.real.device)


def _deciding(question: Question) -> int:
    """Return the position of the last token that all choices share: of the prompt, or of the choices."""
    predicted: dict[int, list[int]] = {}
    for _, position, token, _ in question.targets:
        predicted.setdefault(position, []).append(token)
    return min(
        position
        for position, tokens in predicted.items()
        if len(tokens) < question.choices or len(set(tokens)) > 1  # a choice may be the beginning of another
    )


def _last_states(
    session: Session, questions: Sequence[Question], layers: Sequence[int], progress: Progress
) -> dict[int, Tensor]:
    """Return each question's state at its last prompt token after each block, ``[questions, hidden]``."""
    kept: dict[int, Tensor] = {}
    for batch in question_batches(session, questions):
        reader = _KeepLast(layers, _last_tokens(batch, questions))
        final_states(session, batch.batch, [reader])
        progress(batch.batch.n_tokens)
        for layer, (owners, states) in reader.values.items():
            whole = kept.setdefault(layer, states.new_empty(len(questions), states.shape[1]))
            whole[owners] = states
    return kept


class _KeepLast(Reader):
    """Keeps the states of one batch at one token of each question's first row; up to there all rows are alike."""

    sites = frozenset({"residual"})

    def __init__(self, layers: Sequence[int], last: Tensor) -> None:
        self._layers = frozenset(layers)
        self._last = last
        self.values: dict[int, tuple[list[int], Tensor]] = {}

    def wants(self, layer: int, site: str) -> bool:
        """Whether it keeps a site of a block."""
        return site == "residual" and layer in self._layers

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        """Keep one block's states."""
        first = {owner: row for row, owner in reversed(list(enumerate(batch.segments)))}
        rows = list(first.values())
        self.values[layer] = list(first), value[rows, self._last[rows]].clone()


@dataclass(frozen=True, eq=False)
class _PutLast:
    """An edit that puts states in at one token of each row."""

    layer: int
    states: Tensor
    last: Tensor
    site: str = "residual"

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        changed = value.clone()
        changed[torch.arange(len(value), device=value.device), self.last] = self.states.to(value)
        return changed
