"""Items to calibrate on: those of one half of a category's templates, which are then not asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from probes import Item, ItemSource
from pruning import Segment
from pruning.errors import StudyError, TextError, unknown
from pruning.text.languages import named

from ..metrics.halves import FIRST, HALVES, halves, item_strata


@dataclass(frozen=True)
class CalibrationItems:
    """The items of a category whose text models may be calibrated on, and those that are left to ask.

    A template is used up, or asked, in all languages alike: items made after it are translations of each other. Where
    languages have the same templates, the ones used up are those that ``prunescope diagnose --half first`` asks of the
    same items.

    Attributes
    ----------
    source, category
        The items, and the category to calibrate on.
    languages
        All languages that are evaluated or calibrated on; the first that has a template says which half it is in.
    """

    source: ItemSource
    category: str
    languages: tuple[str, ...]

    def segments(self, category: str, language: str) -> Sequence[Segment]:
        """Return the items to calibrate on as text: prompt and right answer.

        Raises
        ------
        StudyError, TextError
            If the language has no items of the category, or all of them are to be asked.
        """
        assert category == self.category
        found = [item for item in self._by_language[language] if item.template in self.used]
        if not found:
            raise TextError(
                f"no {category} items to calibrate on in {named(language)}: none is of the first half of the "
                "templates; calibrate on another category or language, or add items"
            )
        return [Segment(item.id, item.prompt + item.choices[item.answer]) for item in found]

    def left(self, items: Sequence[Item]) -> list[Item]:
        """Return those items that share neither template nor minimal pair with any to calibrate on, in any language."""
        return [item for item in items if item.template not in self.used and item.twin not in self._twins]

    @cached_property
    def used(self) -> frozenset[str]:
        """The templates to calibrate on.

        Raises
        ------
        StudyError
            If there is no such category, or it has a single template.
        """
        pooled: dict[str, list[Item]] = {}  # by template, as the first language that has it
        for items in self._by_language.values():
            known = set(pooled)
            for item in items:
                if item.template not in known:
                    pooled.setdefault(item.template, []).append(item)
        if len(pooled) < 2:
            raise StudyError(
                f'calibration.items = "{self.category}" has a single template, which cannot be both calibrated on and '
                "asked; choose another category, or add items of another template"
            )
        every = [item for items in pooled.values() for item in items]
        half = halves([item.template for item in every], item_strata(every))
        return frozenset(item.template for item, own in zip(every, half, strict=True) if HALVES[own] == FIRST)

    @cached_property
    def _twins(self) -> frozenset[str]:
        return frozenset(
            item.twin for items in self._by_language.values() for item in items if item.template in self.used
        )

    @cached_property
    def _by_language(self) -> dict[str, list[Item]]:
        found = {}
        for language in self.languages:
            items = self.source.items(language)
            categories = dict.fromkeys(item.category for item in items)
            if self.category not in categories:
                known = unknown("category", self.category, categories)
                raise StudyError(f"calibration.items, items in {named(language)}: {known}")
            found[language] = [item for item in items if item.category == self.category]
        return found
