"""A study file: what to prune, with which text, and what to look at; validated, every default written out."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from importlib.resources import files as package_files
from itertools import product
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from probes import DENSE, ItemSource
from pruning import CalibrationSet, Corpus, Recipe, Remedy, known_methods, text_source
from pruning.allocation import DIAGNOSIS
from pruning.engine import Job
from pruning.errors import ModelError, StudyError, TextError, did_you_mean, first_line, shortened
from pruning.files import PARTIAL, is_folder
from pruning.models.embedded import DEMO, DEMO_NAME
from pruning.models.loading import Dtype, check_model_name, device_named
from pruning.patterns import n_of_m
from pruning.text.languages import language_tags
from pruning.text.sources import BUNDLED_LANGUAGES, HubDataset
from pruning.variants.variant import planned_jobs

_TextSpec = str | HubDataset
_NAME = re.compile(r"\w[\w.+=-]*")
#: Letters in the name of a model that was pruned elsewhere; it is the name of a folder.
_LONGEST_NAME = 100
#: What a study says that asks no items.
NO_ITEMS = "none"
#: Share of weights removed when a study does not say.
DEFAULT_SPARSITY = 0.5


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextConfig(_Section):
    """Where text comes from: ``"bundled"``, ``"file:FOLDER/{lang}.jsonl"``, ``"hub:PRESET"`` or a table.

    Attributes
    ----------
    calibration
        What pruning is calibrated with.
    parallel
        Fits the LSAR subspaces; segments with the same id in all languages are used.
    heldout
        Everything that is evaluated.
    """

    calibration: _TextSpec = "bundled"
    parallel: _TextSpec = "bundled"
    heldout: _TextSpec = "bundled"

    @field_validator("*")
    @classmethod
    def _known_source(cls, spec: _TextSpec) -> _TextSpec:
        if isinstance(spec, str):
            try:
                text_source(spec)
            except TextError as error:
                raise ValueError(str(error)) from error
        return spec

    def corpus(self) -> Corpus:
        """Open the sources."""
        sources = [
            text_source(spec) if isinstance(spec, str) else spec
            for spec in (self.calibration, self.parallel, self.heldout)
        ]
        return Corpus(calibration=sources[0], parallel=sources[1], heldout=sources[2])


class CalibrationConfig(_Section):
    """Calibration sets: a grid of mixes and seeds, all with the same amount of text."""

    sets: tuple[str, ...] = ("all",)
    samples: int = Field(default=32, ge=1)
    length: int = Field(default=256, ge=8)
    seeds: tuple[int, ...] = (0,)
    extra: tuple[tuple[str, int], ...] = Field(
        default=(), description="further (set, seed) pairs, for a second seed of some sets only"
    )


def _axis(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class RecipeGrid(_Section):
    """One or several recipes: every key but `roles` and `diagnosis` may be a list, lists make a grid."""

    method: str | tuple[str, ...]
    sparsity: float | tuple[float, ...] | None = None
    pattern: str | tuple[str, ...] = ""
    allocation: str | tuple[str, ...] = ""
    propagation: str | tuple[str, ...] = ""
    roles: tuple[str, ...] = Field(default=(), description="only these projections, together")
    blocks: str | tuple[str, ...] = ""
    parameters: dict[str, float | tuple[float, ...]] = {}
    diagnosis: str | None = Field(default=None, description='the remedy.json that allocation "diagnosis" follows')
    _remedy: Remedy | None = PrivateAttr(None)

    @field_validator("diagnosis")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else os.path.normpath(Path.cwd() / path)

    @model_validator(mode="after")
    def _valid(self) -> RecipeGrid:
        if self.diagnosis is not None:
            if DIAGNOSIS not in _axis(self.allocation):
                raise ValueError(f'diagnosis goes with allocation = "{DIAGNOSIS}"; add that, or leave diagnosis out')
            self._remedy = Remedy.open(self.diagnosis)
        self.recipes()
        return self

    @property
    def remedy(self) -> Remedy | None:
        """What `diagnosis` says, as it was when the study was read."""
        return self._remedy

    def recipes(self) -> list[Recipe]:
        """Return the recipes of the grid; patterns n:m, which settle the sparsity, are one point of its axis."""
        axes = {
            name: _axis(getattr(self, name)) for name in ("method", "pattern", "allocation", "propagation", "blocks")
        }
        parameters = {name: _axis(value) for name, value in self.parameters.items()}
        recipes = []
        for name, axis in {**axes, **parameters, "sparsity": _axis(self.sparsity)}.items():
            if not axis:
                raise ValueError(f"{name} is an empty list, which makes no recipes; leave it out or give it a value")
        for point in product(*axes.values(), *parameters.values()):
            given = dict(zip(axes, point, strict=False))
            chosen = dict(zip(parameters, point[len(axes) :], strict=True))
            sparsities = _axis(self.sparsity)
            if n_of_m(given["pattern"]) and (len(axes["pattern"]) > 1 or len(sparsities) > 1):
                sparsities = (None,)
            for sparsity in sparsities:
                if sparsity is None and not n_of_m(given["pattern"]):
                    sparsity = DEFAULT_SPARSITY
                settings = {**given, "sparsity": sparsity, "roles": self.roles, "parameters": chosen}
                if given["allocation"] == DIAGNOSIS and self.remedy is not None:
                    settings["importance"] = self.remedy.importance
                recipes.append(Recipe.model_validate(settings))
        return list(dict.fromkeys(recipes))


class EvaluationConfig(_Section):
    """How much text is read, and how."""

    segments: int = Field(default=128, ge=2, description="held-out segments a language")
    fit_segments: int = Field(default=128, ge=2, description="parallel segments a language that fit the subspaces")
    max_length: int = Field(default=256, ge=8, description="tokens of a segment that are read")
    batch_tokens: int = Field(default=1024, ge=8, description="tokens in a batch; bounds the memory")
    special_tokens: bool = Field(default=False, description="count BOS and the like in means, firing and signal")
    rank: int | None = Field(default=None, ge=1, description="of the LSAR subspaces; languages less one by default")


class TasksConfig(_Section):
    """Questions that the models are asked.

    Attributes
    ----------
    items
        ``"bundled"``, ``"file:FOLDER/{lang}.jsonl"`` or ``"none"``; by default the bundled ones, if there are some in
        every language of the study.
    per_category
        Items of each category at most; all by default.
    harness
        Tasks of EleutherAI's lm-evaluation-harness by name; ``"preset"`` stands for those of
        :data:`analysis.study.harness.STUDY_BENCHMARKS` in the study's languages. Needs the extra ``tasks``.
    shots, limit
        Examples before each question there, and questions of each task at most.
    folders
        Of further tasks for the harness.
    """

    items: str | None = None
    per_category: int | None = Field(default=None, ge=2)
    harness: tuple[str, ...] = ()
    shots: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    folders: tuple[str, ...] = ()

    @field_validator("items")
    @classmethod
    def _known_items(cls, spec: str | None) -> str | None:
        if spec not in (None, NO_ITEMS):
            try:
                ItemSource(spec)
            except TextError as error:
                raise ValueError(str(error)) from error
        return spec


class Study(_Section):
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
    tasks: TasksConfig = TasksConfig()
    imported: dict[str, str] = Field(
        default={}, description="models that were pruned elsewhere: what to call each, and its checkpoint"
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
    def _consistent(self) -> Study:
        self.calibration_sets()
        rank = self.evaluation.rank
        if rank is not None and rank > len(self.languages) - 1:
            raise ValueError(f"evaluation.rank {rank} is more than {len(self.languages) - 1}, the languages less one")
        jobs = self.jobs()
        for job in jobs:
            if job.recipe.calibrated and job.calibration is None:
                raise ValueError(
                    f'calibration.sets is empty, and "{job.recipe.method}" needs text; give it ["en"], say'
                )
        if not jobs and not self.imported:
            raise ValueError("there is nothing to do: give at least one of [[recipes]], or [imported] models")
        taken = _taken_names() | {job.id for job in jobs}
        for name, source in self.imported.items():
            try:
                check_model_name(source)
            except ModelError as error:
                raise ValueError(f"imported: {error}") from error
            if not _NAME.fullmatch(name) or name.endswith(PARTIAL) or len(name) > _LONGEST_NAME:
                raise ValueError(
                    f'imported: "{shortened(name)}" cannot be used as a name; use letters, digits and . + = _ -, '
                    f"{_LONGEST_NAME} at most"
                )
            if name in taken:
                raise ValueError(
                    f'imported: "{shortened(name)}" is the name of a method or of another model here; choose another'
                )
        return self

    @property
    def model_name(self) -> str:
        """What frames call the model."""
        return DEMO_NAME if self.model == DEMO else self.model

    def calibration_sets(self) -> list[CalibrationSet]:
        """Return the calibration sets."""
        config = self.calibration
        pairs = [*product(config.sets, config.seeds), *config.extra]
        return [
            CalibrationSet.named(
                name, all_languages=self.languages, samples=config.samples, length=config.length, seed=seed
            )
            for name, seed in dict.fromkeys(pairs)
        ]

    def item_source(self) -> ItemSource | None:
        """Return where items come from, if there are any."""
        spec = self.tasks.items
        if spec is None:
            return ItemSource() if set(self.languages) <= set(BUNDLED_LANGUAGES) else None
        return None if spec == NO_ITEMS else ItemSource(spec)

    def all_recipes(self) -> list[Recipe]:
        """Return every recipe once."""
        return list(dict.fromkeys(recipe for grid in self.recipes for recipe in grid.recipes()))

    def remedies(self) -> dict[str, Remedy]:
        """Return every remedy that a recipe follows, by its path."""
        return {grid.diagnosis: grid.remedy for grid in self.recipes if grid.diagnosis and grid.remedy}

    def jobs(self) -> list[Job]:
        """Return every variant that is to be made."""
        return planned_jobs(self.all_recipes(), self.calibration_sets())

    def to_toml(self) -> str:
        """Return the study file with every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _taken_names() -> set[str]:
    """Return what no model that was pruned elsewhere can be called, since frames call other things so."""
    return {DENSE, *known_methods()}


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Relative paths in ``file:`` sources, of the model folder and of diagnoses are relative to the study file.

    Raises
    ------
    StudyError
        If the file is missing, not TOML, has an unknown key or a value that cannot be; or if a diagnosis that it
        names cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f'there is no study file {path}; write one, or try "prunescope run demo"') from error
    except IsADirectoryError as error:
        raise StudyError(f"{path} is a folder; give the study file, such as {path / 'study.toml'}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not TOML: {first_line(error)}") from error
    except OSError as error:
        raise StudyError(f"cannot read the study file {shortened(path, 200)}: {error.strerror}") from error
    return _anchored(parse_study(_diagnoses_anchored(content, path.parent), str(path)), path.parent)


def resolved_study(name: str) -> Study:
    """Return the embedded study if `name` is ``demo``, else the one in that file."""
    return demo_study() if name == DEMO else load_study(Path(name))


def demo_study() -> Study:
    """Return the embedded study: a real model and real text that come with prunescope."""
    text = (package_files("analysis.study") / "demo.toml").read_text(encoding="utf-8")
    return parse_study(tomllib.loads(text), "demo.toml")


def comparison_study(
    dense: str,
    pruned: str,
    *,
    languages: Sequence[str] = BUNDLED_LANGUAGES,
    text: str = "bundled",
    segments: int = EvaluationConfig.model_fields["segments"].default,
) -> Study:
    """Return the study that measures one model that was pruned elsewhere against its dense parent.

    Parameters
    ----------
    dense, pruned
        Hub ids or folders with checkpoints; ``"demo"`` for the embedded model.
    languages
        BCP-47 tags.
    text
        Where all text comes from.
    segments
        Held-out segments a language, and parallel ones to fit the subspaces.

    Raises
    ------
    StudyError
        If one of these cannot be.
    """
    name = re.sub(r"[^\w.+=-]+", "_", Path(pruned).name).strip("_").lstrip(".+=-")[:_LONGEST_NAME] or "pruned"
    if name in _taken_names():  # nobody was asked for a name here, so nobody is told to choose another
        name += "-checkpoint"
    return parse_study(
        {
            "model": dense,
            "languages": list(languages),
            "text": dict.fromkeys(TextConfig.model_fields, text),
            "calibration": {"sets": []},
            "recipes": [],
            "imported": {name: pruned},
            "evaluation": {"segments": segments, "fit_segments": segments},
        },
        "compare",
    )


def parse_study(content: dict[str, Any], where: str) -> Study:
    """Check the content of a study file.

    Raises
    ------
    StudyError
        One line on the first thing that is wrong.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        # A table that should be a dataset also fails to be a string; what it lacks as a dataset says more.
        first = min(error.errors(), key=lambda e: e["type"] == "string_type")
        raise StudyError(f"{where}: {_explained(first)}") from error


#: What pydantic says of Python's types, in words of TOML.
_IN_TOML = {
    "tuple_type": 'should be a list in brackets, such as ["a", "b"] or [0, 1]',
    "dict_type": "should be a table, such as { name = 0.5 }",
    "string_type": 'should be text in quotes, such as "a"',
}


def _explained(error: Any) -> str:
    kinds = ("str", "float", "HubDataset")
    place = ".".join(shortened(part) for part in error["loc"] if part not in kinds and "tuple" not in str(part))
    if error["type"] == "extra_forbidden":
        section, _, key = place.rpartition(".")
        return f'unknown key "{key}"{f" in [{section}]" if section else ""}; {did_you_mean(key, _keys(section))}'
    if error["type"] == "missing":
        return f'the key "{place}" is missing'
    if place == "recipes" and error["type"] == "tuple_type":
        return "recipes: every recipe begins with a line [[recipes]]"
    message = _IN_TOML.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{place}: {message}" if place else message


def _keys(section: str) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "": Study,
        "text": TextConfig,
        "calibration": CalibrationConfig,
        "recipes": RecipeGrid,
        "evaluation": EvaluationConfig,
        "tasks": TasksConfig,
    }
    first = section.split(".")[0]
    return list(sections[first].model_fields) if first in sections else list(HubDataset.model_fields)


def _anchored(study: Study, folder: Path) -> Study:
    """Resolve relative paths against the study file's folder."""

    def anchor(spec: Any) -> Any:
        if isinstance(spec, str) and spec.startswith("file:"):
            return "file:" + os.path.normpath(folder / spec.removeprefix("file:"))
        return spec

    text = TextConfig(**{part: anchor(getattr(study.text, part)) for part in TextConfig.model_fields})

    def checkpoint(name: str) -> str:
        return os.path.normpath(folder / name) if name != DEMO and is_folder(folder / name) else name

    imported = {name: checkpoint(source) for name, source in study.imported.items()}
    folders = tuple(os.path.normpath(folder / name) for name in study.tasks.folders)
    tasks = study.tasks.model_copy(update={"items": anchor(study.tasks.items), "folders": folders})
    update = {"text": text, "model": checkpoint(study.model), "imported": imported, "tasks": tasks}
    return study.model_copy(update=update)


def _diagnoses_anchored(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve the paths of diagnoses likewise, but before a study is checked: recipes are made of what they say."""
    grids = content.get("recipes")
    if not isinstance(grids, list):
        return content
    return content | {
        "recipes": [
            grid | {"diagnosis": str(folder / grid["diagnosis"])}
            if isinstance(grid, dict) and isinstance(grid.get("diagnosis"), str)
            else grid
            for grid in grids
        ]
    }
