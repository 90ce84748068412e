"""Pruned variants: save, open, apply to the dense model, export, and import models pruned elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiskError, ModelError, VariantError
from ..files import whole_folder
from ..models.anatomy import Anatomy
from ..projections import Key
from .apply import write_pruned
from .export import write_checkpoint
from .imported import difference
from .masks import MaskSet
from .store import MASKS_FILE, VariantRecord, VariantWriter, is_variant, open_values, stretch


@dataclass(frozen=True)
class Variant:
    """A pruned variant: its recipe, which weights were kept, and their values if they were updated.

    Attributes
    ----------
    record
        Recipe, calibration set and the dense model it belongs to.
    masks
        Masks of every pruned projection.
    values
        Values of the kept weights in mask order, by projection; projections without an entry keep the dense values.
    """

    record: VariantRecord
    masks: MaskSet
    values: Mapping[Key, Tensor]

    @property
    def id(self) -> str:
        """The variant's name, unique in a study."""
        return self.record.id

    def columns(self) -> dict[str, Any]:
        """Return the columns that describe this variant in frames."""
        return self.record.columns(self.masks.sparsity())

    def weight(self, key: Key, dense: Tensor) -> Tensor:
        """Return the weight of one projection, given the dense model's."""
        weight = torch.empty_like(dense)
        self.write(key, dense, weight)
        return weight

    @torch.no_grad()
    def write(self, key: Key, dense: Tensor, out: Tensor) -> None:
        """Write this variant's weight of one projection into `out`, given the dense model's.

        Removed weights become positive zero. A projection that was not pruned is copied from the dense model.

        Parameters
        ----------
        key
            The projection.
        dense
            Its weight in the dense model, ``[outputs, inputs]``.
        out
            Destination of the same shape, dtype and device, with any strides; may be a live view, or `dense` itself.
        """
        if key in self.masks:
            write_pruned(dense, self.masks.packed(key), out, self.values.get(key))
        elif out is not dense:
            out.copy_(dense)

    def pieces(self, key: Key, dense: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield mask and weight (float32) of one projection, `rows` rows at a time, given the dense model's weight.

        This bounds the memory of code that compares several variants.
        """
        passed = 0
        for start in range(0, len(dense), rows):
            mask = self.masks.rows(key, start, start + rows).to(dense.device)
            weight = dense[start : start + rows].float()
            if key in self.values:
                kept = int(mask.sum())
                weight = torch.zeros_like(weight)
                weight[mask] = stretch(self.values, key, passed, passed + kept).to(weight)
                passed += kept
            else:
                weight = weight.masked_fill(~mask, 0)
            yield mask, weight

    def save(self, folder: Path) -> None:
        """Write ``recipe.json``, ``masks.safetensors`` and, if weights were updated, ``weights.safetensors``.

        Raises
        ------
        DiskError
            If the folder holds anything but a variant, or cannot be written.
        """
        with whole_folder(folder, is_variant) as partial:
            shapes = {key: self.masks.shape(key) for key in self.masks}
            writer = VariantWriter.at(partial, shapes)
            for key, (_, inputs) in shapes.items():
                writer.add(key, torch.from_numpy(self.masks.packed(key)), inputs, self.values.get(key))
            writer.finish(self.record.model_fingerprint)
            self.record.save(partial)

    @classmethod
    def open(cls, folder: Path, model_fingerprint: str | None = None) -> Variant:
        """Open a variant; masks and values are read from their files on access.

        Raises
        ------
        VariantError
            If it is missing or damaged, or belongs to a model other than `model_fingerprint`.
        """
        record = VariantRecord.open(folder)
        if model_fingerprint is not None and record.model_fingerprint != model_fingerprint:
            raise VariantError(
                f'variant "{record.id}" belongs to another model ({record.model}); load that one to open it'
            )
        masks = MaskSet.open(folder / MASKS_FILE, record.model_fingerprint)
        return cls(record, masks, open_values(folder, masks, record.model_fingerprint))

    @classmethod
    def between(cls, dense: nn.Module, pruned: nn.Module, name: str) -> Variant:
        """Import a model that was pruned elsewhere, as a variant of its dense parent.

        A zero weight counts as removed. Where other weights differ from the dense ones, their values are imported too.
        The recipe is unknown, unless the model was loaded from a folder that :meth:`export` wrote: then the variant
        gets the recipe, calibration set and remarks stored next to the checkpoint, so that frames show its actual
        method (``wanda``, and so on) rather than its new name.

        Parameters
        ----------
        dense, pruned
            Models of the same architecture and size; either may be streamed from its checkpoint.
        name
            Name of the variant.

        Raises
        ------
        VariantError
            If the models do not match, nothing was removed, or the pruned model differs in more than its projections.
        """
        return cls(*difference(dense, pruned, name))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context manager that turns `model` into this variant, and restores the dense model bit for bit.

        Raises
        ------
        VariantError
            If `model` is not the dense model that the variant was made from.
        """
        anatomy = Anatomy(model)
        _check_in_memory(anatomy)
        self.check_belongs_to(anatomy.fingerprint())
        dense = {key: anatomy.weight(*key).clone() for key in self.masks}
        try:
            for key, weight in dense.items():
                anatomy.set_weight(*key, self.weight(key, weight))
            yield
        finally:
            for key, weight in dense.items():
                anatomy.set_weight(*key, weight)

    def apply(self, model: nn.Module) -> None:
        """Turn `model` into this variant permanently.

        Raises
        ------
        VariantError
            If `model` is not the dense model that the variant was made from.
        """
        anatomy = Anatomy(model)
        _check_in_memory(anatomy)
        self.check_belongs_to(anatomy.fingerprint())
        for key in self.masks:
            anatomy.set_weight(*key, self.weight(key, anatomy.weight(*key)))

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write an ordinary checkpoint for ``from_pretrained``, together with the recipe and a model card.

        If the model is streamed from its shards, the checkpoint is written one block at a time.

        Parameters
        ----------
        model, tokenizer
            The dense model that the variant was made from; unchanged afterwards.
        folder
            New or empty folder.

        Raises
        ------
        DiskError
            If the folder is not empty, or cannot be written.
        VariantError
            If the variant was not made from this model.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DiskError(f"{folder} is not empty; export into a new folder")
        anatomy = Anatomy(model)
        self.check_belongs_to(anatomy.fingerprint())
        with whole_folder(folder) as partial:
            write_checkpoint(self, anatomy, tokenizer, partial)
            self.record.save(partial)

    def check_belongs_to(self, model_fingerprint: str) -> None:
        """Raise ``VariantError`` unless the variant was made from the dense model with this fingerprint."""
        if model_fingerprint != self.record.model_fingerprint:
            raise VariantError(
                f'variant "{self.id}" belongs to another model ({self.record.model}), or this model is already pruned'
            )


def _check_in_memory(anatomy: Anatomy) -> None:
    if anatomy.streamed:
        raise ModelError("a model loaded with stream=True can only be pruned and exported; load it whole")
