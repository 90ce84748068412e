"""Log-likelihoods of the choices of an item, or of a text.

A *question* is what is scored: an item with its choices, or a segment of text, as a question with one choice. Shared
prefixes are read once: a choice that is a prefix of another needs no row of its own, and since the last token of a
choice is never fed to the model, single-token choices share one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruning.errors import StudyError, TextError
from pruning.files import whole_file
from pruning.models.anatomy import Anatomy
from pruning.text.sources import Segment

from .batches import TOKEN_CLASSES, Batch
from .items import Item
from .readers.base import Reader
from .readers.keep import Keep
from .readers.loss import log_likelihood
from .session import Edit, Session

#: Called with the number of tokens that a model has just read.
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Question:
    """Token ids to read, and the tokens to score.

    Attributes
    ----------
    rows
        Token ids of each row; none is a prefix of another.
    targets
        ``(row, position, token, choice)``: the token's log-probability after that position counts towards that choice.
    choices, answer
        Number of choices, and index of the right one.
    source
        Token ids that the encoder of an encoder-decoder reads beside every row, which is the decoder's.
    differing
        Positions of the prompt's tokens that tell an item from its twin, the other one of a minimal pair; None of what
        has no twin (:func:`probes.pairs.paired_questions`).
    """

    rows: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, int, int, int], ...]
    choices: int
    answer: int
    source: tuple[int, ...] = ()
    differing: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens to read."""
        return sum(len(self.source) + len(row) for row in self.rows)

    @property
    def longest(self) -> int:
        """Number of tokens that a row takes at most, with those that the encoder reads."""
        return len(self.source) + max(map(len, self.rows))

    def classes(self) -> tuple[Tensor, list[Tensor]]:
        """Return the class of every token of the source and of each row, as in :attr:`probes.batches.Batch.classes`."""
        tokens = [torch.full((len(row),), -1, dtype=torch.int8) for row in (self.source, *self.rows)]
        if self.differing is not None:
            differing, last, elsewhere = range(len(TOKEN_CLASSES))
            for own in tokens:
                own.fill_(elsewhere)
                own[[place for place in self.differing if place < len(own)]] = differing
            for own in tokens[1:]:
                own[min(position for _, position, *_ in self.targets) :] = last
        return tokens[0], tokens[1:]


@dataclass(frozen=True)
class QuestionBatch:
    """The rows of some whole questions, padded to one length, and what to score in them.

    Attributes
    ----------
    batch
        The rows, in an encoder-decoder with what its encoder reads; ``batch.segments`` says which question each belongs
        to.
    questions
        Which questions these are, in order.
    state
        Row and position of every final state that predicts a target, int64 ``[states, 2]``.
    index, token
        For each target, which of these states predicts it, and its token id, int64 ``[targets]``.
    cell
        For each target, the flat index of its choice in ``[questions, choices]``, int64 ``[targets]``.
    there
        Which choices exist, bool ``[questions, choices]``.
    answers
        Index of the right choice, int64 ``[questions]``.
    """

    batch: Batch
    questions: tuple[int, ...]
    state: Tensor
    index: Tensor
    token: Tensor
    cell: Tensor
    there: Tensor
    answers: Tensor

    def scores(self, anatomy: Anatomy, final: Tensor) -> Tensor:
        """Return the log-likelihood of every choice, given the final states ``[rows, tokens, hidden]``.

        In nats, ``[questions, choices]``, −inf where a question has no such choice. Differentiable.
        """
        hidden = final[self.state[:, 0], self.state[:, 1]]
        found = log_likelihood(anatomy, hidden, self.index, self.token)
        sums = torch.zeros(self.there.numel(), dtype=found.dtype, device=final.device).index_add(0, self.cell, found)
        return sums.view(self.there.shape).masked_fill(~self.there, -torch.inf)


def objective(scores: Tensor, answers: Tensor) -> Tensor:
    """Return the metric for damage, ``[questions]``: the right choice's margin, or a text's log-likelihood."""
    right = scores.gather(1, answers[:, None])[:, 0]
    if scores.shape[1] == 1:
        return right
    return right - scores.scatter(1, answers[:, None], -torch.inf).amax(dim=1)


@dataclass(frozen=True)
class ChoiceScores:
    """The log-likelihood of every choice of some questions.

    Attributes
    ----------
    values
        In nats, float64 ``[questions, choices]``, −inf where a question has no such choice.
    answers
        Index of the right choice, int64 ``[questions]``.
    """

    values: Float[np.ndarray, "questions choices"]
    answers: Int[np.ndarray, " questions"]

    @property
    def right(self) -> Float[np.ndarray, " questions"]:
        """Log-likelihood of the right choice, or of the text."""
        found: np.ndarray = np.take_along_axis(self.values, self.answers[:, None], axis=1)[:, 0]
        return found

    @property
    def margin(self) -> Float[np.ndarray, " questions"]:
        """Log-likelihood of the right choice minus the highest of the others; of a text, the log-likelihood itself."""
        return objective(torch.from_numpy(self.values), torch.from_numpy(self.answers)).numpy()

    @property
    def correct(self) -> Float[np.ndarray, " questions"]:
        """1 where the right choice is the most likely, else 0."""
        return (self.margin > 0).astype(np.float64)

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        with whole_file(path) as partial:
            save_file({"values": torch.from_numpy(self.values), "answers": torch.from_numpy(self.answers)}, partial)

    @classmethod
    def open(cls, path: Path) -> ChoiceScores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StudyError
            If the file is damaged.
        """
        try:
            return cls(**{name: value.numpy() for name, value in load_file(path).items()})
        except (SafetensorError, OSError, TypeError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


def item_questions(session: Session, items: Sequence[Item]) -> list[Question]:
    """Return items as questions.

    All choices are scored from the same position: the first token at which any of them differs from the prompt's own
    tokenization, in case the tokenizer merges across the boundary. An encoder-decoder reads the prompt with its encoder
    and is scored on the choices by its decoder, from the start token on.

    Raises
    ------
    TextError
        If an item has no token before its choices, is too long for the model, or two choices have the same tokens.
    """
    ask = _encoded_question if session.anatomy.encoder_decoder else _item_question
    return [ask(session, item) for item in items]


def _encoded_question(session: Session, item: Item) -> Question:
    source = tuple(session.tokenizer(item.prompt)["input_ids"])
    choices = [session.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in item.choices]
    wholes = [(session.batcher.decoder_start, *choice) for choice in choices]
    _check_length(session, item, max(len(source), *map(len, wholes)))
    if not source:
        raise TextError(
            f'item "{item.id}" has no prompt, and this tokenizer adds no token; give it one, or leave it out'
        )
    if any(len(whole) < 2 for whole in wholes) or len(set(wholes)) < len(wholes):
        raise TextError(f'item "{item.id}": two choices have the same tokens, or one has none; reword it')
    return _question(wholes, 1, item.answer, source)


def _item_question(session: Session, item: Item) -> Question:
    def encoded(text: str) -> tuple[int, ...]:
        return tuple(session.tokenizer(text)["input_ids"])

    wholes = [encoded(item.prompt + choice) for choice in item.choices]
    start = _common_start([encoded(item.prompt), *wholes])
    if start == 0:
        raise TextError(
            f'item "{item.id}" has no token before its choices, and this tokenizer prepends none; '
            "give it a longer prompt, or leave it out"
        )
    _check_length(session, item, max(map(len, wholes)))
    if any(len(whole) <= start for whole in wholes) or len(set(wholes)) < len(wholes):
        raise TextError(f'item "{item.id}": two choices, or a choice and the prompt, have the same tokens; reword it')
    return _question(wholes, start, item.answer)


def _check_length(session: Session, item: Item, longest: int) -> None:
    limit = getattr(session.anatomy.config, "max_position_embeddings", None) or longest
    if longest > limit:
        raise TextError(f'item "{item.id}" is longer than the model\'s {limit} tokens; shorten it')


def _question(wholes: Sequence[tuple[int, ...]], start: int, answer: int, source: tuple[int, ...] = ()) -> Question:
    """Return the question that scores these token ids from a position on, one sequence a choice."""
    rows = _without_beginnings([whole[:-1] for whole in wholes])
    targets = []
    for choice, whole in enumerate(wholes):
        row = next(i for i, row in enumerate(rows) if row[: len(whole) - 1] == whole[:-1])
        targets += [(row, position - 1, whole[position], choice) for position in range(start, len(whole))]
    return Question(tuple(rows), tuple(targets), len(wholes), answer, source)


def text_questions(session: Session, segments: Sequence[Segment]) -> list[Question]:
    """Return segments of text as questions with one choice each: all tokens that count, each given its prefix.

    For an encoder-decoder these are the tokens of the second half (:meth:`probes.batches.Batcher.halves`).

    Raises
    ------
    TextError
        If a segment has no token to predict.
    """
    questions = []
    for segment in segments:
        ids: list[int] = session.batcher.encoded(segment)
        source: list[int] = []
        if session.anatomy.encoder_decoder:
            source, ids = session.batcher.halves(segment, ids)
        counted = session.batcher.counts(ids)
        targets = tuple((0, position - 1, ids[position], 0) for position in range(1, len(ids)) if counted[position])
        if not targets:
            raise TextError(f'segment "{segment.id}" has no token to predict: {segment.text!r}; leave it out')
        questions.append(Question((tuple(ids[:-1]),), targets, 1, 0, tuple(source)))
    return questions


def question_batches(session: Session, questions: Sequence[Question], smaller: int = 1) -> list[QuestionBatch]:
    """Batch questions of similar length: the session's tokens per batch, or that divided by `smaller`."""
    longest = [question.longest for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (longest[i], i))
    groups: list[list[int]] = []
    rows = 0
    for i in order:
        rows += len(questions[i].rows)
        if not groups or rows * longest[i] > session.batcher.batch_tokens // smaller:
            groups.append([])
            rows = len(questions[i].rows)
        groups[-1].append(i)
    return [_question_batch(session, group, questions) for group in groups]


def score(session: Session, questions: Sequence[Question], progress: Progress = lambda tokens: None) -> ChoiceScores:
    """Score every choice of questions with the model as it is."""
    values = ScoreTable(questions)
    for group in question_batches(session, questions):
        values.take(group, group.scores(session.anatomy, final_states(session, group.batch)))
        progress(group.batch.n_tokens)
    return values.scores


def final_states(
    session: Session, batch: Batch, readers: Sequence[Reader] = (), edits: Sequence[Edit] = (), **run: Any
) -> Tensor:
    """Run the model on a batch and return its normed final states, ``[rows, tokens, hidden]``.

    The arguments are those of :meth:`probes.Session.read`.
    """
    final = Keep({"final"})
    session.read(batch, [*readers, final], edits, **run)
    return final.values[len(session.anatomy.blocks), "final"]


class ScoreTable:
    """Scores of questions, filled batch by batch."""

    def __init__(self, questions: Sequence[Question]) -> None:
        values = np.full((len(questions), max(question.choices for question in questions)), -np.inf)
        self.scores = ChoiceScores(values, np.array([question.answer for question in questions]))

    def take(self, group: QuestionBatch, scores: Tensor) -> None:
        """Enter the scores of one batch, as returned by :meth:`QuestionBatch.scores`."""
        self.scores.values[list(group.questions), : scores.shape[1]] = scores.detach().double().cpu().numpy()


def _question_batch(session: Session, group: Sequence[int], questions: Sequence[Question]) -> QuestionBatch:
    width = max(questions[i].choices for i in group)
    encoded: list[tuple[int, ...]] = []
    owners: list[int] = []
    places: dict[tuple[int, int], int] = {}
    index, token, cell = [], [], []
    for number, i in enumerate(group):
        first = len(encoded)
        encoded += questions[i].rows
        owners += [i] * len(questions[i].rows)
        for row, position, wanted, choice in questions[i].targets:
            index.append(places.setdefault((first + row, position), len(places)))
            token.append(wanted)
            cell.append(number * width + choice)
    if session.anatomy.encoder_decoder:
        batch = session.batcher.paired(owners, [questions[i].source for i in owners], encoded, start_counts=True)
    else:
        batch = session.batcher.batch(owners, encoded)
    if any(questions[i].differing is not None for i in group):
        batch = _with_classes(session, batch, [questions[i] for i in group])
    device = batch.ids.device
    lengths = torch.tensor([len(row) for row in encoded])
    shift = batch.last.ids.shape[1] - lengths if session.batcher.padding == "left" else torch.zeros_like(lengths)
    state = torch.tensor([(row, position + int(shift[row])) for row, position in places])
    there = torch.tensor([[c < questions[i].choices for c in range(width)] for i in group])
    answers = torch.tensor([questions[i].answer for i in group])
    return QuestionBatch(
        batch=batch,
        questions=tuple(group),
        state=state.to(device),
        index=torch.tensor(index).to(device),
        token=torch.tensor(token).to(device),
        cell=torch.tensor(cell).to(device),
        there=there.to(device),
        answers=answers.to(device),
    )


def _with_classes(session: Session, batch: Batch, questions: Sequence[Question]) -> Batch:
    """Return a batch of these questions with the class of every token."""
    sources, rows = [], []
    for question in questions:
        source, own = question.classes()
        sources += [source] * len(own)
        rows += own
    found = [session.batcher.padded(each, filler=-1).to(batch.ids.device) for each in (sources, rows)]
    if batch.decoder is None:
        return replace(batch, classes=found[1])
    return replace(batch, classes=found[0], decoder=replace(batch.decoder, classes=found[1]))


def _common_start(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the sequences' longest common prefix."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)


def _without_beginnings(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the distinct rows that are not a prefix of another."""
    distinct = list(dict.fromkeys(rows))
    return [r for r in distinct if not any(len(o) > len(r) and o[: len(r)] == r for o in distinct)]
