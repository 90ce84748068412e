"""The stage of a study that asks its models questions: the items, and tasks of the harness."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from probes import DENSE, ChoiceScores, item_questions, score
from probes.items import items_fingerprint
from probes.reading import Progress
from pruning.files import content_sha256

from ..frames import joined, read_frame, write_frame
from ..metrics import accuracy as tasks
from . import harness

if TYPE_CHECKING:
    from .run import Run


class Asking:
    """Asks the models of a study what they have not been asked yet.

    Parameters
    ----------
    run
        The study; items are those of its texts.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.items = run.texts.items

    def items_key(self, model: str, language: str) -> str:
        """Return a hash of all that a model's scores in a language depend on."""
        variant = self.run.grid.keys.get(model, DENSE)
        return content_sha256([self.run.reading_key, items_fingerprint(self.items[language]), variant])

    @cached_property
    def key(self) -> str:
        """A hash of all that the frame ``items`` depends on."""
        scores = [self.items_key(model, language) for model in self.run.models for language in self.items]
        return content_sha256([scores, self.run.texts.task, self._harness_key])

    def pending(self) -> dict[str, list[str]]:
        """Return the models that are still to be asked, by language."""
        missing = {
            language: [model for model in self.run.models if not self._finished(model, language)]
            for language in self.items
        }
        return {language: models for language, models in missing.items() if models}

    def ask(self, language: str, models: Sequence[str], progress: Progress) -> None:
        """Ask some models the items of one language."""
        questions = item_questions(self.run.session, self.items[language])
        for model in models:
            began = time.monotonic()
            with self._as(model):
                scores = score(self.run.session, questions, progress)
            path = self._file(model, language)
            scores.save(path)
            stage = _stage(model, language)
            self.run.ledger.finish(stage, self.items_key(model, language), [path], time.monotonic() - began)

    @property
    def harness_pending(self) -> bool:
        """Whether tasks of the harness are still to be asked."""
        return bool(self.run.study.tasks.harness) and not self.run.ledger.finished("harness", self._harness_key)

    def ask_harness(self) -> None:
        """Ask all models the tasks of the harness."""
        config = self.run.study.tasks
        began = time.monotonic()
        frame = harness.evaluate(
            self.run.model,
            self.run.tokenizer,
            harness.named_tasks(config.harness, self.run.study.languages),
            [self.run.grid.open(name) for name in self.run.grid.names],
            shots=config.shots,
            limit=config.limit,
            folders=[Path(folder) for folder in config.folders],
            model_name=self.run.study.model_name,
            owner=self.run.session.owner,
        )
        path = write_frame(self._harness_file.parent, "items", frame)
        self.run.ledger.finish("harness", self._harness_key, [path], time.monotonic() - began)

    def frame(self, columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
        """Return the frame ``items`` of everything that was asked."""
        scores = {
            (model, language): ChoiceScores.open(self._file(model, language))
            for model in self.run.models
            for language in self.items
        }
        parts = [tasks.item_frame(scores, self.items, columns, self.run.texts.task)]
        if self.run.study.tasks.harness:
            parts.append(read_frame(self._harness_file))
        return joined("items", parts)

    @cached_property
    def _harness_key(self) -> str:
        config = self.run.study.tasks.model_dump(include={"harness", "shots", "limit", "folders"})
        return content_sha256([self.run.common, config, list(self.run.study.languages), self.run.grid.keys])

    @property
    def _harness_file(self) -> Path:
        return self.run.folder / "readings" / "harness" / "items.parquet"

    def _file(self, model: str, language: str) -> Path:
        return self.run.folder / "readings" / model / f"{language}-items.safetensors"

    def _finished(self, model: str, language: str) -> bool:
        return self.run.ledger.finished(_stage(model, language), self.items_key(model, language))

    @contextmanager
    def _as(self, model: str) -> Iterator[None]:
        """Make the loaded model one of the study's inside a ``with`` block."""
        with nullcontext() if model == DENSE else self.run.session.owner.pruned_to(self.run.grid.open(model)):
            yield


def _stage(model: str, language: str) -> str:
    return f"items {model} {language}"
