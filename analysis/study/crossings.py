"""The part of a diagnosis that puts states of other languages into its items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from probes import DENSE, Item, item_questions
from probes.patching import cross
from pruning.files import content_sha256

from ..frames import dense_columns
from ..metrics.crossing import Crossing, Pairing, crossing_frame
from .context import Context
from .diagnosis_inputs import DiagnosisInputs
from .diagnosis_request import DiagnosisRequest, asked_items
from .read import questions_key
from .units import Advance

#: Names of these results begin so.
CROSSING = "crossing"


class Crossings:
    """The margins with the states of each other language, of the dense model and the variant, as results on their own.

    Parameters
    ----------
    context, request
        Of the diagnosis.
    inputs
        Returns what it works on.
    base
        Hash of all that the diagnosis depends on, but for the items of other languages.
    """

    def __init__(
        self, context: Context, request: DiagnosisRequest, inputs: Callable[[], DiagnosisInputs], base: str
    ) -> None:
        self._context, self._request, self._inputs, self._base = context, request, inputs, base

    @cached_property
    def keys(self) -> dict[str, str]:
        """A hash of everything that each result depends on, by name."""
        keys = {source: questions_key(self._context, DENSE, source) for source in self._request.sources}
        return {
            f"{CROSSING}/{model}/{source}": content_sha256([self._base, model, source, keys[source]])
            for model, source in self._places()
        }

    def compute(self, name: str, path: Path, progress: Advance) -> Path:
        """Compute one result, and return its file."""
        _, model, source = name.split("/")
        session, asked = self._context.model.session, self._inputs().asked
        others = self._items(source)
        pairing = Pairing.of(self._own_items(), others)
        used, places = np.unique(np.stack([pairing.sources, pairing.controls]), return_inverse=True)
        questions = [asked.questions[i] for i in pairing.items]
        sources = item_questions(session, [others[i] for i in used])
        with nullcontext() if model == DENSE else self._inputs().damage.damaged():
            found = cross(session, questions, sources, places.reshape(2, -1), progress=progress)
        answers = np.array([question.answer for question in asked.questions])
        Crossing.of(pairing, found, answers).save(path)
        return path

    def frame(self, files: Mapping[str, Path]) -> pd.DataFrame:
        """Return the frame ``crossing``, given the file of each result."""
        found = {
            (model, source): Crossing.open(files[f"{CROSSING}/{model}/{source}"]) for model, source in self._places()
        }
        asked, variant = self._inputs().asked, self._inputs().variant
        columns = {DENSE: dense_columns(self._context.study.model_name), self._request.variant: variant.columns()}
        place = {"language": asked.language, "task": asked.task, "category": asked.category}
        return crossing_frame(place, found, columns, asked.templates)

    def _places(self) -> Iterator[tuple[str, str]]:
        yield from ((model, source) for model in (DENSE, self._request.variant) for source in self._request.sources)

    def _own_items(self) -> list[Item]:
        return asked_items(self._context.texts.items[self._request.language], self._request)

    def _items(self, language: str) -> list[Item]:
        """Return all items of a language in the category that is asked."""
        return asked_items(self._context.texts.items[language], self._request.model_copy(update={"half": "all"}))
