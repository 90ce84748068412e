"""Pruned variants: make, save, open, apply to the dense model, restore, export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from .anatomy import Anatomy
from .calibration import CalibrationSet, calibration_fingerprint, calibration_tokens
from .errors import DiskError, VariantError
from .files import whole_folder, write_json
from .masks import MaskSet
from .recipes import UNCALIBRATED, Recipe
from .sweep import Progress, sweep
from .text import Corpus

RECIPE_FILE = "recipe.json"
MASKS_FILE = "masks.safetensors"


class VariantRecord(BaseModel):
    """What ``recipe.json`` says of a variant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    model: str
    model_fingerprint: str
    recipe: Recipe
    calibration: CalibrationSet | None = None
    text_fingerprint: str | None = None


@dataclass(frozen=True)
class Variant:
    """A pruned variant: what was done, and which weights were kept.

    Attributes
    ----------
    record
        Recipe, calibration set and the dense model it belongs to.
    masks
        The kept weights.
    """

    record: VariantRecord
    masks: MaskSet

    @property
    def id(self) -> str:
        """The variant's name, unique in a study."""
        return self.record.id

    def columns(self) -> dict[str, Any]:
        """Return the columns of a tidy frame that say which variant was measured."""
        recipe, calibration = self.record.recipe, self.record.calibration
        return {
            "model": self.record.model,
            "method": recipe.method,
            "sparsity": recipe.sparsity,
            "pattern": recipe.pattern,
            "allocation": recipe.allocation,
            "propagation": recipe.propagation if calibration else UNCALIBRATED,
            "calibration": calibration.name if calibration else UNCALIBRATED,
            "seed": calibration.seed if calibration else 0,
        }

    def save(self, folder: Path) -> None:
        """Write ``recipe.json`` and ``masks.safetensors`` into `folder`, both or neither."""
        with whole_folder(folder) as partial:
            self.masks.save(partial / MASKS_FILE, self.record.model_fingerprint)
            write_json(partial / RECIPE_FILE, self.record.model_dump(mode="json"))

    @classmethod
    def open(cls, folder: Path, model_fingerprint: str | None = None) -> Variant:
        """Read a variant.

        Raises
        ------
        VariantError
            If it is missing or damaged, or belongs to another model than `model_fingerprint`.
        """
        path = folder / RECIPE_FILE
        if not path.is_file():
            raise VariantError(f"there is no pruned variant in {folder} ({RECIPE_FILE} is missing)")
        try:
            record = VariantRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ValidationError) as error:
            raise VariantError(f"{path} is damaged; delete the folder and run again") from error
        if model_fingerprint is not None and record.model_fingerprint != model_fingerprint:
            raise VariantError(
                f'variant "{record.id}" belongs to another model ({record.model}); load that one to open it'
            )
        return cls(record, MaskSet.open(folder / MASKS_FILE, record.model_fingerprint))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Make `model` this variant inside a ``with`` block; the dense model comes back bit for bit.

        Raises
        ------
        VariantError
            If `model` is not the dense model that the variant was made from.
        """
        with DenseCopy(model).pruned_to(self):
            yield

    def apply(self, model: nn.Module) -> None:
        """Make `model` this variant for good.

        Raises
        ------
        VariantError
            If `model` is not the dense model that the variant was made from.
        """
        anatomy = Anatomy(model)
        self.check_belongs_to(anatomy.fingerprint())
        for key in self.masks:
            weight = anatomy.weight(*key)
            weight.mul_(self.masks[key].to(weight.device))

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write an ordinary checkpoint that ``from_pretrained`` loads, with the recipe beside it.

        Parameters
        ----------
        model, tokenizer
            The dense model that the variant was made from; unchanged afterwards.
        folder
            New or empty.

        Raises
        ------
        DiskError
            If the folder has something in it already, or cannot be written.
        VariantError
            If the model is another.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DiskError(f"{folder} is not empty; export into a new folder")
        with self.applied(model), whole_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_json(partial / RECIPE_FILE, self.record.model_dump(mode="json"))

    def check_belongs_to(self, model_fingerprint: str) -> None:
        """Raise ``VariantError`` unless the variant was made from the dense model with this fingerprint."""
        if model_fingerprint != self.record.model_fingerprint:
            raise VariantError(
                f'variant "{self.id}" belongs to another model ({self.record.model}), or this one is pruned already'
            )


class DenseCopy:
    """The dense weights of a model, kept aside so that it can become one variant after another quickly.

    Parameters
    ----------
    model
        The dense model. The copy takes as much memory as its prunable weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._anatomy = Anatomy(model)
        self._fingerprint = self._anatomy.fingerprint()
        self._dense = {key: self._anatomy.weight(*key).clone() for key in self._anatomy}

    @contextmanager
    def pruned_to(self, variant: Variant) -> Iterator[None]:
        """Make the model a variant inside a ``with`` block; the dense model comes back bit for bit.

        Raises
        ------
        VariantError
            If the variant was not made from this model.
        """
        variant.check_belongs_to(self._fingerprint)
        try:
            for key in variant.masks:
                weight = self._anatomy.weight(*key)
                torch.mul(self._dense[key], variant.masks[key].to(weight.device), out=weight)
            yield
        finally:
            for key in variant.masks:
                self._anatomy.weight(*key).copy_(self._dense[key])


def prune(
    model: Any,
    tokenizer: Any,
    recipes: Recipe | Sequence[Recipe],
    corpus: Corpus | None = None,
    calibration: CalibrationSet | None = None,
    *,
    name: str | None = None,
    batch_tokens: int = 2048,
    progress: Progress = lambda tokens: None,
) -> list[Variant]:
    """Make the variants of one calibration set: one for each recipe, in their order.

    Parameters
    ----------
    model, tokenizer
        As :func:`pruning.load_model` gives them; the model is unchanged afterwards.
    recipes
        What to make.
    corpus, calibration
        Where the text is, and how much of which languages to take; needed unless no recipe's method is calibrated.
    name
        What to call the model in frames; its ``name_or_path`` by default.
    batch_tokens
        Tokens that go through a block at a time.
    progress
        Told of the work as it is done.

    Raises
    ------
    TextError
        If there is too little text.
    RecipeError, ModelError
        If a recipe cannot be carried out on this model.
    """
    wanted = [recipes] if isinstance(recipes, Recipe) else list(recipes)
    tokens = text = None
    if corpus is not None and calibration is not None:
        tokens = calibration_tokens(tokenizer, corpus, calibration)
        text = calibration_fingerprint(corpus, calibration)
    masks = sweep(model, wanted, tokens, batch_tokens=batch_tokens, progress=progress)
    variants = []
    for recipe in wanted:
        used = calibration if recipe.scoring.calibrated else None
        record = VariantRecord(
            id=recipe.variant_id(used),
            model=name or model.name_or_path,
            model_fingerprint=Anatomy(model).fingerprint(),
            recipe=recipe,
            calibration=used,
            text_fingerprint=text if used else None,
        )
        variants.append(Variant(record, masks[recipe]))
    return variants
