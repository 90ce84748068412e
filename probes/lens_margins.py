"""A lens on questions: after which block the right choice is ahead of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruning.errors import StudyError
from pruning.files import whole_file

from .readers.base import Reader
from .readers.lens import Lens, as_it_is
from .readers.margins import BlockMargins, FirstDifference
from .scoring import Question, QuestionBatch, question_batches
from .session import Session
from .streams import AtHead
from .translators import Translators


@dataclass(frozen=True, eq=False)
class LensMargins:
    """How far the right choice is ahead after each block, of one model.

    Attributes
    ----------
    layers
        The blocks, int64 ``[layers]``: all, or those of the decoder.
    values
        Log-probability of the right choice's token minus that of the likeliest other, where choices first differ, for
        the first, or both, of :data:`probes.lens.LENSES`, float64 ``[lenses, layers, questions]``; NaN where a choice
        has no token there.
    """

    layers: Tensor
    values: Tensor

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        with whole_file(path) as partial:
            save_file(vars(self), partial)

    @classmethod
    def open(cls, path: Path) -> LensMargins:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StudyError
            If the file is damaged.
        """
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


class MarginStream:
    """Questions whose choices are compared after every block.

    Of each question only the first token at which its choices differ is compared: all choices are predicted from one
    state there, and those of one token have no other. It needs two rows of the head a question, so it costs next to
    nothing beside reading the questions. :meth:`prepare` must have been called before it is read.

    Parameters
    ----------
    session
        The dense model's session.
    questions
        As returned by :func:`probes.item_questions`.
    models
        Ids of the models.

    Attributes
    ----------
    margins
        Model to its margins.
    """

    compares = False
    files: Mapping[str, Path] = {}
    at_head = AtHead(all_tokens=False, after_blocks=True)

    def __init__(self, session: Session, questions: Sequence[Question], models: Sequence[str]) -> None:
        self.models = tuple(models)
        groups = question_batches(session, questions)
        self.batches = [group.batch for group in groups]
        self.margins: dict[str, LensMargins] = {}
        self._anatomy = session.anatomy
        self._questions = len(questions)
        found = {group.batch.segments: _places(group, questions) for group in groups}
        self._places = {segments: place for segments, place in found.items() if place is not None}
        self._readers: dict[str, list[Reader]] = {}

    def prepare(self, translators: Translators | None = None) -> None:
        """Prepare for reading, through the tuned lens, too, if there are translators of the dense model."""
        lenses: list[Lens] = [as_it_is, *([translators.translate] if translators is not None else [])]
        stack = self._anatomy.stacks[-1]
        layers = torch.arange(stack.first, stack.stop)
        for model in self.models:
            values = torch.full((len(lenses), len(layers), self._questions), torch.nan, dtype=torch.float64)
            self.margins[model] = LensMargins(layers, values)
            self._readers[model] = [BlockMargins(self._anatomy, self._places, values, lenses, stack.first)]

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`probes.streams.Stream`."""
        return ExitStack()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`probes.streams.Stream`; they find the batch by its questions."""
        return self._readers[model]


def first_difference(question: Question) -> tuple[int, list[int]] | None:
    """Return the first target of the right choice that another choice does not share, and the others' tokens there.

    ``None`` if one of the others has ended before.
    """
    by_choice: list[dict[int, tuple[int, int]]] = [{} for _ in range(question.choices)]
    for number, (_, position, token, choice) in enumerate(question.targets):
        by_choice[choice][position] = number, token
    for position, (number, token) in by_choice[question.answer].items():
        there = [own[position][1] for own in by_choice if position in own]
        if len(there) < question.choices:
            return None
        if any(other != token for other in there):
            return number, [own[position][1] for own in by_choice]
    return None


def _places(group: QuestionBatch, questions: Sequence[Question]) -> FirstDifference | None:
    """Return where the choices of a batch's questions first differ."""
    found, before = [], 0
    width = max(questions[i].choices for i in group.questions)
    for i in group.questions:
        question = questions[i]
        place = first_difference(question)
        if place is not None:
            number, tokens = place
            right = question.targets[number][2]
            found.append((i, before + number, right, [*tokens, *[right] * (width - len(tokens))]))
        before += len(question.targets)
    if not found:
        return None
    device = group.state.device
    numbers, targets, rights, others = (torch.tensor(each, device=device) for each in zip(*found, strict=True))
    state = group.state[group.index[targets]]
    return FirstDifference(numbers, state[:, 0], state[:, 1], rights, others)
