"""Models pruned elsewhere: which weights were removed, and which were changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import VariantError
from ..models.anatomy import Anatomy
from ..models.streaming import residence_of
from ..projections import Key
from .masks import MaskSet, pack_bits
from .store import RECIPE_FILE, VariantRecord

#: Relative difference that rounding to bfloat16 can cause.
_ROUNDING = 2**-7


def difference(dense: nn.Module, pruned: nn.Module, name: str) -> tuple[VariantRecord, MaskSet, dict[Key, Tensor]]:
    """Return the record, masks and changed values of a model that was pruned elsewhere.

    A zero weight counts as removed. Where other weights differ from the dense ones, their values are imported too. The
    recipe is known only if prunescope exported the checkpoint: the recipe file is then next to it.

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
    parent, child = Anatomy(dense), Anatomy(pruned)
    if _shapes(parent) != _shapes(child):
        raise VariantError(f'"{name}" is not a pruned version of this model: its parameters or their shapes differ')
    record = _stated(
        VariantRecord(id=name, model=str(dense.name_or_path), model_fingerprint=parent.fingerprint()), child
    )
    bits, inputs, values, news, missing = {}, {}, {}, 0, 0
    for layer in range(len(parent.blocks)):
        with parent.loaded(layer, to_read=True), child.loaded(layer, to_read=True):
            _check_unchanged(parent, child, parent.parameter_names(layer), name)
            for role in parent.roles(layer):
                before = parent.weight(layer, role)
                weight = child.weight(layer, role).to(before)
                mask = weight != 0
                pruned_here = not torch.equal(weight, before)
                if pruned_here or (record.recipe is not None and record.recipe.covers(layer, role)):
                    bits[layer, role], inputs[layer, role] = pack_bits(mask).numpy(), mask.shape[1]
                if not torch.equal(weight, before * mask):
                    values[layer, role] = weight[mask].cpu()
                news += int((~mask & (before != 0)).sum())
                missing += int((mask & (before == 0)).sum())
    others = parent.other_names()
    with residence_of(dense).present(others, to_read=True), residence_of(pruned).present(others, to_read=True):
        _check_unchanged(parent, child, others, name)
    if news == 0 and missing:
        raise VariantError(
            f'this model has zeros where "{name}" has none, but "{name}" has no additional zeros: '
            "were the dense and the pruned model swapped?"
        )
    if news == 0:
        raise VariantError(
            f'"{name}" is zero nowhere but where this model is: it is not pruned, or its masks were not applied'
        )
    return record, MaskSet(bits, inputs), values


def _shapes(anatomy: Anatomy) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in anatomy.model.named_parameters(remove_duplicate=False)}


def _check_unchanged(parent: Anatomy, child: Anatomy, names: Iterable[str], called: str) -> None:
    """Raise ``VariantError`` if parameters other than projections differ between the models."""
    projections = parent.block_parameters()
    for name in names:
        if name not in projections:
            before = parent.model.get_parameter(name)
            after = child.model.get_parameter(name).to(before)
            if not torch.equal(before, after) and not torch.allclose(after.float(), before.float(), rtol=_ROUNDING):
                raise VariantError(
                    f'"{called}" differs from this model in more than its projections ({name}): it was trained after '
                    "pruning, or made from another model, and cannot be compared with this one"
                )


def _stated(record: VariantRecord, child: Anatomy) -> VariantRecord:
    """Return the record that prunescope wrote next to a checkpoint, if it is of the same dense model."""
    folder = str(child.model.name_or_path)
    path = Path(folder) / RECIPE_FILE
    if not folder:  # the model was not loaded from a checkpoint
        return record
    try:
        stated = VariantRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return record  # no such file, or one of another tool
    if stated.model_fingerprint != record.model_fingerprint:
        remark = f"its {RECIPE_FILE} is ignored, since it belongs to another dense model ({stated.model})"
        return record.model_copy(update={"remarks": (remark,)})
    return stated.model_copy(update={"id": record.id, "model": record.model, "key": ""})
