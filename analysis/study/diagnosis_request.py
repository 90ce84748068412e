"""The request for a diagnosis: a variant, a language, a category of questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from probes import Item
from probes.patching import COUNTED, Positions
from pruning.errors import StudyError, did_you_mean, shortened
from pruning.text.languages import language_tag, named

from ..frames import ALL, TEXT, labels
from ..metrics.crossing import Pairing
from ..metrics.halves import HALVES, halves, item_strata
from ..metrics.recovery import CONFIRMED, SAMPLED
from .configuration import StudyConfig

_T = TypeVar("_T")
#: Templates, or segments, that a diagnosis needs: two in each half, or there are no intervals.
_FEWEST = 4
#: Default category.
REASONING = "reasoning"


class DiagnosisRequest(BaseModel):
    """What to diagnose.

    Attributes
    ----------
    variant, language
        A variant and a language of the study, or ``"all"`` of them, which stands for a diagnosis in each.
    category
        A category of its items, ``"all"`` of them, or ``"text"`` for its held-out text.
    half
        ``"first"`` or ``"second"`` uses one half of the templates (or segments) alone, so that a remedy can be
        evaluated on the other. Whatever is used is halved for the diagnosis itself: each half chooses causes, and the
        other says what they recover.
    confirm
        Number of causes that each half chooses, and that are confirmed by exact patching.
    sample
        Number of masks, and of outputs, that are drawn at random and patched exactly too, to see how well gradients
        predict exact patching.
    positions
        ``"counted"`` patches activations where tokens count, ``"all"`` the first and special tokens too.
    sources
        Languages of the study whose states are put into the items, at the last token of the prompt; none by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    language: str
    category: str = REASONING
    half: Literal["all", "first", "second"] = "all"
    confirm: int = CONFIRMED
    sample: int = SAMPLED
    positions: Positions = COUNTED
    sources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder."""
        extra = [*([self.half] * (self.half != ALL)), *(["all-positions"] * (self.positions != COUNTED))]
        return labels.slug("-".join([self.variant, self.language, self.category, *extra]))

    @property
    def title(self) -> str:
        """Its heading in the report."""
        return f"Diagnosis: {self.variant}, {self.category} in {named(self.language)}{self._conditions}"

    @property
    def title_of_all(self) -> str:
        """The heading of all that differ from it in language alone."""
        return f"Diagnoses across languages: {self.variant}, {self.category}{self._conditions}"

    @property
    def _conditions(self) -> str:
        half = f", {self.half} half of the questions" if self.half != ALL else ""
        tokens = ", all tokens patched" if self.positions != COUNTED else ""
        return f"{half}{tokens}"


def in_each_language(study: StudyConfig, request: DiagnosisRequest) -> list[DiagnosisRequest]:
    """Return a request in each language of the study, if it is for all of them, else the request itself.

    Languages without items of the category are left out, unless none has any.
    """
    if ALL in request.sources:
        request = request.model_copy(update={"sources": tuple(study.languages)})
    if request.language != ALL:
        return [request]
    found = [request.model_copy(update={"language": language}) for language in study.languages]
    if request.category == TEXT:
        return found
    return [one for one in found if asked_items(study.items(one.language), request)] or found


def check(study: StudyConfig, request: DiagnosisRequest) -> DiagnosisRequest:
    """Return a request with its language's tag in canonical form.

    Raises
    ------
    StudyError
        If the study has no such variant, language or category, or too few questions in it.
    """
    return checked(
        request,
        variants=[*(job.id for job in study.jobs()), *study.checkpoints()],
        languages=study.languages,
        items=None if study.item_source() is None else study.items,
        segments=study.evaluation.segments,
    )


def checked(
    request: DiagnosisRequest,
    *,
    variants: Sequence[str],
    languages: Sequence[str],
    items: Callable[[str], Sequence[Item]] | None,
    segments: int,
) -> DiagnosisRequest:
    """Return a request with its language's tag in canonical form.

    Parameters
    ----------
    request
        The request.
    variants, languages, segments
        Ids of the variants, languages, and held-out segments of each language that there are.
    items
        Returns the items of a language; ``None`` if there are none.

    Raises
    ------
    StudyError
        If there is no such variant, language or category, or there are too few questions in it.
    """
    if request.variant not in variants:
        known = did_you_mean(request.variant, variants)
        raise StudyError(f'this study has no variant "{shortened(request.variant)}"; {known}')
    language = _in_study(request.language, languages)
    sources = tuple(dict.fromkeys(_in_study(source, languages) for source in request.sources))
    if request.category == TEXT:
        number = len(asked_segments(range(segments), request))
    else:
        if items is None:
            raise StudyError(
                f'this study has no items in {named(language)}; add them with items = "file:FOLDER/{{lang}}.jsonl" '
                "under [tasks], or diagnose held-out text with --category text"
            )
        there = items(language)
        categories = [*dict.fromkeys(item.category for item in there), ALL, TEXT]
        if request.category not in categories:
            raise StudyError(
                f'there are no items of category "{shortened(request.category)}" in {named(language)}; '
                f"{did_you_mean(request.category, categories)}"
            )
        number = len({item.template for item in asked_items(there, request)})
    if number < _FEWEST:
        which = "" if request.half == "all" else f" in the {request.half} half"
        raise StudyError(
            f'too few questions of category "{request.category}" in {named(language)}{which}: each half of a diagnosis '
            f"needs two templates (minimal pairs, items or segments) at least, and there are {number} for both"
        )
    if sources:
        _check_sources(request, language, sources, items)
    return request.model_copy(update={"language": language, "sources": sources})


def _in_study(language: str, languages: Sequence[str]) -> str:
    tag = language_tag(language)
    if tag not in languages:
        raise StudyError(f"{named(tag)} is not in this study; it has {', '.join(languages)}")
    return tag


def _check_sources(
    request: DiagnosisRequest, language: str, sources: Sequence[str], items: Callable[[str], Sequence[Item]] | None
) -> None:
    """Check that the items have pairs in all these languages."""
    if request.category == TEXT or items is None:
        raise StudyError("states of other languages are put into items, and text has none; leave out --from")
    own = asked_items(items(language), request)
    for source in sources:
        others = asked_items(items(source), request.model_copy(update={"half": ALL}))
        if not len(Pairing.of(own, others).items):
            raise StudyError(
                f'no minimal pair of category "{request.category}" in {named(language)} is in {named(source)} too, '
                f"with the same ids and answers; leave out --from {source}, or ask items that are translated"
            )


def asked_items(items: Sequence[Item], request: DiagnosisRequest) -> list[Item]:
    """Return the items that a request covers."""
    found = [item for item in items if request.category in (ALL, item.category)]
    if request.half == "all" or not found:
        return found
    half = halves([item.template for item in found], item_strata(found))
    return [item for item, own in zip(found, half, strict=True) if HALVES[own] == request.half]


def asked_segments(segments: Sequence[_T], request: DiagnosisRequest) -> Sequence[_T]:
    """Return the segments that a request covers."""
    return segments[{"all": slice(None), "first": slice(0, None, 2), "second": slice(1, None, 2)}[request.half]]
