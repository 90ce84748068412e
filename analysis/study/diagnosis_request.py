"""The request for a diagnosis: a variant, a language, a category of questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from probes import Item, some_twins
from pruning.errors import StudyError, did_you_mean, shortened
from pruning.text.languages import language_tag, named

from ..frames import ALL, TEXT, labels
from ..metrics.recovery import CONFIRMED
from .configuration import Study

#: Default category.
REASONING = "reasoning"


class DiagnosisRequest(BaseModel):
    """What to diagnose.

    Attributes
    ----------
    variant, language
        A variant and a language of the study.
    category
        A category of its items, ``"all"`` of them, or ``"text"`` for its held-out text.
    half
        ``"first"`` or ``"second"`` uses every other minimal pair (or segment), so that a remedy can be evaluated on the
        other half.
    confirm
        Number of causes to confirm by exact patching.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    language: str
    category: str = REASONING
    half: Literal["all", "first", "second"] = "all"
    confirm: int = CONFIRMED

    @property
    def name(self) -> str:
        """Name of its folder."""
        return labels.slug("-".join([self.variant, self.language, self.category, *([self.half] * (self.half != ALL))]))

    @property
    def title(self) -> str:
        """Its heading in the report."""
        half = f", {self.half} half of the questions" if self.half != ALL else ""
        return f"Diagnosis: {self.variant}, {self.category} in {named(self.language)}{half}"


def check(study: Study, request: DiagnosisRequest) -> DiagnosisRequest:
    """Return a request with its language's tag in canonical form.

    Raises
    ------
    StudyError
        If the study has no such variant, language or category, or too few questions in it.
    """
    names = [*(job.id for job in study.jobs()), *study.imported]
    if request.variant not in names:
        known = did_you_mean(request.variant, names)
        raise StudyError(f'this study has no variant "{shortened(request.variant)}"; {known}')
    language = language_tag(request.language)
    if language not in study.languages:
        raise StudyError(f"{named(language)} is not in this study; it has {', '.join(study.languages)}")
    if request.category == TEXT:
        number = study.evaluation.segments
    else:
        source = study.item_source()
        if source is None:
            raise StudyError(
                f'this study has no items in {named(language)}; add them with items = "file:FOLDER/{{lang}}.jsonl" '
                "under [tasks], or diagnose held-out text with --category text"
            )
        items = some_twins(source.items(language), study.tasks.per_category)
        categories = [*dict.fromkeys(item.category for item in items), ALL, TEXT]
        if request.category not in categories:
            raise StudyError(
                f'there are no items of category "{shortened(request.category)}" in {named(language)}; '
                f"{did_you_mean(request.category, categories)}"
            )
        number = len(by_twin(items, request.category))
    if len(range(number)[half_of(request)]) < 2:
        which = "" if request.half == "all" else f" in the {request.half} half"
        raise StudyError(
            f'too few questions of category "{request.category}" in {named(language)}{which}: intervals need at least '
            "two minimal pairs, items or segments"
        )
    return request.model_copy(update={"language": language})


def by_twin(items: Sequence[Item], category: str) -> dict[str, list[Item]]:
    """Return the items of a category, grouped by minimal pair."""
    twins: dict[str, list[Item]] = {}
    for item in items:
        if category in (ALL, item.category):
            twins.setdefault(item.twin, []).append(item)
    return twins


def half_of(request: DiagnosisRequest) -> slice:
    """Return the slice of minimal pairs or segments that a request covers."""
    return {"all": slice(None), "first": slice(0, None, 2), "second": slice(1, None, 2)}[request.half]
