"""The text of a study, and the questions that its models are asked."""

from __future__ import annotations

from functools import cached_property

from probes import Item
from probes.items import items_fingerprint
from pruning import CalibrationSet, Corpus, Segment
from pruning.text.calibration import set_fingerprint
from pruning.text.sources import fingerprint

from .configuration import StudyConfig


class StudyTexts:
    """Text by language; each part is read when it is first needed.

    Parameters
    ----------
    study
        The study.
    """

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._calibrated_on = study.calibration_items()
        self.corpus: Corpus = study.text.corpus(self._calibrated_on)

    @cached_property
    def heldout(self) -> dict[str, list[Segment]]:
        """The held-out segments."""
        count = self._study.evaluation.segments
        return {language: self.corpus.take("heldout", language, count) for language in self._study.languages}

    @cached_property
    def fitting(self) -> dict[str, list[Segment]]:
        """The segments that subspaces are fitted on, with the same ids in every language."""
        return self.corpus.aligned("parallel", self._study.languages, self._study.evaluation.fit_segments)

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """The questions; none if the study has no items."""
        if self._study.item_source() is None:
            return {}
        return {language: self._study.items(language, self._calibrated_on) for language in self._study.languages}

    @property
    def task(self) -> str:
        """Name of the questions in frames."""
        source = self._study.item_source()
        return source.task if source else ""

    @cached_property
    def calibration_fingerprints(self) -> dict[str, str]:
        """SHA-256 of the calibration text, by language."""
        return {language: known for (language, items), known in self._pools.items() if not items}

    @cached_property
    def calibration_item_fingerprints(self) -> dict[str, str]:
        """SHA-256 of the items that models are calibrated on, by language; none if they are not."""
        return {language: known for (language, items), known in self._pools.items() if items}

    @cached_property
    def _pools(self) -> dict[tuple[str, str], str]:
        """SHA-256 of all that calibration sets draw from, by language and category of items (none: text)."""
        parts = dict.fromkeys(part for calibration in self._study.calibration_sets() for part in calibration.parts())
        return {part: fingerprint(self.corpus.pool(*part)) for part in parts}

    def of_calibration(self, calibration: CalibrationSet) -> str:
        """Return a SHA-256 of the text that a calibration set draws from."""
        return set_fingerprint(calibration, lambda language, items: self._pools[language, items])

    @cached_property
    def heldout_fingerprints(self) -> dict[str, str]:
        """SHA-256 of the held-out text, by language."""
        return {language: fingerprint(segments) for language, segments in self.heldout.items()}

    @cached_property
    def fitting_fingerprints(self) -> dict[str, str]:
        """SHA-256 of the fitting text, by language."""
        return {language: fingerprint(segments) for language, segments in self.fitting.items()}

    @cached_property
    def item_fingerprints(self) -> dict[str, str]:
        """SHA-256 of the questions, by language."""
        return {language: items_fingerprint(items) for language, items in self.items.items()}

    def check(self, *, calibration_only: bool = False) -> None:
        """Read all text, so that missing text is reported before anything expensive starts.

        Raises
        ------
        TextError
            If text is missing, unreadable or too little.
        """
        if not calibration_only:
            assert self.heldout
            assert self.fitting
            assert self.items is not None
        assert self.calibration_fingerprints is not None
