"""The logit lens: what every model would predict after each block, against the dense model's final prediction.

Models are compared with a prediction that the dense model has made only after its last block, while all models advance
block by block together. So the dense model reads the text once before (:class:`ReferenceStream`), of which its final
states at the sampled positions are kept: 2 MiB for 256 positions of width 4096 in bfloat16. Then all models are read
(:class:`LensStream`), in the same pass as the rest of what is read of the text (:class:`probes.streams.Together`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pruning.errors import StudyError
from pruning.files import whole_file
from pruning.text.sources import Segment

from .readers.base import Reader
from .readers.lens import LENS_SUMS, BlockPredictions, Reference, as_it_is
from .readers.sampled import Sample, SampledStates, decoded
from .session import Session
from .streams import DENSE, AtHead
from .translators import Translators

#: What states are read through: as they are, and translated (:mod:`probes.translators`).
LENSES = ("logit", "tuned")
#: Kinds of tokens that are of no single language: common to several, and not seen in the text.
SHARED, UNSEEN = "shared", "unseen"
#: Where kinds of tokens are in the metadata of a file.
_KINDS = "kinds"
#: Smallest share of a token's frequency, over languages, that makes it a token of one language.
DOMINANT = 2 / 3
#: Occurrences that every token is given beside those that were counted, spread evenly over languages: one occurrence
#: where all languages have as much text is then just enough.
_SMOOTHING = 0.5


@dataclass(frozen=True, eq=False)
class TokenLanguages:
    """Which language each token of a vocabulary is of, by where it occurs in parallel text.

    A token is of a language if at least :data:`DOMINANT` of its frequency, relative to the length of each language's
    text and smoothed, is in that language. Tokens that occur but are of no language are :data:`SHARED`, those that do
    not occur :data:`UNSEEN`, special tokens among them. It knows no more than the text: a short text leaves most of a
    large vocabulary unseen, and languages that share words or a script share tokens.

    Attributes
    ----------
    names
        Languages, then :data:`SHARED` and :data:`UNSEEN`.
    kinds
        Of every token its place in `names`, int64 ``[vocabulary]``.
    """

    names: tuple[str, ...]
    kinds: Tensor

    @classmethod
    def of(cls, session: Session, text: Mapping[str, Sequence[Segment]]) -> TokenLanguages:
        """Count tokens in text by language; best in translations, so that what it is about tells nothing."""
        size, batcher = session.anatomy.vocabulary, session.batcher
        counts = torch.zeros(len(text), size, dtype=torch.float64)
        for row, segments in zip(counts, text.values(), strict=True):
            encoded = [batcher.encoded(segment) for segment in segments]
            ids = [torch.tensor(own)[batcher.counts(own, encoder=True)] for own in encoded]
            row += torch.bincount(torch.cat(ids), minlength=size)
        return cls.counted(tuple(text), counts)

    @classmethod
    def counted(cls, languages: Sequence[str], counts: Tensor) -> TokenLanguages:
        """Decide by the number of occurrences of each token, ``[languages, vocabulary]``."""
        length = counts.sum(dim=1, keepdim=True).clamp(min=1)
        frequency = (counts + _SMOOTHING / len(languages)) / length
        share, kinds = (frequency / frequency.sum(dim=0)).max(dim=0)
        kinds[share < DOMINANT - 1e-9] = len(languages)
        kinds[counts.sum(dim=0) == 0] = len(languages) + 1
        return cls((*languages, SHARED, UNSEEN), kinds)


@dataclass(frozen=True, eq=False)
class LensReadings:
    """What one model would predict after each block, as sums over the sampled positions of each segment.

    For 32 blocks, 128 segments and seven languages they take 425 kB a lens.

    Attributes
    ----------
    kinds
        Kinds of tokens, as :attr:`TokenLanguages.names` has them.
    layers
        The blocks, int64 ``[layers]``: all, or those of the decoder.
    vocabulary
        Number of tokens of each kind in the vocabulary, int64 ``[kinds]``.
    explained
        How well the translator of each block was fitted (:attr:`probes.translators.Translator.explained`), float64
        ``[layers]``; empty without a tuned lens.
    sampled
        Number of positions sampled of each segment, int64 ``[segments]``.
    sums
        As in :data:`probes.readers.lens.LENS_SUMS`, for the first, or both, of
        :data:`LENSES`, float64 ``[lenses, layers, segments, sums]``.
    mass
        Probability of each kind of tokens, float64 ``[lenses, layers, segments, kinds]``.
    """

    kinds: tuple[str, ...]
    layers: Tensor
    vocabulary: Tensor
    explained: Tensor
    sampled: Tensor
    sums: Tensor
    mass: Tensor

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        with whole_file(path) as partial:
            tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
            save_file(tensors, partial, {_KINDS: json.dumps(self.kinds)})

    @classmethod
    def open(cls, path: Path) -> LensReadings:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StudyError
            If the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                kinds = tuple(json.loads(file.metadata()[_KINDS]))
                return cls(kinds, **{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


class LensStream:
    """Held-out text at a sample of whose positions predictions are read after every block.

    :meth:`prepare` must have been called before it is read. Of an encoder-decoder the decoder is read.

    Parameters
    ----------
    session
        The dense model's session.
    segments
        Text of one language.
    models
        Ids of variants, and :data:`DENSE` if wanted.
    tokens, seed
        Number of positions, the same ones for all models, and seed of their draw.
    tuned
        Whether states are also read through a tuned lens.

    Attributes
    ----------
    sample
        The positions.
    readings
        Model to its readings.

    Raises
    ------
    TextError
        If the text has no position to sample.
    """

    compares = False
    files: Mapping[str, Path] = {}

    def __init__(
        self,
        session: Session,
        segments: Sequence[Segment],
        models: Sequence[str],
        *,
        tokens: int,
        seed: int = 0,
        tuned: bool = False,
    ) -> None:
        self.models = tuple(models)
        self._lenses = LENSES[: 1 + tuned]
        self._anatomy = session.anatomy
        batches = session.batches(segments)
        self.sample = Sample.of(batches, tokens, seed)
        self.batches = [batch for batch in decoded(batches) if batch.segments in self.sample.places]
        self.readings: dict[str, LensReadings] = {}
        self._segments = len(segments)
        self._readers: dict[str, list[Reader]] = {}

    @property
    def at_head(self) -> AtHead:
        """See :class:`probes.streams.Stream`."""
        stack = self._anatomy.stacks[-1]
        return AtHead(len(self.sample), stack.stop - stack.first, len(self._lenses), all_tokens=False)

    def reference(self) -> ReferenceStream:
        """Return what is to be read first, by the dense model alone."""
        return ReferenceStream(self)

    def prepare(
        self, reference: ReferenceStream, languages: TokenLanguages, translators: Translators | None = None
    ) -> None:
        """Prepare for reading.

        Parameters
        ----------
        reference
            What :meth:`reference` returned, after it was read.
        languages
            Of tokens.
        translators
            Of the dense model; only for a tuned lens.
        """
        lenses = [as_it_is, *([translators.translate] if translators is not None else [])]
        assert len(lenses) == len(self._lenses)
        anatomy, stack = self._anatomy, self._anatomy.stacks[-1]
        with anatomy.loaded_for_end():
            final = Reference.of(anatomy, reference.states())
        vocabulary = torch.bincount(languages.kinds, minlength=len(languages.names))
        kinds, layers = languages.kinds.to(anatomy.device), torch.arange(stack.first, stack.stop)
        shares = {} if translators is None else translators.explained() | {stack.stop - 1: 1.0}
        explained = torch.tensor([shares[layer] for layer in sorted(shares)], dtype=torch.float64)
        shape = (len(lenses), len(layers), self._segments)
        for model in self.models:
            found = LensReadings(
                kinds=languages.names,
                layers=layers,
                vocabulary=vocabulary,
                explained=explained,
                sampled=torch.bincount(self.sample.segment, minlength=self._segments),
                sums=torch.zeros(*shape, len(LENS_SUMS), dtype=torch.float64),
                mass=torch.zeros(*shape, len(languages.names), dtype=torch.float64),
            )
            self.readings[model] = found
            reader = BlockPredictions(anatomy, self.sample, final, kinds, found.sums, found.mass, lenses, stack.first)
            self._readers[model] = [reader]

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`probes.streams.Stream`."""
        return ExitStack()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`probes.streams.Stream`; they find the batch by its segments."""
        return self._readers[model]


class ReferenceStream:
    """The text of a lens, read by the dense model only: its final states at the sampled positions."""

    compares = False
    models: tuple[str, ...] = (DENSE,)
    files: Mapping[str, Path] = {}
    at_head = AtHead(all_tokens=False)

    def __init__(self, lens: LensStream) -> None:
        self.batches = lens.batches
        self._reader = SampledStates(lens.sample, "final")

    def states(self) -> Tensor:
        """Return the normed final states in the order of the sample, ``[positions, hidden]``, once."""
        ((_, index, states),) = self._reader.taken()
        return states[index.argsort()]

    def opened(self) -> AbstractContextManager[object]:
        """See :class:`probes.streams.Stream`."""
        return ExitStack()

    def readers(self, model: str, batch: int) -> Sequence[Reader]:
        """See :class:`probes.streams.Stream`."""
        return [self._reader]
