"""Models made elsewhere: which weights were removed, which were changed, and what kind of change it was."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import VariantError
from ..models.anatomy import Anatomy
from ..models.quantized import Quantization, stated_quantization
from ..patterns import Shape
from ..projections import Key
from .beside import BIASES, Beside, bias_paths, check_same_computation, differing_others
from .masks import Bits, MaskSet, pack_bits
from .store import CHANGED, QUANTIZED, RECIPE_FILE, VariantRecord

#: Share of a projection's weights that must be newly zero for it to count as pruned, if others were changed too.
_FEWEST = 1e-3
#: To recognise weights that lie on a grid: values of a group, inputs of a group, and how many rows are looked at.
_LEVELS, _GROUPS, _ROWS = 16, (128, 64, 32), 8
_PROJECTION_BIASES = f"{BIASES} of projections"
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
    shapes
        Shapes of those without a mask.
    """

    weights: int = 0
    removed: int = 0
    changed: int = 0
    regrown: int = 0
    pruned: int = 0
    others: int = 0
    on_grid: int = 0
    shapes: list[Shape] = field(default_factory=list)


@runtime_checkable
class Sink(Protocol):
    """What takes the parts of a variant, a projection at a time: memory, or files."""

    def add(self, key: Key, packed: Tensor, inputs: int, values: Tensor | None = None) -> None:
        """Take a mask, eight weights a byte, and the values of the kept weights if they differ."""

    def add_values(self, key: Key, values: Tensor) -> None:
        """Take the whole weight of a projection without a mask."""

    def add_bias(self, key: Key, bias: Tensor) -> None:
        """Take a projection's bias."""

    def add_other(self, name: str, value: Tensor) -> None:
        """Take a parameter beside the projections."""


class Held:
    """Parts of a variant in memory.

    Attributes
    ----------
    values, biases, others
        What :class:`pruning.Variant` calls so.
    """

    def __init__(self) -> None:
        self._bits: dict[Key, Bits] = {}
        self._inputs: dict[Key, int] = {}
        self.values: dict[Key, Tensor] = {}
        self.biases: dict[Key, Tensor] = {}
        self.others: dict[str, Tensor] = {}

    @property
    def masks(self) -> MaskSet:
        """The masks."""
        return MaskSet(self._bits, self._inputs)

    def add(self, key: Key, packed: Tensor, inputs: int, values: Tensor | None = None) -> None:
        """See :class:`Sink`."""
        self._bits[key], self._inputs[key] = packed.numpy(), inputs
        if values is not None:
            self.add_values(key, values)

    def add_values(self, key: Key, values: Tensor) -> None:
        """See :class:`Sink`."""
        self.values[key] = values.to("cpu", copy=True)

    def add_bias(self, key: Key, bias: Tensor) -> None:
        """See :class:`Sink`."""
        self.biases[key] = bias.to("cpu", copy=True)

    def add_other(self, name: str, value: Tensor) -> None:
        """See :class:`Sink`."""
        self.others[name] = value.to("cpu", copy=True)


def difference(dense: nn.Module, pruned: nn.Module, name: str, sink: Sink) -> VariantRecord:
    """Find what differs between a model that was made elsewhere and a dense one, and return the record.

    Where a projection has zeros that the dense model has not, it is pruned: it has a mask, and values if other weights
    differ too. Where it has none, or is quantized, it has values only, the whole weight. Norms, embeddings, biases and
    the head are taken as they are where they differ. The recipe is known only if prunescope exported the checkpoint:
    the recipe file is then next to it.

    Parameters
    ----------
    dense, pruned
        Models of the same architecture and size; either may be streamed from its checkpoint.
    name
        Name of the variant.
    sink
        Takes what differs as it is found, so that no more than one projection need be held.

    Raises
    ------
    VariantError
        If the models do not match, or nothing was changed.
    """
    parent, child = Anatomy(dense), Anatomy(pruned)
    _check_comparable(parent, child, name)
    record = _stated(
        VariantRecord(id=name, model=str(dense.name_or_path), model_fingerprint=parent.fingerprint()), child
    )
    folder = str(child.model.name_or_path)
    quantization = stated_quantization(Path(folder)) if folder else None
    coded = quantization is not None or (record.recipe is not None and record.recipe.quantizes)
    count, beside = _Count(), Beside()
    for layer in range(len(parent.blocks)):
        with parent.loaded(layer, to_read=True), child.loaded(layer, to_read=True):
            for role in parent.roles(layer):
                covered = record.recipe is not None and record.recipe.covers(layer, role)
                _add_projection(parent, child, (layer, role), sink, count, coded=coded, covered=covered)
                _add_bias(parent, child, (layer, role), sink, beside)
            for path, value in differing_others(parent, child, layer, beside):
                sink.add_other(path, value)
    for path, value in differing_others(parent, child, None, beside):
        sink.add_other(path, value)
    _check_changed(count, beside, name)
    if record.recipe is None:
        return record.model_copy(update=_found(count, quantization, beside))
    said = beside.said(but=frozenset({_PROJECTION_BIASES}))
    return record.model_copy(update={"remarks": (*record.remarks, said)}) if said else record


def _check_comparable(parent: Anatomy, child: Anatomy, name: str) -> None:
    """Raise ``VariantError`` unless two models have the same parameters, and compute the same from them."""
    dense, own = _shapes(parent), _shapes(child)
    if parent.kind == child.kind and dense == own:
        check_same_computation(parent, child, name)
        return
    hint = ""
    if _is_smaller(child, parent):
        hint = "; where blocks, heads or neurons were cut out, compare a checkpoint of full size (export --stream)"
    elif parent.kind == child.kind and parent.vocabulary != child.vocabulary:
        hint = f" (its vocabulary has {child.vocabulary:,} tokens, not {parent.vocabulary:,})"
        hint += "; undo resize_token_embeddings, or compare it with a dense model of that vocabulary"
    raise VariantError(f'"{name}" was not made from this model: its parameters or their shapes differ{hint}')


def _add_projection(
    parent: Anatomy, child: Anatomy, key: Key, sink: Sink, count: _Count, *, coded: bool, covered: bool
) -> None:
    """Hand what differs in one projection to a sink; as a pruned one if its recipe covers it."""
    before = parent.weight(*key)
    weight = child.weight(*key).to(before)
    if torch.equal(weight, before) and not covered:
        return
    mask = weight != 0
    kept = torch.equal(weight, before * mask)
    removed = int((~mask & (before != 0)).sum())
    grid = not coded and not kept and _on_grid(weight)
    _add(count, before, weight, mask, removed)
    if not (coded or grid) and (covered or (removed and (kept or removed >= _FEWEST * mask.numel()))):
        count.pruned += 1
        sink.add(key, pack_bits(mask), mask.shape[1], None if kept else weight[mask])
    else:
        count.others += 1
        count.on_grid += grid
        count.shapes.append((weight.shape[0], weight.shape[1]))
        sink.add_values(key, weight)


def _add_bias(parent: Anatomy, child: Anatomy, key: Key, sink: Sink, beside: Beside) -> None:
    """Hand a projection's bias to a sink if it differs; having none is having one of zeros."""
    before, after = parent.bias(*key), child.bias(*key)
    if after is None and before is not None:
        after = torch.zeros_like(before)
    if after is not None and beside.add(_PROJECTION_BIASES, before, after, exactly=True):
        sink.add_bias(key, after)


def _check_changed(count: _Count, beside: Beside, name: str) -> None:
    """Raise ``VariantError`` if a model differs from its dense parent nowhere, or only in zeros that the parent has."""
    if beside.changed:
        return
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


def _is_smaller(child: Anatomy, parent: Anatomy) -> bool:
    """Whether a model has fewer blocks than another, or narrower projections in a block."""
    if len(child.blocks) != len(parent.blocks):
        return len(child.blocks) < len(parent.blocks)
    both = [(child.shape(*key), parent.shape(*key)) for key in parent if key[1] in child.roles(key[0])]
    return any(one < other for shapes in both for one, other in zip(*shapes, strict=True))


def _add(count: _Count, before: Tensor, weight: Tensor, mask: Tensor, removed: int) -> None:
    count.weights += mask.numel()
    count.removed += removed
    count.changed += int((mask & (weight != before)).sum())
    count.regrown += int((mask & (before == 0)).sum())


def _found(count: _Count, quantization: Quantization | None, beside: Beside) -> dict[str, object]:
    """Return what the record says of a model: in words, as its pattern in frames, and its size if that is stated."""
    regrown = f"; {count.regrown:,} weights that are zero in the dense model are not" if count.regrown else ""
    others = f"; {said}" if (said := beside.said()) else ""
    if quantization is not None and count.shapes:
        sizes = [quantization.size(*shape) for shape in count.shapes]
        weights = sum(math.prod(shape) for shape in count.shapes)
        stated = [size for size in sizes if size is not None]
        said = f"quantized ({quantization}); its weights were decoded"
        if len(stated) < len(sizes):
            return {"pattern": QUANTIZED, "found": f"{said}; {_UNSTATED}{others}"}
        return {"pattern": QUANTIZED, "bits": sum(stated) / weights, "found": said + others}
    if count.on_grid > count.pruned and 2 * count.on_grid >= count.others:
        words = f"quantized: the weights of {count.on_grid} matrices lie on grids of at most 16 values"
        return {"pattern": QUANTIZED, "found": f"{words}; {_UNSTATED}{others}"}
    if not count.weights:
        return {"pattern": CHANGED, "found": f"changed: no projection has other weights{others}"}
    removed, changed = count.removed / count.weights, count.changed / count.weights
    if count.pruned:
        words = f"pruned: {removed:.1%} of the weights of {count.pruned + count.others} matrices are newly zero, "
        words += f"{changed:.1%} have other values" if count.changed else "the others are the dense model's"
        return {"found": words + regrown + others}
    words = f"changed: {changed:.1%} of the weights of {count.others} matrices have other values, none was removed"
    return {"pattern": CHANGED, "found": words + regrown + others}


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
    biases = bias_paths(anatomy)
    parameters = anatomy.model.named_parameters(remove_duplicate=False)
    return {name: p.shape for name, p in parameters if name not in biases}


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
