"""The sections of a study file, each validated on its own, every default written out.

What recipes are made with needs PyTorch, and is imported when there are any to make.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

import pruning
from probes import ItemSource
from pruning import Corpus, Remedy, text_source
from pruning.errors import TextError
from pruning.parameters import NONE, SPECIFIC
from pruning.text.sources import HubDataset, ItemText

_TextSpec = str | HubDataset
#: Value of `items` for a study without items.
NO_ITEMS = "none"
#: Default sparsity.
DEFAULT_SPARSITY = 0.5


class Section(BaseModel):
    """A table of a study file: immutable, with no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextConfig(Section):
    """Where text comes from: ``"bundled"``, ``"file:FOLDER/{lang}.jsonl"``, ``"hub:PRESET"`` or a table.

    Attributes
    ----------
    calibration
        Calibration text.
    parallel
        Text to fit the LSAR subspaces; only segments with the same id in all languages are used.
    heldout
        Evaluation text.
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

    def corpus(self, items: ItemText | None = None) -> Corpus:
        """Open the sources; with items to calibrate on, if there are any."""
        sources = [
            text_source(spec) if isinstance(spec, str) else spec
            for spec in (self.calibration, self.parallel, self.heldout)
        ]
        return Corpus(calibration=sources[0], parallel=sources[1], heldout=sources[2], items=items)


class CalibrationConfig(Section):
    """Calibration sets: a grid of mixes, seeds and shares of items, all with the same amount of text."""

    sets: tuple[str, ...] = ("all",)
    samples: int = Field(default=32, ge=1)
    length: int = Field(default=256, ge=8)
    seeds: tuple[int, ...] = (0,)
    extra: tuple[tuple[str, int], ...] = Field(
        default=(), description="further (set, seed) pairs, such as a second seed for some sets only"
    )
    items: str | None = Field(default=None, min_length=1, description="category of the items to calibrate on")
    item_share: float | tuple[float, ...] | None = Field(
        default=None, description="share of the samples that are items of this category; every set with every share"
    )

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of items."""
        return (0.0,) if self.item_share is None else _axis(self.item_share)

    @model_validator(mode="after")
    def _items_with_a_share(self) -> CalibrationConfig:
        if not self.shares:
            raise ValueError("item_share is an empty list; leave it out or add a value")
        if self.items is None and self.item_share is not None:
            raise ValueError('item_share needs items, the category to calibrate on; add items = "reasoning", say')
        if self.items is not None and self.item_share is None:
            raise ValueError("items are calibrated on by a share of the samples; add item_share = [0, 0.5, 1], say")
        return self


def _axis(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class RecipeGrid(Section):
    """One or several recipes: every key may be a list, and lists span a grid, but `roles` and names of files."""

    method: str | tuple[str, ...]
    sparsity: float | tuple[float, ...] | None = None
    pattern: str | tuple[str, ...] = ""
    allocation: str | tuple[str, ...] = ""
    propagation: str | tuple[str, ...] = ""
    refinement: str | tuple[str, ...] = NONE
    correction: str | tuple[str, ...] = NONE
    recover: str | tuple[str, ...] = NONE
    roles: tuple[str, ...] = Field(default=(), description="prune only these projections")
    blocks: str | tuple[str, ...] = ""
    parameters: dict[str, float | tuple[float, ...]] = {}
    bits: int | tuple[int, ...] | None = Field(default=None, description="of a code, for methods that quantize")
    group: int | tuple[int, ...] | None = Field(default=None, description="inputs that share a scale; 0: a whole row")
    diagnosis: str | None = Field(default=None, description='the remedy.json for allocation "diagnosis"')
    subspaces: str | None = Field(default=None, description='the subspaces.safetensors for the parameter "specific"')
    _remedy: Remedy | None = PrivateAttr(None)
    _subspaces: Any = PrivateAttr(None)

    @field_validator("diagnosis", "subspaces")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else os.path.normpath(Path.cwd() / path)

    @model_validator(mode="after")
    def _valid(self) -> RecipeGrid:
        from pruning.allocation import DIAGNOSIS

        if self.diagnosis is not None:
            if DIAGNOSIS not in _axis(self.allocation):
                raise ValueError(f'diagnosis requires allocation = "{DIAGNOSIS}"; add it, or leave diagnosis out')
            self._remedy = Remedy.open(self.diagnosis)
        if self.subspaces is not None:
            if all(weight == 1 for weight in _axis(self.parameters.get(SPECIFIC, 1.0))):
                raise ValueError(f"subspaces are for parameters = {{ {SPECIFIC} = 0 }}; add it, or leave subspaces out")
            self._subspaces = pruning.Subspaces.open(self.subspaces)
        self.recipes()
        return self

    @property
    def remedy(self) -> Remedy | None:
        """The remedy in the file `diagnosis`, as of when the study was loaded."""
        return self._remedy

    @property
    def known_subspaces(self) -> pruning.Subspaces | None:
        """The subspaces in the file `subspaces`, as of when the study was loaded."""
        found: pruning.Subspaces | None = self._subspaces
        return found

    def recipes(self) -> list[pruning.Recipe]:
        """Return the recipes of the grid; patterns n:m fix the sparsity, so they are not crossed with it."""
        from pruning.allocation import DIAGNOSIS
        from pruning.methods import method_named
        from pruning.patterns import n_of_m

        names = (
            "method",
            "pattern",
            "allocation",
            "propagation",
            "refinement",
            "correction",
            "recover",
            "blocks",
            "bits",
            "group",
        )
        axes = {name: _axis(getattr(self, name)) for name in names}
        parameters = {name: _axis(value) for name, value in self.parameters.items()}
        recipes = []
        for name, axis in {**axes, **parameters, "sparsity": _axis(self.sparsity)}.items():
            if not axis:
                raise ValueError(f"{name} is an empty list, which gives no recipes; leave it out or add a value")
        for point in product(*axes.values(), *parameters.values()):
            given = dict(zip(axes, point, strict=False))
            chosen = dict(zip(parameters, point[len(axes) :], strict=True))
            sparsities = _axis(self.sparsity)
            if n_of_m(given["pattern"]) and (len(axes["pattern"]) > 1 or len(sparsities) > 1):
                sparsities = (None,)
            for sparsity in sparsities:
                quantizes = method_named(given["method"]).quantize is not None
                if sparsity is None and not n_of_m(given["pattern"]) and not quantizes:
                    sparsity = DEFAULT_SPARSITY
                settings = {**given, "sparsity": sparsity, "roles": self.roles, "parameters": chosen}
                if given["allocation"] == DIAGNOSIS and self.remedy is not None:
                    settings["importance"] = self.remedy.importance
                if self.known_subspaces is not None:
                    settings["subspaces"] = self.known_subspaces
                recipes.append(pruning.Recipe.model_validate(settings))
        return list(dict.fromkeys(recipes))


class EvaluationConfig(Section):
    """How much text is read for evaluation, and how."""

    segments: int = Field(default=128, ge=2, description="held-out segments per language")
    fit_segments: int = Field(default=128, ge=2, description="parallel segments per language to fit the subspaces")
    max_length: int = Field(default=256, ge=8, description="maximum tokens read per segment")
    batch_tokens: int = Field(default=1024, ge=8, description="tokens per batch; limits memory")
    skip_first: bool = Field(default=True, description="leave out the first token of a segment (BOS, if there is one)")
    rank: int | None = Field(default=None, ge=1, description="rank of the LSAR subspaces (languages - 1)")


class LensConfig(Section):
    """What models would predict after every block, at a sample of positions of the held-out text (logit lens).

    Attributes
    ----------
    tokens
        Positions of each language, the same ones for all models; 0: no lens. Each costs two products with the head a
        block and model.
    seed
        Of the draw of positions.
    tuned
        Whether states are also read translated: through a tuned lens, fitted on the dense model and the fitting text.
    """

    tokens: int = Field(default=0, ge=0, description="positions per language; 0: no lens")
    seed: int = Field(default=0, ge=0)
    tuned: bool = False

    @model_validator(mode="after")
    def _of_some_tokens(self) -> LensConfig:
        if self.tuned and not self.tokens:
            raise ValueError("tuned = true reads nothing without tokens; add tokens = 256, for example")
        return self


class TasksConfig(Section):
    """Questions that the models are asked.

    Attributes
    ----------
    items
        ``"bundled"``, ``"file:FOLDER/{lang}.jsonl"`` or ``"none"``; by default the bundled ones, if they cover all
        languages of the study.
    per_category
        Maximum number of items per category: one number for all, or a table such as ``{"reasoning": 100, "fluency":
        0}``, where 0 leaves a category out and categories that are not named keep all their items. All by default.
    harness
        Names of tasks of EleutherAI's lm-evaluation-harness; ``"preset"`` stands for those of
        :data:`analysis.study.harness.STUDY_BENCHMARKS` in the study's languages. Needs the extra ``tasks``.
    shots, limit
        Few-shot examples per question, and maximum number of questions per task, in the harness.
    folders
        Folders with further tasks for the harness.
    """

    items: str | None = None
    per_category: Annotated[int, Field(ge=2)] | dict[str, Annotated[int, Field(ge=0)]] | None = None
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
