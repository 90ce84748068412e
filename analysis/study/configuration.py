"""A study: what to prune, with which text, and what to measure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product

import tomli_w
from pydantic import Field, field_validator, model_validator

from probes import DENSE, Item, ItemSource, some_twins
from pruning import CalibrationSet, Recipe, Remedy, known_methods
from pruning.engine import Job, planned_jobs
from pruning.errors import ModelError, StudyError, shortened, unknown
from pruning.files import PARTIAL
from pruning.models.loading import Dtype, check_model_name, device_named
from pruning.models.naming import DEMO, DEMO_NAME
from pruning.text.languages import language_tags, named
from pruning.text.sources import BUNDLED_LANGUAGES

from .calibration_items import CalibrationItems
from .published import Checkpoint, Imported, all_checkpoints
from .sections import (
    NO_ITEMS,
    CalibrationConfig,
    EvaluationConfig,
    LensConfig,
    RecipeGrid,
    Section,
    TasksConfig,
    TextConfig,
)

_NAME = re.compile(r"\w[\w.+=-]*")
#: Maximum length of the name of a model pruned elsewhere, which is also a folder name.
LONGEST_NAME = 100


class StudyConfig(Section):
    """A study: one model, languages, calibration sets, recipes.

    Attributes
    ----------
    model
        ``"demo"``, a hub id, or a folder with a checkpoint.
    languages
        Evaluation languages, BCP-47 tags; at least two, since languages are compared.
    """

    model: str
    languages: tuple[str, ...] = Field(min_length=2)
    dtype: Dtype = "auto"
    device: str = "auto"
    text: TextConfig = TextConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    recipes: tuple[RecipeGrid, ...] = (RecipeGrid(method="wanda"),)
    evaluation: EvaluationConfig = EvaluationConfig()
    lens: LensConfig = LensConfig()
    tasks: TasksConfig = TasksConfig()
    imported: dict[str, Imported] = Field(
        default={}, description="models made elsewhere: name and checkpoint, or name and template of a collection"
    )

    @field_validator("model")
    @classmethod
    def _possible_model(cls, name: str) -> str:
        try:
            check_model_name(name)
        except ModelError as error:
            raise ValueError(str(error)) from error
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, name: str) -> str:
        try:
            device_named(name)
        except ModelError as error:
            raise ValueError(str(error)) from error
        return name

    @field_validator("languages")
    @classmethod
    def _known_languages(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return language_tags(tags)

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        self.calibration_sets()
        try:
            self.calibration_items()
        except StudyError as error:
            raise ValueError(str(error)) from error
        rank = self.evaluation.rank
        if rank is not None and rank > len(self.languages) - 1:
            raise ValueError(f"evaluation.rank {rank} must be less than the number of languages, {len(self.languages)}")
        jobs = self.jobs()
        for job in jobs:
            if job.recipe.calibrated and job.calibration is None:
                raise ValueError(
                    f'calibration.sets is empty, but "{job.recipe.method_label}" needs text; use ["en"], for example'
                )
        if not jobs and not self.imported:
            raise ValueError("this study has no models to compare; add [[recipes]] or [imported]")
        taken = taken_names() | {job.id for job in jobs}
        try:
            checkpoints = self.checkpoints()
        except (ModelError, StudyError) as error:
            raise ValueError(f"imported: {error}") from error
        for name in checkpoints:
            if not _NAME.fullmatch(name) or name.endswith(PARTIAL) or len(name) > LONGEST_NAME:
                raise ValueError(
                    f'imported: "{shortened(name)}" is not a valid name; use at most {LONGEST_NAME} letters, digits '
                    "and . + = _ -"
                )
            if name in taken:
                raise ValueError(
                    f'imported: "{shortened(name)}" is already the name of a method or another model; rename it'
                )
        return self

    @property
    def model_name(self) -> str:
        """Name of the model in frames."""
        return DEMO_NAME if self.model == DEMO else self.model

    def checkpoints(self) -> dict[str, Checkpoint]:
        """Return the models made elsewhere by name, those of collections whether they exist or not."""
        return all_checkpoints(self.imported)

    def calibration_sets(self) -> list[CalibrationSet]:
        """Return the calibration sets."""
        config = self.calibration
        pairs = [*product(config.sets, config.seeds), *config.extra]
        sets = [
            CalibrationSet.named(
                name,
                all_languages=self.languages,
                samples=config.samples,
                length=config.length,
                seed=seed,
                items=config.items or "",
                item_share=share,
            )
            for (name, seed), share in product(dict.fromkeys(pairs), config.shares)
        ]
        return list(dict.fromkeys(sets))

    def item_source(self) -> ItemSource | None:
        """Return the source of the items, if the study has any."""
        spec = self.tasks.items
        if spec is None:
            return ItemSource() if set(self.languages) <= set(BUNDLED_LANGUAGES) else None
        return None if spec == NO_ITEMS else ItemSource(spec)

    def calibration_items(self) -> CalibrationItems | None:
        """Return the items that models are calibrated on, if any are.

        Raises
        ------
        StudyError
            If the study has no items.
        """
        category, source = self.calibration.items, self.item_source()
        if category is None:
            return None
        if source is None:
            raise StudyError(
                f'calibration.items = "{shortened(category)}" needs items, and this study has none; add items = '
                '"file:FOLDER/{lang}.jsonl" under [tasks]'
            )
        sets = self.calibration_sets()
        languages = (*self.languages, *(language for one in sets for language in one.languages))
        return CalibrationItems(source, category, tuple(dict.fromkeys(languages)))

    def items(self, language: str, calibrated_on: CalibrationItems | None = None) -> list[Item]:
        """Return the items that models are asked in a language; none if the study has no items.

        If models are calibrated on items, those that share a template with them are left out.

        Parameters
        ----------
        language
            The language.
        calibrated_on
            Of :meth:`calibration_items`, if it is known, so that all items need not be read again.

        Raises
        ------
        StudyError
            If ``per_category`` names a category that the items do not have, or no item is left.
        """
        source = self.item_source()
        if source is None:
            return []
        items, wanted = source.items(language), self.tasks.per_category
        apart = calibrated_on or self.calibration_items()
        if isinstance(wanted, Mapping):
            categories = dict.fromkeys(item.category for item in items)
            for name in wanted:
                if name not in categories:
                    known = unknown("category", name, categories)
                    raise StudyError(f"tasks.per_category, items in {named(language)}: {known}")
        chosen = some_twins(apart.left(items) if apart else items, wanted)
        if not chosen:
            if apart is not None:
                raise StudyError(
                    f"calibration.items leaves no items to ask in {named(language)}; add items of other templates, or "
                    "ask more of another category (tasks.per_category)"
                )
            raise StudyError(
                f'tasks.per_category leaves no items in {named(language)}; raise a number, or set items = "none"'
            )
        return chosen

    def all_recipes(self) -> list[Recipe]:
        """Return all recipes, without duplicates."""
        return list(dict.fromkeys(recipe for grid in self.recipes for recipe in grid.recipes()))

    def remedies(self) -> dict[str, Remedy]:
        """Return the remedies that recipes use, by path."""
        return {grid.diagnosis: grid.remedy for grid in self.recipes if grid.diagnosis and grid.remedy}

    def jobs(self) -> list[Job]:
        """Return the jobs of all variants to make."""
        return planned_jobs(self.all_recipes(), self.calibration_sets())

    def to_toml(self) -> str:
        """Return the study file with every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def taken_names() -> set[str]:
    """Return the names that frames already use, so that no model pruned elsewhere can have them."""
    return {DENSE, *known_methods()}
