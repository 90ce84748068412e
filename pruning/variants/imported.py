"""Models made elsewhere: which weights were removed, which were changed, and what kind of change it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import VariantError
from ..models.anatomy import Anatomy
from ..models.quantized import Quantization, stated_quantization
from ..models.streaming import residence_of
from ..projections import Key
from .masks import MaskSet, pack_bits
from .store import CHANGED, QUANTIZED, RECIPE_FILE, VariantRecord

#: Relative difference that rounding to bfloat16 can cause.
_ROUNDING = 2**-7
#: Share of a projection's weights that must be newly zero for it to count as pruned, if others were changed too.
_FEWEST = 1e-3
#: To recognise weights that lie on a grid: values of a group, inputs of a group, and how many rows are looked at.
_LEVELS, _GROUPS, _ROWS = 16, (128, 64, 32), 8
_UNSTATED = "how large they were stored is not stated, so they count as 16 bits"


@dataclass
class _Count:
    """What was found in all projections.

    Attributes
    ----------
    weights
        Weights in projections that differ in any way.
    removed, changed, regrown
        Of these: newly zero, with another value, and those that are zero in the dense model and not in this one.
    pruned, others, on_grid
        Number of projections that are pruned, that are changed only, and whose weights lie on a grid.
    """

    weights: int = 0
    removed: int = 0
    changed: int = 0
    regrown: int = 0
    pruned: int = 0
    others: int = 0
    on_grid: int = 0


def difference(
    dense: nn.Module, pruned: nn.Module, name: str
) -> tuple[VariantRecord, MaskSet, dict[Key, Tensor], dict[Key, Tensor]]:
    """Return the record, masks, changed values and changed biases of a model that was made elsewhere from a dense one.

    Where a projection has zeros that the dense model has not, it is pruned: it has a mask, and values if other weights
    differ too. Where it has none, or is quantized, it has values only, the whole weight. The recipe is known only if
    prunescope exported the checkpoint: the recipe file is then next to it.

    Parameters
    ----------
    dense, pruned
        Models of the same architecture and size; either may be streamed from its checkpoint.
    name
        Name of the variant.

    Raises
    ------
    VariantError
        If the models do not match, nothing was changed, or the model differs in more than its projections.
    """
    parent, child = Anatomy(dense), Anatomy(pruned)
    if parent.kind != child.kind or _shapes(parent) != _shapes(child):
        cut = "; where blocks, heads or neurons were cut out, compare a checkpoint of full size (export --stream)"
        raise VariantError(
            f'"{name}" was not made from this model: its parameters or their shapes differ'
            + (cut if _is_smaller(child, parent) else "")
        )
    record = _stated(
        VariantRecord(id=name, model=str(dense.name_or_path), model_fingerprint=parent.fingerprint()), child
    )
    folder = str(child.model.name_or_path)
    quantization = stated_quantization(Path(folder)) if folder else None
    coded = quantization is not None or (record.recipe is not None and record.recipe.quantizes)
    bits, inputs, values, biases, count = {}, {}, {}, {}, _Count()
    for layer in range(len(parent.blocks)):
        with parent.loaded(layer, to_read=True), child.loaded(layer, to_read=True):
            _check_unchanged(parent, child, parent.parameter_names(layer), name)
            for role in parent.roles(layer):
                before = parent.weight(layer, role)
                weight = child.weight(layer, role).to(before)
                bias = child.bias(layer, role)
                if bias is not None and _differs(bias, parent.bias(layer, role)):
                    biases[layer, role] = bias.cpu()
                covered = record.recipe is not None and record.recipe.covers(layer, role)
                if torch.equal(weight, before) and not covered:
                    continue
                mask = weight != 0
                kept = torch.equal(weight, before * mask)
                removed = int((~mask & (before != 0)).sum())
                grid = not coded and not kept and _on_grid(weight)
                _add(count, before, weight, mask, removed)
                if not (coded or grid) and (covered or (removed and (kept or removed >= _FEWEST * mask.numel()))):
                    count.pruned += 1
                    bits[layer, role], inputs[layer, role] = pack_bits(mask).numpy(), mask.shape[1]
                    if not kept:
                        values[layer, role] = weight[mask].cpu()
                else:
                    count.others += 1
                    count.on_grid += grid
                    values[layer, role] = weight.cpu().clone()
    others = parent.other_names()
    with residence_of(dense).present(others, to_read=True), residence_of(pruned).present(others, to_read=True):
        _check_unchanged(parent, child, others, name)
    if not count.removed and count.regrown and count.changed == count.regrown:
        raise VariantError(
            f'this model has zeros where "{name}" has none, but "{name}" has no additional zeros, and is otherwise the '
            "same: were the dense and the pruned model swapped?"
        )
    if not count.removed and not count.changed:
        raise VariantError(
            f'"{name}" differs nowhere from this model: it is not pruned, quantized or trained, or its masks were not '
            "applied"
        )
    if record.recipe is None:
        record = record.model_copy(update=_found(count, quantization, values))
    return record, MaskSet(bits, inputs), values, biases


def _is_smaller(child: Anatomy, parent: Anatomy) -> bool:
    """Whether a model has fewer blocks than another, or narrower projections in a block."""
    if len(child.blocks) != len(parent.blocks):
        return len(child.blocks) < len(parent.blocks)
    both = [(child.shape(*key), parent.shape(*key)) for key in parent if key[1] in child.roles(key[0])]
    return any(one < other for shapes in both for one, other in zip(*shapes, strict=True))


def _differs(bias: Tensor, dense: Tensor | None) -> bool:
    """Whether a bias differs from the dense model's; having none is having one of zeros."""
    return not torch.equal(bias, torch.zeros_like(bias) if dense is None else dense.to(bias))


def _add(count: _Count, before: Tensor, weight: Tensor, mask: Tensor, removed: int) -> None:
    count.weights += mask.numel()
    count.removed += removed
    count.changed += int((mask & (weight != before)).sum())
    count.regrown += int((mask & (before == 0)).sum())


def _found(count: _Count, quantization: Quantization | None, values: dict[Key, Tensor]) -> dict[str, object]:
    """Return what the record says of a model: in words, as its pattern in frames, and its size if that is stated."""
    regrown = f"; {count.regrown:,} weights that are zero in the dense model are not" if count.regrown else ""
    if quantization is not None:
        sizes = [quantization.size(*weight.shape) for weight in values.values()]
        weights = sum(weight.numel() for weight in values.values())
        stated = [size for size in sizes if size is not None]
        said = f"quantized ({quantization}); its weights were decoded"
        if len(stated) < len(sizes):
            return {"pattern": QUANTIZED, "found": f"{said}; {_UNSTATED}"}
        return {"pattern": QUANTIZED, "bits": sum(stated) / weights, "found": said}
    if count.on_grid > count.pruned and 2 * count.on_grid >= count.others:
        words = f"quantized: the weights of {count.on_grid} matrices lie on grids of at most 16 values"
        return {"pattern": QUANTIZED, "found": f"{words}; {_UNSTATED}"}
    removed, changed = count.removed / count.weights, count.changed / count.weights
    if count.pruned:
        words = f"pruned: {removed:.1%} of the weights of {count.pruned + count.others} matrices are newly zero, "
        words += f"{changed:.1%} have other values" if count.changed else "the others are the dense model's"
        return {"found": words + regrown}
    words = f"changed: {changed:.1%} of the weights of {count.others} matrices have other values, none was removed"
    return {"pattern": CHANGED, "found": words + regrown}


def _on_grid(weight: Float[Tensor, "outputs inputs"]) -> bool:
    """Whether groups of neighbouring weights take so few values that they must have been quantized to 4 bits or fewer.

    Zeros do not count: a pruned weight has many of them.
    """
    rows = weight[:: max(len(weight) // _ROWS, 1)][:_ROWS]
    for group in _GROUPS:
        ordered = rows.reshape(-1, math.gcd(group, rows.shape[1])).sort(dim=1).values
        present = ordered != 0
        differs = torch.ones_like(present)
        differs[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        told = 2 * present.sum(dim=1) >= 3 * _LEVELS
        coarse = (present & differs).sum(dim=1) <= _LEVELS
        if 2 * int(told.sum()) >= len(told) and bool(coarse[told].all()):
            return True
    return False


def _shapes(anatomy: Anatomy) -> dict[str, torch.Size]:
    biases = _biases(anatomy)
    parameters = anatomy.model.named_parameters(remove_duplicate=False)
    return {name: p.shape for name, p in parameters if name not in biases}


def _biases(anatomy: Anatomy) -> set[str]:
    """Return the paths that the biases of the projections have, or would have."""
    return {f"{anatomy.path(*key)}.bias" for key in anatomy if key[1] in anatomy.sites(key[0])}


def _check_unchanged(parent: Anatomy, child: Anatomy, names: Iterable[str], called: str) -> None:
    """Raise ``VariantError`` if parameters other than projections differ between the models."""
    imported = parent.block_parameters().keys() | _biases(parent)
    for name in names:
        if name not in imported:
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
