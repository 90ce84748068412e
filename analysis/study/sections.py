"""The sections of a study file, each validated on its own, every default written out."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from probes import ItemSource
from pruning import Corpus, Recipe, Remedy, text_source
from pruning.allocation import DIAGNOSIS
from pruning.errors import TextError
from pruning.patterns import n_of_m
from pruning.text.sources import HubDataset

_TextSpec = str | HubDataset
#: What a study says that asks no items.
NO_ITEMS = "none"
#: Share of weights removed when a study does not say.
DEFAULT_SPARSITY = 0.5


class Section(BaseModel):
    """A table of a study file: nothing unknown in it, and not to be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextConfig(Section):
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


class CalibrationConfig(Section):
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


class RecipeGrid(Section):
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


class EvaluationConfig(Section):
    """How much text is read, and how."""

    segments: int = Field(default=128, ge=2, description="held-out segments a language")
    fit_segments: int = Field(default=128, ge=2, description="parallel segments a language that fit the subspaces")
    max_length: int = Field(default=256, ge=8, description="tokens of a segment that are read")
    batch_tokens: int = Field(default=1024, ge=8, description="tokens in a batch; bounds the memory")
    special_tokens: bool = Field(default=False, description="count BOS and the like in means, firing and signal")
    rank: int | None = Field(default=None, ge=1, description="of the LSAR subspaces; languages less one by default")


class TasksConfig(Section):
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
