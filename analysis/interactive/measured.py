"""What was measured of a loaded model and its variants, in memory: read when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from probes import (
    ChoiceScores,
    FittingStream,
    HeldoutStream,
    Item,
    ItemSource,
    LensMargins,
    LensReadings,
    QuestionStream,
    Readings,
    Session,
    item_questions,
    plan_reading,
    read_streams,
    some_twins,
)
from pruning import Anatomy, Corpus, Segment, Variant

from ..frames import Frames, dense_columns
from ..metrics.lsar import LSAR, fit_layers
from ..study.analyses import Measured, all_analyses, frame_names
from .results import dense_first


class InMemory(Measured):
    """What was measured of a loaded model.

    Held-out text, with all models, and fitting text are read in one pass when either is first needed; items are asked
    in another, when they are first needed.

    Parameters
    ----------
    session
        Of the dense model.
    name
        Of the dense model in frames.
    variants
        Every variant, by id.
    languages
        Evaluation languages.
    corpus, segments, fit_segments
        The text, and how many held-out and parallel segments of it to read per language.
    rank
        Of the subspaces; languages - 1 by default.
    source, per_category
        Source of the items, if there are any, and how many of each category.
    memory, device_memory
        Caps in bytes; free memory by default.
    progress
        Told of the tokens as they are read.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        variants: Mapping[str, Variant],
        languages: Sequence[str],
        corpus: Corpus,
        *,
        segments: int,
        fit_segments: int,
        rank: int | None,
        source: ItemSource | None,
        per_category: int | Mapping[str, int] | None,
        memory: int | None,
        device_memory: int | None,
        progress: Callable[[float], None],
    ) -> None:
        self.session = session
        self._variants = dict(variants)
        self._rank = rank
        self._name = name
        self._languages = tuple(languages)
        self._corpus = corpus
        self._segments = segments
        self._fit_segments = fit_segments
        self._source = source
        self._per_category = per_category
        self._caps = memory, device_memory
        self._progress = progress
        self._frames = MadeFrames(self)

    @property
    def anatomy(self) -> Anatomy:
        """Anatomy of the dense model."""
        return self.session.anatomy

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants."""
        return self._variants

    @property
    def rank(self) -> int | None:
        """Rank of the subspaces, if it was given."""
        return self._rank

    @property
    def answers(self) -> tuple[pd.DataFrame, ...]:
        """No answers to other questions."""
        return ()

    @property
    def frames(self) -> Frames:
        """Every frame."""
        return self._frames

    @cached_property
    def columns(self) -> dict[str, Mapping[str, Any]]:
        """Columns that describe each model."""
        return dense_first(dense_columns(self._name), {id: one.columns() for id, one in self.variants.items()})

    @cached_property
    def heldout(self) -> dict[str, list[Segment]]:
        """The held-out segments, by language."""
        return {language: self._corpus.take("heldout", language, self._segments) for language in self._languages}

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """The items, by language; none if there is no source of them."""
        if self._source is None:
            return {}
        return {language: some_twins(self._source.items(language), self._per_category) for language in self._languages}

    @property
    def task(self) -> str:
        """Name of the items in frames."""
        return "" if self._source is None else self._source.task

    @property
    def readings(self) -> dict[tuple[str, str], Readings]:
        """``(model, language)`` to what was read of the held-out text."""
        return self._read[0]

    @property
    def lens(self) -> dict[tuple[str, str], LensReadings]:
        """No predictions after each block: they are read by :func:`probes.read_lens`."""
        return {}

    @property
    def margins(self) -> dict[tuple[str, str], LensMargins]:
        """No margins of choices after each block."""
        return {}

    @property
    def subspaces(self) -> list[LSAR]:
        """The language-specific subspace of the dense model after each block."""
        return self._read[1]

    @cached_property
    def scores(self) -> dict[tuple[str, str], ChoiceScores]:
        """Scores on the items."""
        models = list(self.columns)
        streams = {
            language: QuestionStream(self.session, item_questions(self.session, items), models)
            for language, items in self.items.items()
        }
        self._pass(list(streams.values()))
        scores = {language: stream.scores for language, stream in streams.items()}
        return {(model, language): scores[language][model] for model in models for language in streams}

    @cached_property
    def _read(self) -> tuple[dict[tuple[str, str], Readings], list[LSAR]]:
        names = list(self.variants)
        fitting = self._corpus.aligned("parallel", self._languages, self._fit_segments)
        held = {lang: HeldoutStream(self.session, own, names) for lang, own in self.heldout.items()}
        fitted = {lang: FittingStream(self.session, own) for lang, own in fitting.items()}
        self._pass([*held.values(), *fitted.values()])
        means = {language: stream.means[None] for language, stream in fitted.items()}
        readings = {(model, lang): held[lang].readings[model] for model in self.columns for lang in held}
        return readings, fit_layers(means, self.rank)

    def _pass(self, streams: Sequence[HeldoutStream | FittingStream | QuestionStream]) -> None:
        if streams:
            memory, device_memory = self._caps
            plan = plan_reading(self.session, list(streams), memory=memory, device_memory=device_memory, trial=False)
            read_streams(self.session, list(streams), self.variants, plan, self._progress)


class MadeFrames(Mapping[str, pd.DataFrame]):
    """Every frame, made when it is first asked for, with those that come from the same analysis.

    Parameters
    ----------
    measured
        What they are made from.
    """

    def __init__(self, measured: InMemory) -> None:
        self._measured = measured
        self._made: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        """Return a frame."""
        if name not in frame_names():
            raise KeyError(name)
        if name not in self._made:
            names = next(names for names in all_analyses() if name in names)
            self._made |= all_analyses()[names](self._measured)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all frames."""
        return iter(frame_names())

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(frame_names())
