"""What a lockstep pass reads: text or questions, with which models, and what it keeps of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pruning.errors import ModelError
from pruning.files import whole_file
from pruning.models.anatomy import Anatomy, Stack
from pruning.text.sources import Segment

from .batches import Batch
from .readers.base import Reader
from .readers.firing import NeuronFiring, neuron_places
from .readers.hidden_states import PooledStates
from .readers.loss import TokenLoss
from .readers.routing import Choices, RouterChoices
from .readers.signal import SIGNAL_SITES, SignalError, SignalPower
from .readings import Readings
from .scoring import ChoiceScores, Question, ScoreTable, question_batches
from .session import Session

#: The dense model's name among the variants.
DENSE = "dense"


@dataclass(frozen=True)
class AtHead:
    """What passes through the head, of each model that reads a stream.

    Attributes
    ----------
    positions, blocks, lenses
        Number of positions whose states do so after every block, of these blocks, and of the lenses that they do it
        through; none by default.
    all_tokens
        Whether those of all tokens do so after the last block.
    after_blocks
        Whether a few rows of the head are needed after every block.
    """

    positions: int = 0
    blocks: int = 0
    lenses: int = 1
    all_tokens: bool = True
    after_blocks: bool = False

    @property
    def throughout(self) -> bool:
        """Whether the head is needed after every block."""
        return self.after_blocks or self.positions > 0

    @property
    def products(self) -> int:
        """States that are multiplied by the head for the positions: each beside the dense model's final one."""
        return 2 * self.positions * self.blocks * self.lenses


@runtime_checkable
class Stream(Protocol):
    """Batches that several models read in lockstep.

    Attributes
    ----------
    models
        Ids of the models that read it: variants, and :data:`DENSE`.
    batches
        The batches.
    compares
        Whether variants are compared with the dense model's activations on the same batch.
    files
        Model to the file for its results; those of other models stay in memory.
    at_head
        What passes through the head.
    """

    @property
    def models(self) -> tuple[str, ...]: ...
    @property
    def batches(self) -> Sequence[Batch]: ...
    @property
    def compares(self) -> bool: ...
    @property
    def files(self) -> Mapping[str, Path]: ...
    @property
    def at_head(self) -> AtHead: ...

    def opened(self) -> AbstractContextManager[object]:
        """Context manager that prepares storage for the results; they are complete when it exits without an error."""

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """Return the readers of one model for one batch; the same objects every time.

        They read the blocks of one stack (:func:`read_stack`).
        """


def read_stack(anatomy: Anatomy, batch: Batch) -> Stack:
    """Return the stack whose blocks are read on a batch: the last that runs.

    In an encoder-decoder, where a batch has a part for the decoder, its encoder only gives the context: it is read on
    whole segments instead.
    """
    return anatomy.stacks[0 if batch.decoder is None else -1]


class HeldoutStream:
    """Held-out text on which models are compared: pooled states, firing, loss, and error against the dense model.

    Parameters
    ----------
    session
        The dense model's session.
    segments
        Text of one language.
    models
        Ids of variants; the dense model is always read too, as the reference.
    files
        Model to the file that its readings are written to, block by block; those of other models stay in memory.

    Attributes
    ----------
    readings
        Model to its readings.
    """

    compares = True
    at_head = AtHead()

    def __init__(
        self,
        session: Session,
        segments: Sequence[Segment],
        models: Sequence[str],
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.models = tuple(dict.fromkeys((DENSE, *models)))
        self.batches = session.batches(segments)
        self.readings: dict[str, Readings] = {}
        self._anatomy = session.anatomy
        self.files = dict(files or {})
        self._utf8 = torch.tensor([session.batcher.bytes_predicted(segment) for segment in segments])
        self._places = neuron_places(session.anatomy)
        self._choices: Choices = {}
        self._readers: dict[str, list[Reader]] = {}

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`Stream`."""
        anatomy = self._anatomy
        shape = (len(self._utf8), len(anatomy.blocks), anatomy.hidden_size, readable_neurons(anatomy))
        experts = most_experts(anatomy)
        with ExitStack() as stack:  # if a file cannot be made, those made before it are removed
            for model in self.models:
                path = stack.enter_context(whole_file(self.files[model])) if model in self.files else None
                self.readings[model] = Readings.empty(*shape, path, experts=experts)
            stack.callback(self._readers.clear)
            stack.callback(self._choices.clear)
            for model in self.models:
                self._readers[model] = self._readers_of(model)
            self._fill_in()
            self._mark_sites()
            return stack.pop_all()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`Stream`."""
        return self._readers[model]

    def _readers_of(self, model: str) -> list[Reader]:
        read = self.readings[model]
        readers: list[Reader] = [PooledStates(read.pooled), TokenLoss(read.nll, read.predicted, self._anatomy)]
        if read.fired.numel():
            readers.append(NeuronFiring(read.fired, self._places))
        if read.experts:
            readers.append(RouterChoices(read.routed, read.agreed, self._choices, reference=model == DENSE))
        if model == DENSE:
            return [*readers, SignalPower([one.power for one in self.readings.values()])]
        return [*readers, SignalError([read.error])]

    def _fill_in(self) -> None:
        """Fill in what is the same for all models."""
        first, *others = self.readings.values()
        first.utf8_bytes[:] = self._utf8
        for (layer, site), place in self._places.items() if first.experts else ():
            kind, _, expert = site.partition(".")
            first.neurons[layer, int(expert) if kind == "expert" else -1] = place.stop - place.start
        for batch in self.batches:
            stack = read_stack(self._anatomy, batch)
            first.tokens[stack.first : stack.stop, list(batch.segments)] = batch.last.counted.sum(dim=1).long().cpu()
            if batch.decoder is not None:
                first.context[list(batch.segments)] = batch.counted.sum(dim=1).long().cpu()
        for name in ("utf8_bytes", "neurons", "tokens", "context"):
            for other in others:
                getattr(other, name).copy_(getattr(first, name))

    def _mark_sites(self) -> None:
        """Set the dense model's own error to zero at the sites that exist."""
        for layer in range(len(self._anatomy.blocks)):
            there = [site in self._anatomy.sites(layer) for site in SIGNAL_SITES]
            self.readings[DENSE].error[:, layer, there] = 0


class FittingStream:
    """Text for fitting the LSAR subspaces, read by the dense model only.

    Attributes
    ----------
    pooled
        Mean hidden state of each segment after each block, float32 ``[layers, segments, hidden]``.
    """

    compares = False
    models: tuple[str, ...] = (DENSE,)
    files: Mapping[str, Path] = {}
    at_head = AtHead(all_tokens=False)

    def __init__(self, session: Session, segments: Sequence[Segment]) -> None:
        anatomy = session.anatomy
        self.batches = session.batches(segments)
        self.pooled = torch.zeros(len(anatomy.blocks), len(segments), anatomy.hidden_size)
        self._readers = [PooledStates(self.pooled)]

    @property
    def means(self) -> Tensor:
        """Mean over segments, float64 ``[layers, hidden]``."""
        return self.pooled.double().mean(dim=1)

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`Stream`."""
        return ExitStack()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`Stream`."""
        return self._readers


class QuestionStream:
    """Questions that models are scored on.

    Parameters
    ----------
    session
        The dense model's session.
    questions
        As returned by :func:`probes.item_questions`.
    models
        Ids of the models; :data:`DENSE` is optional.

    Attributes
    ----------
    scores
        Model to its scores.
    """

    compares = False
    files: Mapping[str, Path] = {}
    at_head = AtHead()

    def __init__(self, session: Session, questions: Sequence[Question], models: Sequence[str]) -> None:
        self.models = tuple(models)
        self._groups = question_batches(session, questions)
        self.batches = [group.batch for group in self._groups]
        self._anatomy = session.anatomy
        self._tables = {model: ScoreTable(questions) for model in self.models}
        self._readers = {
            model: [_Scoring(self, model, number) for number in range(len(self._groups))] for model in self.models
        }

    @property
    def scores(self) -> dict[str, ChoiceScores]:
        """Model to its scores."""
        return {model: table.scores for model, table in self._tables.items()}

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`Stream`."""
        return ExitStack()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`Stream`."""
        return [self._readers[model][batch]]

    def take(self, model: str, number: int, final: Tensor) -> None:
        """Score one batch, given the normed final states of a model, ``[rows, tokens, hidden]``."""
        group = self._groups[number]
        self._tables[model].take(group, group.scores(self._anatomy, final))


class _Scoring(Reader):
    """Scores the questions of one batch."""

    sites = frozenset({"final"})

    def __init__(self, stream: QuestionStream, model: str, number: int) -> None:
        self._stream = stream
        self._model = model
        self._number = number

    def read(self, layer: int, site: str, value: Tensor, batch: Batch, dense: Tensor | None = None) -> None:
        self._stream.take(self._model, self._number, value)


class Together:
    """Two streams over the same text, read in one pass.

    Parameters
    ----------
    whole
        Its batches are read.
    part
        A stream whose readers find what they want in these batches by their segments, and which compares nothing.
    """

    def __init__(self, whole: Stream, part: Stream) -> None:
        self._streams = (whole, part)
        self.models = tuple(dict.fromkeys((*whole.models, *part.models)))
        self.batches = whole.batches
        self.compares = whole.compares
        self.files = whole.files
        self.at_head = replace(part.at_head, all_tokens=whole.at_head.all_tokens)

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`Stream`."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(stream.opened())
            return stack.pop_all()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`Stream`."""
        return [reader for stream in self._streams if model in stream.models for reader in stream.readers(model, batch)]


def most_experts(anatomy: Anatomy) -> int:
    """Return the number of experts of the block with most, 0 in a model without experts."""
    return max(anatomy.n_experts(layer) for layer in range(len(anatomy.blocks)))


def readable_neurons(anatomy: Anatomy) -> int:
    """Return the number of MLP neurons per block, 0 if they cannot be read in every block.

    In a mixture of experts, it is that of the block with most, those of all its experts together.
    """
    blocks = range(len(anatomy.blocks))
    if most_experts(anatomy):
        groups = [anatomy.neuron_groups(layer) for layer in blocks]
        able = all(anatomy.experts(layer) is None or hasattr(anatomy.experts(layer), "act_fn") for layer in blocks)
        return max(sum(own.values()) for own in groups) if able and all(groups) else 0
    if not all("activation" in anatomy.sites(layer) for layer in range(len(anatomy.blocks))):
        return 0
    try:
        return anatomy.n_neurons
    except ModelError:
        return 0
