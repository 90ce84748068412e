"""The state that all stages of a study share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from probes import TokenLanguages

from .configuration import StudyConfig
from .model import DescribedModel, StudyModel
from .records import Records
from .texts import StudyTexts
from .variants import StudyVariants


@dataclass(frozen=True)
class Context:
    """A study and its folder.

    Attributes
    ----------
    study, folder
        The study and its folder.
    memory, device_memory
        Caps in bytes on resident memory and on device memory; free memory by default.
    whole
        What needs the whole model in memory, as the start of an error message; empty if nothing does.
    tell
        Called with progress messages.
    written
        Whether results are written to the folder; if not, the study is only planned.
    described
        Whether the model is known by its configuration only, without weights, and nothing is timed.
    workers
        How many workers there will be: work is cut into at least as many units where that costs little.
    """

    study: StudyConfig
    folder: Path
    memory: int | None = None
    device_memory: int | None = None
    whole: str = ""
    tell: Callable[[str], None] = field(default=lambda words: None)
    written: bool = True
    described: bool = False
    workers: int = 1

    @cached_property
    def records(self) -> Records:
        """Records of finished results."""
        return Records(self.folder, written=self.written, tell=self.tell)

    @cached_property
    def captions(self) -> dict[str, dict[str, str]]:
        """Captions of the study's figures, and of its tables, by name, under a hash of all that they are made from.

        They are asked for in every round of units, and frames are read to make them.
        """
        return {}

    @cached_property
    def texts(self) -> StudyTexts:
        """Text and questions."""
        return StudyTexts(self.study)

    @cached_property
    def model(self) -> StudyModel:
        """The dense model, loaded on first use."""
        kind: type[StudyModel] = DescribedModel if self.described else StudyModel
        return kind(self.study, self.records, self.memory, self.device_memory, self.whole, self.tell)

    @cached_property
    def token_languages(self) -> TokenLanguages:
        """Which language each token of the model's vocabulary is of, by the fitting text."""
        return TokenLanguages.of(self.model.session, self.texts.fitting)

    @cached_property
    def variants(self) -> StudyVariants:
        """The pruned models."""
        return StudyVariants(
            self.study,
            self.folder,
            self.records,
            self.texts,
            self.model,
            self.memory,
            self.device_memory,
            self.tell,
            described=self.described,
            workers=self.workers,
        )
