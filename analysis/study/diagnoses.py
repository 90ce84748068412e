"""The diagnoses of a study: carried out on its variants, kept in its folder, shown in its report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from probes import DENSE, DamagedModel, Item, Readings, first_twins, item_questions, text_questions
from pruning import Remedy
from pruning.errors import PrunescopeError, StudyError, did_you_mean, shortened
from pruning.files import content_sha256, write_json
from pruning.remedy import REMEDY_FILE
from pruning.text.languages import language_tag, named

from ..frames import ALL, TEXT, labels, read_frame, write_frame
from ..metrics import lape
from ..metrics import recovery as diagnosis
from ..metrics.recovery import CONFIRMED, Asked, components_of
from ..plots import save
from ..report import ReportFigure, diagnosis_figures
from .configuration import Study
from .progress import WorkProgress

if TYPE_CHECKING:
    from .run import Run

FOLDER = "diagnoses"
REQUEST_FILE = "diagnosis.json"
#: Category that is diagnosed when none is given.
REASONING = "reasoning"


class Request(BaseModel):
    """What is diagnosed.

    Attributes
    ----------
    variant, language
        Of the study.
    category
        Of its items, ``"all"`` of them, or ``"text"``: its held-out text.
    half
        Only every second minimal pair (or segment), the first or the others, so that what follows from a diagnosis can
        be judged on what it was not made with.
    confirm
        How many causes are confirmed by exact patching.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    language: str
    category: str = REASONING
    half: Literal["all", "first", "second"] = "all"
    confirm: int = CONFIRMED

    @property
    def name(self) -> str:
        """Of its folder."""
        return labels.slug("-".join([self.variant, self.language, self.category, *([self.half] * (self.half != ALL))]))

    @property
    def title(self) -> str:
        """Its heading in the report."""
        half = f", {self.half} half of the questions" if self.half != ALL else ""
        return f"Diagnosis: {self.variant}, {self.category} in {named(self.language)}{half}"


def carry_out(run: Run, request: Request, console: Console) -> Path:
    """Diagnose one variant of a finished study, write ``DIR/diagnoses/NAME/``, and return that folder.

    Raises
    ------
    StudyError
        If the study has no such variant, language or category.
    """
    request = check(run.study, request)
    folder = run.folder / FOLDER / request.name
    key = _key(run, request)
    if run.ledger.finished(_stage(request), key):
        return folder
    began = time.monotonic()
    asked = _asked(run, request)
    variant = run.grid.open(request.variant)
    damage = DamagedModel(run.session.owner, variant)
    components = components_of(run.anatomy, damage.projections, run.subspaces, _neurons(run, request.language))
    with WorkProgress(_work(run, asked, request.confirm), console) as progress:
        progress.stage(f"diagnosing {request.variant} ({request.category} in {request.language})")
        frame = diagnosis.diagnose(
            run.session,
            damage,
            asked,
            components,
            variant.columns(),
            confirm=request.confirm,
            progress=lambda tokens: progress.advance(float(tokens)),
        )
    files = [write_frame(folder, "recovery", frame), folder / REQUEST_FILE]
    write_json(folder / REQUEST_FILE, request.model_dump(mode="json"))
    importance = diagnosis.importance(frame)
    (folder / REMEDY_FILE).unlink(missing_ok=True)  # of what this variant was before
    if importance:
        fitted_on = f"{len(asked.questions)} {request.category} questions ({request.half} of the minimal pairs)"
        remedy = Remedy(
            model_fingerprint=run.fingerprint,
            variant=request.variant,
            language=request.language,
            category=request.category,
            fitted_on=fitted_on,
            importance=importance,
        )
        remedy.save(folder / REMEDY_FILE)
        files.append(folder / REMEDY_FILE)
    for shown in _figures(request, frame):
        files += save(shown.draw(), run.folder / "figures", shown.name)
    run.ledger.finish(_stage(request), key, files, time.monotonic() - began)
    return folder


def finished(run: Run) -> Iterator[tuple[Request, pd.DataFrame]]:
    """Yield the diagnoses in a study's folder that are of its variants as they are now."""
    for path in sorted((run.folder / FOLDER).glob(f"*/{REQUEST_FILE}")):
        try:
            request = Request.model_validate(json.loads(path.read_text(encoding="utf-8")))
            request = check(run.study, request)
        except (ValueError, PrunescopeError):  # damaged, or of a variant that the study no longer has
            continue
        if run.ledger.finished(_stage(request), _key(run, request)):
            yield request, read_frame(path.parent / "recovery.parquet")


def shown(found: Mapping[Request, pd.DataFrame]) -> Iterator[ReportFigure]:
    """Yield the figures of diagnoses, drawn already."""
    for request, frame in found.items():
        yield from _figures(request, frame)


def _figures(request: Request, frame: pd.DataFrame) -> Iterator[ReportFigure]:
    return diagnosis_figures(
        frame,
        section=request.title,
        name=request.name,
        variant=request.variant,
        language=request.language,
        category=request.category,
    )


def check(study: Study, request: Request) -> Request:
    """Return a request with its language's tag in canonical form.

    Raises
    ------
    StudyError
        If the study has no such variant, language or category, or too few questions of it.
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
                f'this study has no items in {named(language)}; give it some with items = "file:FOLDER/{{lang}}.jsonl" '
                "under [tasks], or diagnose its text: --category text"
            )
        items = first_twins(source.items(language), study.tasks.per_category)
        categories = [*dict.fromkeys(item.category for item in items), ALL, TEXT]
        if request.category not in categories:
            raise StudyError(
                f'no items of the category "{shortened(request.category)}" in {named(language)}; '
                f"{did_you_mean(request.category, categories)}"
            )
        number = len(_twins(items, request.category))
    if len(range(number)[_half(request)]) < 2:
        which = "" if request.half == "all" else f" in the {request.half} half"
        raise StudyError(
            f'too few questions of the category "{request.category}" in {named(language)}{which}: intervals need two '
            "items (minimal pairs, where items have them) or segments at least"
        )
    return request.model_copy(update={"language": language})


def _asked(run: Run, request: Request) -> Asked:
    if request.category == TEXT:
        segments = run.texts.heldout[request.language][_half(request)]
        questions = text_questions(run.session, segments)
        return Asked(TEXT, TEXT, request.language, questions, [segment.id for segment in segments])
    items = run.texts.items[request.language]
    twins = _twins(items, request.category)
    items = [item for name in list(twins)[_half(request)] for item in twins[name]]
    questions = item_questions(run.session, items)
    return Asked(run.texts.task, request.category, request.language, questions, [item.twin for item in items])


def _twins(items: Sequence[Item], category: str) -> dict[str, list[Item]]:
    """Return the items of a category by minimal pair."""
    twins: dict[str, list[Item]] = {}
    for item in items:
        if category in (ALL, item.category):
            twins.setdefault(item.twin, []).append(item)
    return twins


def _half(request: Request) -> slice:
    return {"all": slice(None), "first": slice(0, None, 2), "second": slice(1, None, 2)}[request.half]


def _neurons(run: Run, language: str) -> dict[int, list[int]]:
    """Return the dense model's neurons that are specific to a language (LAPE), by block."""
    readings = {(DENSE, lang): Readings.open(run.readings_file(DENSE, lang)) for lang in run.study.languages}
    counts = lape.FiringCounts.of(readings, DENSE)
    probabilities = counts.probabilities()
    if not probabilities.size:
        return {}
    members = lape.select(probabilities).members[..., counts.languages.index(language)]
    return {layer: np.flatnonzero(own).tolist() for layer, own in enumerate(members)}


def _work(run: Run, asked: Asked, confirm: int) -> float:
    """Return the tokens that a diagnosis reads, about: gradients, curves and neurons, causes both ways, clean runs."""
    passes = 4 + 4 * len(run.anatomy.blocks) + 2 + 2 * confirm + 4
    return float(passes * sum(question.tokens for question in asked.questions))


def _stage(request: Request) -> str:
    return f"diagnosis {request.name}"


def _key(run: Run, request: Request) -> str:
    read = run.diagnosis_key(request.variant, request.language)
    return content_sha256([read, run.study.evaluation.rank, request.model_dump(mode="json")])
