"""Looking inside a few variants of a loaded model: one call, whose result has every frame and figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from probes import Item, ItemSource, Session
from probes.patching import COUNTED, Positions
from probes.readers.firing import neuron_places
from probes.streams import read_stack, readable_neurons
from pruning import Corpus, Variant
from pruning.errors import StudyError, VariantError, did_you_mean, shortened, unknown
from pruning.text.languages import language_tags
from pruning.text.sources import BUNDLED_LANGUAGES

from ..frames import ALL, Frames
from ..metrics.recovery import CONFIRMED, SAMPLED, diagnose
from ..report import ReportFacts
from ..study.diagnosis_inputs import DiagnosisInputs
from ..study.diagnosis_request import REASONING, DiagnosisRequest, asked_items, checked
from ..study.figures import versions
from .diagnoses import Diagnosed, Diagnoses
from .measured import InMemory
from .results import Results
from .selection import the_one

#: Of the items, for a look without any.
_NONE = "none"


def look(
    model: Any,
    tokenizer: Any,
    variants: Variant | Sequence[Variant] = (),
    languages: Sequence[str] = ("en", "sw", "zh"),
    *,
    text: str | Corpus = "bundled",
    segments: int = 32,
    fit_segments: int = 32,
    items: str | None = None,
    per_category: int | Mapping[str, int] | None = None,
    name: str | None = None,
    max_length: int = 256,
    batch_tokens: int = 1024,
    skip_first: bool = True,
    rank: int | None = None,
    memory: int | None = None,
    device_memory: int | None = None,
    progress: Callable[[float], None] = lambda tokens: None,
) -> Look:
    """Look inside a dense model and a few of its variants.

    Nothing is read yet: each frame is made when it is first asked for. What was read stays in memory (for 128 segments
    of an 8B model 83 MB per model and language): for many variants in many languages, run a study.

    Parameters
    ----------
    model, tokenizer
        The dense model, as returned by :func:`pruning.load_model`.
    variants
        One or several variants of it, as from :func:`pruning.prune` or ``Variant.open``.
    languages
        Evaluation languages, BCP-47 tags; at least two, since languages are compared.
    text
        A source, ``"bundled"``, ``"file:FOLDER/{lang}.jsonl"`` or ``"hub:PRESET"``, or a corpus.
    segments, fit_segments
        Held-out segments per language, and parallel ones to fit the LSAR subspaces on.
    items
        ``"bundled"`` (by default, if there are items in all languages), ``"file:FOLDER/{lang}.jsonl"`` or ``"none"``.
    per_category
        Maximum number of items per category, or a table of them; all by default.
    name
        Of the model in frames; that which the variants state, or the model's own, by default.
    max_length, batch_tokens, skip_first
        As for :class:`probes.Session`.
    rank
        Of the subspaces; number of languages - 1 by default.
    memory, device_memory
        Caps in bytes; free memory by default.
    progress
        Told of the tokens as they are read.

    Raises
    ------
    LanguageError, TextError
        If a language is unknown, or there is no such source of text or items.
    VariantError
        If a variant was not made from this model, or two have the same id.
    StudyError
        If there are fewer than two languages, or a number is too small.

    Examples
    --------
    ::

        model, tokenizer = load_model("demo")
        corpus = Corpus.of("bundled")
        variants = prune(model, tokenizer, Recipe(method="wanda"), corpus, CalibrationSet.named("sw"))
        seen = look(model, tokenizer, variants, ["en", "sw"])
        seen.frame("perplexity", metric="perplexity")
        seen.figure("signal")
    """
    tags = language_tags([languages] if isinstance(languages, str) else languages)
    if len(tags) < 2:
        raise StudyError("languages are compared with each other: give two or more, such as ['en', 'sw']")
    for what, number in (("segments", segments), ("fit_segments", fit_segments)):
        if number < 2:
            raise StudyError(f"{what} is {number}; intervals need two or more")
    if rank is not None and not 0 < rank < len(tags):
        raise StudyError(f"rank {rank} must be positive and less than the number of languages, {len(tags)}")
    own = [variants] if isinstance(variants, Variant) else list(variants)
    session = Session(model, tokenizer, max_length=max_length, batch_tokens=batch_tokens, skip_first=skip_first)
    if items is None:
        items = "bundled" if set(tags) <= set(BUNDLED_LANGUAGES) else _NONE
    measured = InMemory(
        session,
        name or (own[0].record.model if own else str(model.name_or_path)),
        _by_id(own, session),
        tags,
        text if isinstance(text, Corpus) else Corpus.of(text),
        segments=segments,
        fit_segments=fit_segments,
        rank=rank,
        source=None if items == _NONE else ItemSource(items),
        per_category=per_category,
        memory=memory,
        device_memory=device_memory,
        progress=progress,
    )
    return Look(measured, tags, segments=segments, fit_segments=fit_segments, skip_first=skip_first)


class Look(Results):
    """What :func:`look` sees.

    Parameters
    ----------
    measured
        What was measured.
    languages
        The evaluation languages.
    segments, fit_segments, skip_first
        As for :func:`look`.

    Attributes
    ----------
    session
        The dense model's session, to trace it, or to patch it.
    """

    def __init__(
        self,
        measured: InMemory,
        languages: tuple[str, ...],
        *,
        segments: int,
        fit_segments: int,
        skip_first: bool,
    ) -> None:
        self.session = measured.session
        self.title = f"look at {next(iter(measured.columns.values()))['model']}"
        self._measured = measured
        self._languages_read = languages
        self._amounts = segments, fit_segments
        self._skip_first = skip_first
        self._diagnosed: dict[DiagnosisRequest, Diagnosed] = {}

    @property
    def languages(self) -> tuple[str, ...]:
        """The evaluation languages."""
        return self._languages_read

    @property
    def frames(self) -> Frames:
        """Every frame, by name; each is made when it is first asked for."""
        return self._measured.frames

    @property
    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """The columns that describe each model in frames, by id; the dense model comes first."""
        return self._measured.columns

    @property
    def measured(self) -> InMemory:
        """What frames are made from: readings, subspaces, items, scores."""
        return self._measured

    @cached_property
    def facts(self) -> ReportFacts:
        """What captions say beside the frames; nothing is read for it."""
        anatomy, records = self._measured.anatomy, [one.record for one in self._variants.values()]
        places = neuron_places(anatomy) if readable_neurons(anatomy) else {}
        segments, fit_segments = self._amounts
        return ReportFacts(
            model=str(next(iter(self.columns.values()))["model"]),
            languages=self.languages,
            sets=list(dict.fromkeys(record.calibration for record in records if record.calibration)),
            recipes=list(dict.fromkeys(record.recipe for record in records if record.recipe)),
            imported={record.id: record.found for record in records if record.recipe is None},
            set_aside={},
            segments=segments,
            fit_segments=fit_segments,
            rank=self._measured.rank or len(self.languages) - 1,
            skip_first=self._skip_first,
            heldout_tokens={language: self._tokens(language) for language in self.languages},
            blocks=len(anatomy.blocks),
            neurons=sum(place.stop - place.start for place in places.values()),
            versions=versions(),
        )

    @property
    def diagnoses(self) -> Diagnoses:
        """What was diagnosed so far."""
        return Diagnoses(self._diagnosed.values())

    def diagnose(
        self,
        language: str,
        category: str = REASONING,
        *,
        half: Literal["all", "first", "second"] = "all",
        confirm: int = CONFIRMED,
        sample: int = SAMPLED,
        positions: Positions = COUNTED,
        **what: Any,
    ) -> Diagnosed:
        """Find the components that recover a variant's drop when they are restored.

        Parameters
        ----------
        language, category, half, confirm, sample, positions
            As of :class:`analysis.study.diagnosis_request.DiagnosisRequest`.
        **what
            Which variant, if there are several; as for :meth:`variant`.

        Raises
        ------
        StudyError
            If there is no such variant, language or category, or too few questions.
        """
        request = DiagnosisRequest(
            variant=str(the_one(self._found(what), what, "variants")["id"]),
            language=language,
            category=category,
            half=half,
            confirm=confirm,
            sample=sample,
            positions=positions,
        )
        items = self._measured.items
        request = checked(
            request,
            variants=list(self._variants),
            languages=self.languages,
            items=items.__getitem__ if items else None,
            segments=self._amounts[0],
        )
        if request not in self._diagnosed:
            inputs = DiagnosisInputs(self._measured, self.session, request)
            frame = diagnose(
                self.session,
                inputs.damage,
                inputs.asked,
                inputs.components,
                inputs.variant.columns(),
                confirm=confirm,
                sample=sample,
                positions=positions,
                errors=inputs.errors,
            )
            self._diagnosed[request] = Diagnosed(request, lambda: frame, lambda: inputs.remedy(frame))
        return self._diagnosed[request]

    def questions(
        self, language: str, category: str = ALL, *, half: Literal["all", "first", "second"] = "all"
    ) -> list[Item]:
        """Return the items that models are asked.

        Parameters
        ----------
        language, category
            A language, and a category of its items, or ``"all"`` of them.
        half
            Those of one half of the templates, such as the half that a diagnosis of the other has not seen.

        Raises
        ------
        StudyError
            If there are no items in this language, or of this category.
        """
        items = self._measured.items
        if language not in items:
            raise StudyError(f"there are no items in {shortened(language)}; {did_you_mean(language, items)}")
        categories = [*dict.fromkeys(item.category for item in items[language]), ALL]
        if category not in categories:
            raise StudyError(unknown("category", category, categories))
        request = DiagnosisRequest(variant="", language=language, category=category, half=half)
        return asked_items(items[language], request)

    @property
    def _variants(self) -> Mapping[str, Variant]:
        return self._measured.variants

    def _tokens(self, language: str) -> int:
        """Return how many tokens of the held-out text count in the first block."""
        anatomy = self._measured.anatomy
        batches = self.session.batches(self._measured.heldout[language])
        return sum(int(batch.last.counted.sum()) for batch in batches if not read_stack(anatomy, batch).first)


def _by_id(variants: Sequence[Variant], session: Session) -> dict[str, Variant]:
    """Return variants by id, all of them of this model.

    Raises
    ------
    VariantError
        If one is not, or two have the same id.
    """
    found: dict[str, Variant] = {}
    fingerprint = session.anatomy.fingerprint() if variants else ""
    for variant in variants:
        variant.check_belongs_to(fingerprint)
        if variant.id in found:
            raise VariantError(f'two variants are called "{variant.id}"; look at one of them at a time')
        found[variant.id] = variant
    return found
