"""The second stage: all models read text and questions in lockstep, a group of languages at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from probes import (
    DENSE,
    FittingStream,
    HeldoutStream,
    LensMargins,
    LensReadings,
    LensStream,
    MarginStream,
    QuestionStream,
    ReadingPlan,
    StoredReadings,
    Together,
    item_questions,
    plan_reading,
    read_streams,
)
from probes.scoring import Question
from probes.streams import Stream
from pruning import Segment, Variant
from pruning.code_version import code_version
from pruning.files import content_sha256, whole_file

from ..metrics.lsar import LSAR, fit_layers
from .context import Context
from .lenses import TunedLens, lens_bytes, lens_stream, lens_work
from .units import Advance, Output, Unit

#: Languages are grouped up to this many tokens, so that the cost of applying a variant's block is negligible.
_TOKENS = 4096
#: A group for one of several workers is closed with this part of its share of all tokens, so that none is much larger.
_SHARE = 0.8
#: Models that one of several workers reads at least: beside them it reads the dense one anew.
_FEWEST = 8
_HELDOUT, _FITTING, _QUESTIONS, _LENS, _MARGINS = "readings", "fitting", "questions", "lens", "margins"


class Read:
    """A unit is a group of languages, with all their unread held-out text, fitting text and questions.

    For a lens, the dense model reads the held-out text once before, alone.
    """

    name = "read"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return what is left to read, in groups of languages."""
        left = [part for language in context.study.languages if (part := _left(context, language)).anything]
        groups = list(_shared_out(context, list(_grouped(context, left))))
        return [self._unit(context, group, i, len(groups)) for i, group in enumerate(groups, start=1)]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Read the text and questions of a unit, and record each result."""
        began = time.monotonic()
        parts = _parts_of(unit)
        streams = [_Streams.of(context, part) for part in parts]
        names = dict.fromkeys(model for part in parts for model in part.models if model != DENSE)
        variants = {name: context.variants.open(name) for name in names}
        tuned = _to_be_fitted(context, parts)
        plan = _plan(context, streams, tuned.streams() if tuned else (), trial=True)
        context.tell(str(plan))
        work = unit.work / plan.tokens

        def read(streams: Sequence[Stream], variants: Mapping[str, Variant]) -> None:
            read_streams(context.model.session, streams, variants, plan, lambda tokens: advance(tokens * work))

        lenses = [of_language.lens for of_language in streams if of_language.lens is not None]
        margins = [of_language.margins for of_language in streams if of_language.margins is not None]
        if lenses or margins:
            references = [lens.reference() for lens in lenses]
            read(references, {})
            translators = TunedLens(context, _reading_key(context)).fitted(lambda streams: read(streams, {}))
            for lens, reference in zip(lenses, references, strict=True):
                lens.prepare(reference, context.token_languages, translators)
            for stream in margins:
                stream.prepare(translators)
        read([stream for of_language in streams for stream in of_language.every], variants)
        for part, of_language in zip(parts, streams, strict=True):
            of_language.save(context, part)
        seconds = (time.monotonic() - began) / len(unit.outputs)
        for output in unit.outputs:
            context.records.finish(output.name, output.key, [_file(context, output.name)], seconds)

    def planned(self, context: Context, unit: Unit, *, trial: bool) -> ReadingPlan:
        """Return what a unit will need; with a trial, how long it will take, too."""
        parts = _parts_of(unit)
        tuned = _to_be_fitted(context, parts)
        streams = [_Streams.of(context, part) for part in parts]
        plan = _plan(context, streams, tuned.streams() if tuned else (), trial=trial)
        lenses = sum(output.name.startswith(f"{_LENS}/") for output in unit.outputs)
        kept = lenses * lens_bytes(context) + (tuned.kept if tuned else 0)
        return replace(plan, kept=plan.kept + kept)

    def scratch(self, context: Context, unit: Unit) -> int:
        """Return the bytes on disk that a unit needs for a while: states that a tuned lens is fitted on."""
        tuned = _to_be_fitted(context, _parts_of(unit))
        return tuned.scratch if tuned else 0

    def _unit(self, context: Context, group: Sequence[_Left], number: int, of: int) -> Unit:
        facts = context.model.facts
        models = len({model for part in group for model in part.models})
        outputs = tuple(Output(name, key) for part in group for name, key in _results(context, part))
        work = 0.0
        for part in group:
            texts = context.texts
            work += len(part.heldout) * _tokens(context, texts.heldout[part.language]) * (facts.body + facts.head)
            work += part.fitting * _tokens(context, texts.fitting[part.language]) * facts.body
            asked = dict.fromkeys([*part.questions, *part.margins])
            work += len(asked) * _question_tokens(context, part.language) * facts.body if asked else 0
            if part.lens:
                tokens = _tokens(context, texts.heldout[part.language])
                work += lens_work(context, len(part.lens), tokens, alone=part.lens != part.heldout)
        tuned = _to_be_fitted(context, group)
        work += tuned.work if tuned else 0
        languages = ", ".join(part.language for part in group)
        title = f"reading {languages} with {models} model{'s' * (models > 1)}"
        title += f" ({number} of {of})" if of > 1 else ""
        plan = _plan(context, [_Streams.of(context, part) for part in group])
        return Unit(self.name, title, outputs, work, plan.memory)


# -- results: their names, keys and files --------------------------------------------------------------------------


def readings_key(context: Context, model: str, language: str) -> str:
    """Return a hash of everything that one model's readings in one language depend on."""
    text = context.texts.heldout_fingerprints[language]
    return content_sha256([_reading_key(context), text, context.variants.key(model)])


def readings_finished(context: Context, model: str, language: str) -> bool:
    """Whether one model has read the held-out text of one language."""
    return context.records.finished(f"{_HELDOUT}/{model}/{language}", readings_key(context, model, language))


def fitting_key(context: Context, language: str) -> str:
    """Return a hash of everything that a language's means on the fitting text depend on."""
    return content_sha256([_reading_key(context), context.texts.fitting_fingerprints[language]])


def questions_key(context: Context, model: str, language: str) -> str:
    """Return a hash of everything that a model's scores of the items in a language depend on."""
    items = context.texts.item_fingerprints[language]
    return content_sha256([_reading_key(context), items, context.variants.key(model)])


def lens_key(context: Context, model: str, language: str) -> str:
    """Return a hash of everything that a model's predictions after each block depend on in one language."""
    of_tokens = [(lang, context.texts.fitting_fingerprints[lang]) for lang in context.study.languages]
    lens = context.study.lens.model_dump()
    return content_sha256([readings_key(context, model, language), lens, of_tokens])


def lens_readings(context: Context) -> dict[tuple[str, str], LensReadings]:
    """Return the predictions of every model after each block, by model and language; none without a lens."""
    models = context.variants.models if context.study.lens.tokens else ()
    return {
        (model, language): LensReadings.open(_file(context, f"{_LENS}/{model}/{language}"))
        for model in models
        for language in context.study.languages
    }


def margins_key(context: Context, model: str, language: str) -> str:
    """Return a hash of everything that the margins of a model's choices after each block depend on."""
    tuned = TunedLens(context, _reading_key(context)).key if context.study.lens.tuned else ""
    return content_sha256([questions_key(context, model, language), tuned])


def lens_margins(context: Context) -> dict[tuple[str, str], LensMargins]:
    """Return the margins of every model's choices after each block, by model and language; none without a lens."""
    models = context.variants.models if context.study.lens.tokens else ()
    return {
        (model, language): LensMargins.open(_file(context, f"{_MARGINS}/{model}/{language}"))
        for model in models
        for language in context.texts.items
    }


def readings_file(context: Context, model: str, language: str) -> Path:
    """Return the file of one model's readings in one language."""
    return _file(context, f"{_HELDOUT}/{model}/{language}")


def questions_file(context: Context, model: str, language: str) -> Path:
    """Return the file of a model's scores of the items in a language."""
    return _file(context, f"{_QUESTIONS}/{model}/{language}")


def subspaces(context: Context) -> list[LSAR]:
    """Return the language-specific subspace of the dense model after each block."""
    return fitted_subspaces(context.folder, context.study.languages, context.study.evaluation.rank)


def fitted_subspaces(folder: Path, languages: Sequence[str], rank: int | None) -> list[LSAR]:
    """Return the same of the study in a folder, with a rank of languages - 1 if it is ``None``."""
    means = {language: load_file(fitting_file(folder, language))["means"][None] for language in languages}
    return fit_layers(means, rank)


def fitting_file(folder: Path, language: str) -> Path:
    """Return the file of the dense model's means on the fitting text of one language."""
    return _place(folder, f"{_FITTING}/{DENSE}/{language}")


def _reading_key(context: Context) -> str:
    config = context.study.evaluation.model_dump(include={"max_length", "batch_tokens", "skip_first"})
    facts = context.model.facts
    return content_sha256([code_version("pruning", "probes"), facts.fingerprint, facts.dtype, config])


def _file(context: Context, result: str) -> Path:
    return _place(context.folder, result)


def _place(folder: Path, result: str) -> Path:
    kind, model, language = result.split("/")
    suffix = {_HELDOUT: "", _FITTING: "-fitting", _QUESTIONS: "-items", _LENS: "-lens", _MARGINS: "-margins"}[kind]
    return folder / "readings" / model / f"{language}{suffix}.safetensors"


# -- what is left ----------------------------------------------------------------------------------------------------


@dataclass
class _Left:
    """What is left to read in one language.

    Attributes
    ----------
    heldout, questions, lens, margins
        Models that have yet to read the held-out text and the questions, and those whose predictions after each block
        of these have yet to be read.
    fitting
        Whether the dense model has yet to read the fitting text.
    """

    language: str
    heldout: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    lens: list[str] = field(default_factory=list)
    margins: list[str] = field(default_factory=list)
    fitting: bool = False

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys([*self.heldout, *self.questions, *self.lens, *self.margins, *[DENSE] * self.fitting]))

    @property
    def anything(self) -> bool:
        return bool(self.models)

    def of(self, models: Collection[str]) -> _Left:
        """Return what is left for some of the models."""

        def some(own: Sequence[str]) -> list[str]:
            return [model for model in own if model in models]

        fitting = self.fitting and DENSE in models
        return _Left(
            self.language, some(self.heldout), some(self.questions), some(self.lens), some(self.margins), fitting
        )


def _left(context: Context, language: str) -> _Left:
    left = _Left(language)
    done = context.records.finished
    for model in context.variants.models:
        if not readings_finished(context, model, language):
            left.heldout.append(model)
        if language in context.texts.items and not done(
            f"{_QUESTIONS}/{model}/{language}", questions_key(context, model, language)
        ):
            left.questions.append(model)
        if context.study.lens.tokens and not done(f"{_LENS}/{model}/{language}", lens_key(context, model, language)):
            left.lens.append(model)
        if (
            context.study.lens.tokens
            and language in context.texts.items
            and not done(f"{_MARGINS}/{model}/{language}", margins_key(context, model, language))
        ):
            left.margins.append(model)
    left.fitting = not done(f"{_FITTING}/{DENSE}/{language}", fitting_key(context, language))
    return left


def _results(context: Context, left: _Left) -> Iterator[tuple[str, str]]:
    """Yield name and key of every remaining result in a language."""
    language = left.language
    for model in left.heldout:
        yield f"{_HELDOUT}/{model}/{language}", readings_key(context, model, language)
    if left.fitting:
        yield f"{_FITTING}/{DENSE}/{language}", fitting_key(context, language)
    for model in left.questions:
        yield f"{_QUESTIONS}/{model}/{language}", questions_key(context, model, language)
    for model in left.lens:
        yield f"{_LENS}/{model}/{language}", lens_key(context, model, language)
    for model in left.margins:
        yield f"{_MARGINS}/{model}/{language}", margins_key(context, model, language)


def _parts_of(unit: Unit) -> list[_Left]:
    """Return what a unit reads, from the names of its results."""
    parts: dict[str, _Left] = {}
    for output in unit.outputs:
        kind, model, language = output.name.split("/")
        part = parts.setdefault(language, _Left(language))
        if kind == _FITTING:
            part.fitting = True
        else:
            models = {_HELDOUT: part.heldout, _QUESTIONS: part.questions, _LENS: part.lens, _MARGINS: part.margins}
            models[kind].append(model)
    return list(parts.values())


# -- groups of languages -----------------------------------------------------------------------------------------------


def _grouped(context: Context, left: Sequence[_Left]) -> Iterator[list[_Left]]:
    """Yield groups of languages to read together, with enough text but within memory, and one for every worker."""
    group: list[_Left] = []
    tokens = 0
    enough: float = _TOKENS
    if context.workers > 1:
        enough = min(enough, _SHARE * sum(_read_tokens(context, part) for part in left) / context.workers)
    for part in left:
        if group and (tokens >= enough or not _fits(context, [*group, part])):
            yield group
            group, tokens = [], 0
        group.append(part)
        tokens += _read_tokens(context, part)
    if group:
        yield group


def _shared_out(context: Context, groups: Sequence[Sequence[_Left]]) -> Iterator[list[_Left]]:
    """Yield groups of languages, cut by models where there are more workers than groups.

    With a tuned lens groups stay whole: what fits it would be read in every part of the first.
    """
    parts = math.ceil(context.workers / max(len(groups), 1))
    for group in groups:
        models = list(dict.fromkeys(model for left in group for model in left.models))
        number = 1 if context.study.lens.tuned else max(1, min(parts, len(models) // _FEWEST))
        size = math.ceil(len(models) / number)
        for start in range(0, len(models), size):
            some = frozenset(models[start : start + size])
            yield [own for left in group if (own := left.of(some)).anything]


def _read_tokens(context: Context, left: _Left) -> int:
    """Return how many tokens several models read in a language."""
    heldout = _tokens(context, context.texts.heldout[left.language]) if left.heldout or left.lens else 0
    return heldout + (_question_tokens(context, left.language) if left.questions or left.margins else 0)


def _fits(context: Context, group: Sequence[_Left]) -> bool:
    """Return whether the hidden states of a group fit into memory together."""
    return _plan(context, [_Streams.of(context, part) for part in group]).waves <= 1


def _plan(
    context: Context, streams: Sequence[_Streams], more: Sequence[Stream] = (), *, trial: bool = False
) -> ReadingPlan:
    every = [*(stream for of_language in streams for stream in of_language.planned), *more]
    return plan_reading(
        context.model.session,
        every,
        memory=context.memory,
        device_memory=context.device_memory,
        trial=trial,
        replaced=context.variants.replaced({model for stream in every for model in stream.models}),
    )


def _tokens(context: Context, segments: Sequence[Segment]) -> int:
    return sum(batch.n_tokens for batch in context.model.session.batches(segments))


def _question_tokens(context: Context, language: str) -> int:
    return sum(question.tokens for question in _questions(context, language)) if context.texts.items else 0


def _to_be_fitted(context: Context, parts: Sequence[_Left]) -> TunedLens | None:
    """Return the tuned lens if it is to be fitted with these, as is planned: with the study's first language."""
    first = context.study.languages[0]
    if not any(part.lens and part.language == first for part in parts):
        return None
    tuned = TunedLens(context, _reading_key(context))
    return tuned if tuned.missing else None


def _questions(context: Context, language: str) -> list[Question]:
    return item_questions(context.model.session, context.texts.items[language])


@dataclass(frozen=True)
class _Streams:
    """The streams to read in one language, one per kind of text; of a lens, its own beside those that are read."""

    every: list[Stream] = field(default_factory=list)
    fitting: FittingStream | None = None
    questions: QuestionStream | None = None
    lens: LensStream | None = None
    margins: MarginStream | None = None

    @classmethod
    def of(cls, context: Context, left: _Left) -> _Streams:
        """Return the streams; readings of held-out text are written to their files block by block."""
        session, texts, language = context.model.session, context.texts, left.language
        every: list[Stream] = []
        fitting = questions = lens = margins = None
        if left.lens:
            lens = lens_stream(context, language, left.lens)
        if left.heldout:
            files = {model: readings_file(context, model, language) for model in left.heldout}
            heldout = HeldoutStream(session, texts.heldout[language], left.heldout, files)
            in_one = lens is not None and left.lens == left.heldout
            every.append(Together(heldout, lens) if lens is not None and in_one else heldout)
        if lens is not None and left.lens != left.heldout:
            every.append(lens)
        if left.fitting:
            every.append(fitting := FittingStream(session, texts.fitting[language]))
        asked = _questions(context, language) if left.questions or left.margins else []
        if left.margins:
            margins = MarginStream(session, asked, left.margins)
        if left.questions:
            questions = QuestionStream(session, asked, left.questions)
            in_one = margins is not None and left.margins == left.questions
            every.append(Together(questions, margins) if margins is not None and in_one else questions)
        if margins is not None and left.margins != left.questions:
            every.append(margins)
        return cls(every, fitting, questions, lens, margins)

    @property
    def planned(self) -> list[Stream]:
        """All streams, and the one that is read before, as if it were read with them."""
        return [*self.every, *([self.lens.reference()] if self.lens is not None else [])]

    def save(self, context: Context, left: _Left) -> None:
        """Write the results that are not yet on disk."""
        if self.fitting is not None:
            with whole_file(_file(context, f"{_FITTING}/{DENSE}/{left.language}")) as partial:
                save_file({"means": self.fitting.means}, partial)
        for model in left.questions if self.questions is not None else ():
            assert self.questions is not None
            self.questions.scores[model].save(questions_file(context, model, left.language))
        for model in left.lens if self.lens is not None else ():
            assert self.lens is not None
            self.lens.readings[model].save(_file(context, f"{_LENS}/{model}/{left.language}"))
        for model in left.margins if self.margins is not None else ():
            assert self.margins is not None
            self.margins.margins[model].save(_file(context, f"{_MARGINS}/{model}/{left.language}"))


def stored_readings(context: Context, models: Sequence[str]) -> StoredReadings:
    """Return the readings of some models, by model and language, opened on access."""
    languages = context.study.languages
    return StoredReadings(
        {(model, language): readings_file(context, model, language) for model in models for language in languages}
    )
