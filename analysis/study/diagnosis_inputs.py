"""What a diagnosis works on: questions, components, pruning errors; and the remedy that follows from it."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd

from probes import DENSE, Component, DamagedModel, Session, paired_questions, text_questions
from pruning import Remedy, Variant

from ..frames import TEXT
from ..metrics import firing
from ..metrics.halves import item_strata
from ..metrics.recovery import Asked, components_of, importance
from .analyses import Measured
from .diagnosis_request import DiagnosisRequest, asked_items, asked_segments

_HALVES_IN_WORDS = {
    "all": "all templates",
    "first": "the first half of the templates",
    "second": "the second half of the templates",
}


class DiagnosisInputs:
    """What one diagnosis works on, each part made when it is first needed.

    Parameters
    ----------
    measured
        What was measured of the models.
    session
        Of the dense model.
    request
        What to diagnose, already checked.
    """

    def __init__(self, measured: Measured, session: Session, request: DiagnosisRequest) -> None:
        self._measured = measured
        self._session = session
        self._request = request

    @cached_property
    def asked(self) -> Asked:
        """The questions."""
        measured, request = self._measured, self._request
        if request.category == TEXT:
            segments = asked_segments(measured.heldout[request.language], request)
            questions = text_questions(self._session, segments)
            return Asked(TEXT, TEXT, request.language, questions, [segment.id for segment in segments])
        items = asked_items(measured.items[request.language], request)
        questions = paired_questions(self._session, items)
        templates = [item.template for item in items]
        return Asked(measured.task, request.category, request.language, questions, templates, item_strata(items))

    @property
    def pairs(self) -> int:
        """How many questions are items of minimal pairs."""
        return sum(question.differing is not None for question in self.asked.questions)

    @cached_property
    def variant(self) -> Variant:
        """The variant."""
        return self._measured.variants[self._request.variant]

    @cached_property
    def damage(self) -> DamagedModel:
        """The variant as damage to the dense model."""
        return DamagedModel(self._session.owner, self.variant)

    @cached_property
    def components(self) -> list[Component]:
        """All components that are patched."""
        neurons, rates = self._language_neurons()
        return components_of(
            self._measured.anatomy,
            self.variant.projections,
            self._measured.subspaces,
            neurons,
            errors=self.errors,
            rates=rates,
            pairs=self.pairs > 0,
        )

    @cached_property
    def errors(self) -> list[np.ndarray]:
        """What pruning changes in the mean states of held-out segments after each block."""
        dense, pruned = (
            self._measured.readings[model, self._request.language] for model in (DENSE, self._request.variant)
        )
        return [(own - other).numpy() for own, other in zip(dense.pooled, pruned.pooled, strict=True)]

    def remedy(self, frame: pd.DataFrame) -> Remedy | None:
        """Return the remedy that follows from the frame ``recovery``, if anything was lost."""
        found = importance(frame)
        if not found:
            return None
        request = self._request
        return Remedy(
            model_fingerprint=self.variant.record.model_fingerprint,
            variant=request.variant,
            language=request.language,
            category=request.category,
            fitted_on=f"{len(self.asked.questions)} {request.category} questions ({_HALVES_IN_WORDS[request.half]})",
            importance=found,
        )

    def _language_neurons(self) -> tuple[dict[int, list[int]], np.ndarray | None]:
        """Return the dense model's neurons that are specific to the language (LAPE), by block, and all firing rates.

        None in a mixture of experts: what is patched there is all that an expert adds.
        """
        counts = firing.FiringCounts.of(self._measured.readings, DENSE)
        probabilities = counts.probabilities()
        if not probabilities.size or counts.owner is not None:
            return {}, None
        language = counts.languages.index(self._request.language)
        members = firing.select(probabilities).members[..., language]
        return {layer: np.flatnonzero(own).tolist() for layer, own in enumerate(members)}, probabilities[..., language]
