"""Pruned and quantized variants: save, open, apply to the dense model, export, and import models pruned elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from ..errors import DiskError, ModelError, VariantError
from ..files import whole_folder
from ..models.anatomy import Anatomy
from ..projections import Key
from .apply import write_pruned
from .biases import biased, open_biases
from .codes import CodeSet
from .export import write_checkpoint
from .imported import Held, difference
from .masks import MaskSet
from .others import open_others, replace_others, replaced
from .size import DENSE_BITS, pruned_bits
from .stated import Stated
from .store import (
    UNKNOWN,
    VariantRecord,
    VariantWriter,
    is_variant,
    open_codes,
    open_masks,
    open_values,
    shape_of_values,
    stretch,
)


@dataclass(frozen=True)
class Variant:
    """A variant: its recipe, which weights were kept, their values if they were updated, and quantized weights.

    Attributes
    ----------
    record
        Recipe, calibration set and the dense model it belongs to.
    masks
        Masks of every pruned projection.
    values
        Values of the kept weights in mask order, by projection; projections without an entry keep the dense values.
        Of a projection without a mask, whose values were all changed, the whole weight.
    codes
        Quantized projections, which have no mask.
    biases
        Biases that differ from the dense model's, by projection; a projection may have none in the dense model.
    others
        Other parameters that differ, of a model made elsewhere: norms, embeddings, the head and so on, by their path in
        the model. What is tied to one in the dense model follows it, unless it has an entry of its own.
    """

    record: VariantRecord
    masks: MaskSet
    values: Mapping[Key, Tensor]
    codes: CodeSet = field(default_factory=CodeSet)
    biases: Mapping[Key, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The variant's name, unique in a study."""
        return self.record.id

    @property
    def projections(self) -> tuple[Key, ...]:
        """The projections that differ from the dense model's: pruned, quantized or changed."""
        return tuple(sorted(dict.fromkeys([*self.masks, *self.codes, *self.values]), key=lambda key: key[0]))

    def __repr__(self) -> str:
        """Return its id, and how many projections it changes."""
        return f"Variant({self.id}: {len(self.projections)} projections of {self.record.model})"

    def changes(self, key: Key) -> bool:
        """Whether a projection differs from the dense model's."""
        return key in self.masks or key in self.codes or key in self.values

    def columns(self) -> dict[str, Any]:
        """Return the columns that describe this variant in frames."""
        return self.record.columns(self.masks.sparsity() if self.masks else 0.0, self.bits())

    def bits(self) -> float:
        """Return the size of the projections in its scope in bits a weight; those of the dense model have 16.

        Pruned ones take 16 bits for every weight that is kept, and their mask; quantized ones their codes, scales and
        zero points. For models quantized elsewhere it is what their checkpoint states.
        """
        if self.record.bits is not None:
            return self.record.bits
        pattern = self.record.recipe.pattern if self.record.recipe is not None else self.record.pattern
        total, weights = 0.0, 0
        for key in self.projections:
            if key in self.codes:
                number, size = math.prod(self.codes.shape(key)), float(self.codes.size(key))
            elif key in self.masks:
                number = math.prod(self.masks.shape(key))
                size = number * pruned_bits(self.masks.sparsity(key), pattern)
            else:
                number = math.prod(shape_of_values(self.values, key))
                size = number * DENSE_BITS
            total, weights = total + size, weights + number
        return total / weights if weights else DENSE_BITS

    def weight(self, key: Key, dense: Tensor) -> Tensor:
        """Return the weight of one projection, given the dense model's."""
        weight = torch.empty_like(dense)
        self.write(key, dense, weight)
        return weight

    @torch.no_grad()
    def write(self, key: Key, dense: Tensor, out: Tensor) -> None:
        """Write this variant's weight of one projection into `out`, given the dense model's.

        Removed weights become positive zero. A projection that was not changed is copied from the dense model.

        Parameters
        ----------
        key
            The projection.
        dense
            Its weight in the dense model, ``[outputs, inputs]``.
        out
            Destination of the same shape and dtype, on any device, with any strides; may be a live view, or `dense`
            itself. The dense weight is moved to its device only if it is needed.
        """
        if key in self.codes:
            self.codes[key].write(out)
        elif key in self.masks:
            write_pruned(dense.to(out.device), self.masks.packed(key), out, self.values.get(key))
        elif key in self.values:
            out.copy_(self.values[key])
        elif out is not dense:
            out.copy_(dense)

    def pieces(self, key: Key, dense: Tensor, rows: int) -> Iterator[tuple[UInt8[np.ndarray, "rows bytes"], Tensor]]:
        """Yield mask and weight of one pruned projection, `rows` rows at a time, given the dense weight.

        This bounds the memory of code that compares several variants. Masks are packed by ``numpy.packbits``; weights
        have the dtype that they were made in.
        """
        passed = 0
        for start in range(0, len(dense), rows):
            before = dense[start : start + rows]
            bits = self.masks.packed(key, start, start + len(before))
            values = None
            if key in self.values:
                kept = int(np.bitwise_count(bits).sum(dtype=np.int64))
                values = stretch(self.values, key, passed, passed + kept)
                passed += kept
                before = torch.empty(before.shape, dtype=values.dtype, device=dense.device)
            weight = torch.empty(before.shape, dtype=before.dtype, device=dense.device)
            write_pruned(before, bits, weight, values)
            yield bits, weight

    def save(self, folder: Path) -> None:
        """Write ``recipe.json``, masks, values, codes, biases and others, as far as there are any.

        Raises
        ------
        DiskError
            If the folder holds anything but a variant, or cannot be written.
        """
        with whole_folder(folder, is_variant) as partial:
            shapes = {key: self.masks.shape(key) for key in self.masks}
            others = {key: self.codes.shape(key) for key in self.codes}
            for key in self.values:
                if key not in self.masks:
                    outputs, inputs = shape_of_values(self.values, key)
                    others[key] = (outputs, inputs)
            beside = {name: self.others[name].numel() for name in self.others}
            writer = VariantWriter.at(partial, shapes | others, beside)
            for key, (_, inputs) in shapes.items():
                writer.add(key, torch.from_numpy(self.masks.packed(key)), inputs, self.values.get(key))
            for key in self.codes:
                writer.add_codes(key, self.codes[key])
            for key in self.values:
                if key not in self.masks:
                    writer.add_values(key, self.values[key])
            for key, bias in self.biases.items():
                writer.add_bias(key, bias)
            for name in self.others:
                writer.add_other(name, self.others[name])
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
        model = record.model_fingerprint
        masks = open_masks(folder, model)
        values, codes = open_values(folder, masks, model), open_codes(folder, model)
        return cls(record, masks, values, codes, open_biases(folder, model), open_others(folder, model))

    @classmethod
    def between(cls, dense: nn.Module, pruned: nn.Module, name: str, folder: Path | None = None) -> Variant:
        """Import a model that was pruned, quantized or trained elsewhere, as a variant of its dense parent.

        Where it has zeros that the dense model has not, weights count as removed, and masks are imported, with the
        other values where these differ too. Where it has none, or is quantized, all values are imported, and there is
        no mask. Norms, embeddings, biases and the head are imported where they differ by more than rounding to 16 bits.
        ``record.found`` says in words what was found. The recipe is unknown, unless the model was loaded from
        a folder that :meth:`export` wrote: then the variant gets the recipe, calibration set and remarks stored next to
        the checkpoint, so that frames show its actual method (``wanda``, and so on) rather than its new name.

        Parameters
        ----------
        dense, pruned
            Models of the same architecture and size; either may be streamed from its checkpoint.
        name
            Name of the variant.
        folder
            Where to write it, a projection at a time, so that no more than one is held in memory; the variant is then
            opened from there. Without it, all that differs is held in memory.

        Raises
        ------
        VariantError
            If the models do not match, or nothing was changed.
        DiskError
            If the folder holds anything but a variant, or cannot be written.
        """
        if folder is None:
            held = Held()
            record = difference(dense, pruned, name, held)
            return cls(record, held.masks, held.values, biases=held.biases, others=held.others)
        parent = Anatomy(dense)
        others = {path: parameter.numel() for path, parameter in dense.named_parameters(remove_duplicate=False)}
        with whole_folder(folder, is_variant) as partial:
            writer = VariantWriter.at(partial, {key: parent.shape(*key) for key in parent}, others)
            record = difference(dense, pruned, name, writer)
            writer.finish(record.model_fingerprint)
            record.save(partial)
        return cls.open(folder)

    def described(self, stated: Stated) -> Variant:
        """Return this model, made elsewhere, with what its name states of it.

        Method, calibration set and seed, which its weights do not tell, are taken as stated, unless its recipe is
        known; sparsity is what was measured, and the stated pattern counts if the masks agree. ``record.found`` says
        what does not.

        Parameters
        ----------
        stated
            What the name states.
        """
        wrong = stated.contradictions(self.masks, self.columns() if self.record.recipe is not None else None)
        update: dict[str, Any] = {"stated": stated}
        if self.record.pattern == UNKNOWN and stated.pattern is not None and "pattern" not in wrong:
            update["pattern"] = stated.pattern
        if wrong:
            said = f"its name is contradicted: {'; '.join(wrong.values())}"
            update["found"] = f"{self.record.found}; {said}" if self.record.found else said
        return replace(self, record=self.record.model_copy(update=update))

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
        dense = {key: anatomy.weight(*key).clone() for key in self.projections}
        try:
            for key, weight in dense.items():
                anatomy.set_weight(*key, self.weight(key, weight))
            with biased(anatomy, self.biases), replaced(anatomy, self.others):
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
        for key in self.projections:
            anatomy.set_weight(*key, self.weight(key, anatomy.weight(*key)))
        for key, bias in self.biases.items():
            anatomy.set_bias(*key, bias)
        replace_others(anatomy, self.others, copy=True)

    def export(self, model: Any, tokenizer: Any, folder: Path) -> str:
        """Write an ordinary checkpoint for ``from_pretrained``, together with the recipe and a model card.

        If the model is streamed from its shards, the checkpoint is written one block at a time. Otherwise, neurons,
        heads or blocks that were removed as a whole are cut out, if the architecture has a model of such sizes.

        Parameters
        ----------
        model, tokenizer
            The dense model that the variant was made from; unchanged afterwards.
        folder
            New or empty folder.

        Returns
        -------
        str
            What was cut out, or why removed structures are stored as zeros; empty if there are none.

        Raises
        ------
        DiskError
            If the folder is not empty, or cannot be written.
        VariantError
            If the variant was not made from this model, or has biases that no checkpoint of its architecture can hold.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DiskError(f"{folder} is not empty; export into a new folder")
        anatomy = Anatomy(model)
        self.check_belongs_to(anatomy.fingerprint())
        with whole_folder(folder) as partial:
            said = write_checkpoint(self, anatomy, tokenizer, partial)
            size = {"bits": self.bits()} if self.codes else {}  # decoded weights do not tell
            self.record.model_copy(update=size).save(partial)
        return said

    def check_belongs_to(self, model_fingerprint: str) -> None:
        """Raise ``VariantError`` unless the variant was made from the dense model with this fingerprint."""
        if model_fingerprint != self.record.model_fingerprint:
            raise VariantError(
                f'variant "{self.id}" belongs to another model ({self.record.model}), or this model is already pruned'
            )


def _check_in_memory(anatomy: Anatomy) -> None:
    if anatomy.streamed:
        raise ModelError("a model loaded with stream=True can only be pruned and exported; load it whole")
