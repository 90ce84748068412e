"""Pruned variants: make, save, open, apply to the dense model, restore, export, and take over from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..engine import Job, Pruned, sweep
from ..engine.streams import Progress
from ..errors import DiskError, ModelError, RecipeError, VariantError
from ..files import whole_folder, write_json
from ..models.anatomy import Anatomy
from ..models.streaming import residence_of, save_tensors
from ..recipes import EVERYWHERE, UNCALIBRATED, Recipe
from ..text.calibration import CalibrationSet, CalibrationText, calibration_fingerprint
from ..text.sources import Corpus
from .export import write_checkpoint
from .masks import Key, MaskSet, is_mask_file, pack_bits

RECIPE_FILE = "recipe.json"
MASKS_FILE = "masks.safetensors"
WEIGHTS_FILE = "weights.safetensors"
_WEIGHTS_FORMAT = "prunescope-weights-1"
#: Pattern and allocation columns of a model that was pruned elsewhere.
UNKNOWN = "unknown"
#: Relative difference between two values that are one before rounding to bfloat16.
_ROUNDING = 2**-7


class VariantRecord(BaseModel):
    """What ``recipe.json`` says of a variant.

    Attributes
    ----------
    id
        Its name, unique in a study.
    model, model_fingerprint
        The dense model.
    recipe
        What was done; ``None`` for a model that was pruned elsewhere.
    calibration, text_fingerprint
        With which text.
    remarks
        What happened on the way, such as experts that no token was sent to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    model: str
    model_fingerprint: str
    recipe: Recipe | None = None
    calibration: CalibrationSet | None = None
    text_fingerprint: str | None = None
    remarks: tuple[str, ...] = ()

    def columns(self, sparsity: float) -> dict[str, Any]:
        """Return the columns of a tidy frame; `sparsity`, the share that was removed, is for those without a recipe."""
        recipe, calibration = self.recipe, self.calibration
        columns: dict[str, Any] = {"model": self.model}
        if recipe is None:
            columns |= {
                "method": self.id,
                "sparsity": round(sparsity, 4),
                "pattern": UNKNOWN,
                "allocation": UNKNOWN,
                "scope": EVERYWHERE,
            }
        else:
            columns |= {
                "method": recipe.method_label,
                "sparsity": recipe.sparsity,
                "pattern": recipe.pattern,
                "allocation": recipe.allocation_label,
                "scope": recipe.scope,
            }
        return columns | {
            "propagation": recipe.propagation if recipe and calibration else UNCALIBRATED,
            "calibration": calibration.name if calibration else UNCALIBRATED,
            "seed": calibration.seed if calibration else 0,
        }


@dataclass(frozen=True)
class Variant:
    """A pruned variant: what was done, which weights were kept, and their values where these were corrected.

    Attributes
    ----------
    record
        Recipe, calibration set and the dense model it belongs to.
    masks
        The kept weights of every projection that was pruned.
    values
        The kept weights' values in the order of the mask, by projection; those of the dense model where there is none.
    """

    record: VariantRecord
    masks: MaskSet
    values: Mapping[Key, Tensor]

    @property
    def id(self) -> str:
        """The variant's name, unique in a study."""
        return self.record.id

    def columns(self) -> dict[str, Any]:
        """Return the columns of a tidy frame that say which variant was measured."""
        return self.record.columns(self.masks.sparsity())

    def weight(self, key: Key, dense: Tensor) -> Tensor:
        """Return the weight of one projection, given the dense model's."""
        weight = torch.empty_like(dense)
        self.write(key, dense, weight)
        return weight

    @torch.no_grad()
    def write(self, key: Key, dense: Tensor, out: Tensor) -> None:
        """Write this variant's weight of one projection into `out`, given the dense model's.

        Removed weights are positive zeros. A projection that was not pruned is written as it is in the dense model.

        Parameters
        ----------
        key
            The projection.
        dense
            Its weight in the dense model, ``[outputs, inputs]``.
        out
            Of the same shape, dtype and device; may be a live view of a model's parameter, but no part of `dense`.
        """
        if key not in self.masks:
            out.copy_(dense)
            return
        removed = ~self.masks[key].to(dense.device)
        if key in self.values:
            out.zero_().masked_scatter_(~removed, self.values[key].to(dense.device, dense.dtype))
        else:
            out.copy_(dense).masked_fill_(removed, 0)

    def pieces(self, key: Key, dense: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield mask and weight (float32) of one projection, so many rows at a time, given the dense model's weight.

        For what looks at several variants at once: all of each would be too much memory.
        """
        passed = 0
        for start in range(0, len(dense), rows):
            mask = self.masks.rows(key, start, start + rows).to(dense.device)
            weight = dense[start : start + rows].float()
            if key in self.values:
                kept = int(mask.sum())
                weight = torch.zeros_like(weight)
                weight[mask] = _stretch(self.values, key, passed, passed + kept).to(weight)
                passed += kept
            else:
                weight = weight.masked_fill(~mask, 0)
            yield mask, weight

    def save(self, folder: Path) -> None:
        """Write ``recipe.json``, ``masks.safetensors`` and, if weights were corrected, ``weights.safetensors``.

        Raises
        ------
        DiskError
            If there is something in the folder that is no variant, or the disk refuses.
        """
        with whole_folder(folder, is_variant) as partial:
            self.masks.save(partial / MASKS_FILE, self.record.model_fingerprint)
            if self.values:
                metadata = {_WEIGHTS_FORMAT: self.record.model_fingerprint}
                order = [key for key in self.masks if key in self.values]
                save_tensors(_Named(self.values, order), partial / WEIGHTS_FILE, metadata)
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
        except ValueError as error:
            raise VariantError(f"{path} is damaged ({_reason(error)}); delete the folder and run again") from error
        if model_fingerprint is not None and record.model_fingerprint != model_fingerprint:
            raise VariantError(
                f'variant "{record.id}" belongs to another model ({record.model}); load that one to open it'
            )
        masks = MaskSet.open(folder / MASKS_FILE, record.model_fingerprint)
        weights = folder / WEIGHTS_FILE
        return cls(record, masks, _KeptValues(weights, record, masks) if weights.is_file() else {})

    @classmethod
    def between(cls, dense: nn.Module, pruned: nn.Module, name: str) -> Variant:
        """Take over a model that was pruned elsewhere, as a variant of its dense parent.

        A weight that is zero counts as removed. Where other weights differ from the dense ones, their values are taken
        over too. What was done is not known, unless the model was loaded from a folder that :meth:`export` wrote: then
        the variant has the recipe, calibration set and remarks that lie beside the checkpoint, so that frames show it
        as what it is (method ``wanda``, and so on) and not by its new name.

        Parameters
        ----------
        dense, pruned
            Of the same architecture and size; either may be streamed from its checkpoint.
        name
            What to call it.

        Raises
        ------
        VariantError
            If they do not fit together, nothing was removed, or the pruned model differs in more than its projections.
        """
        parent, child = Anatomy(dense), Anatomy(pruned)
        if _shapes(parent) != _shapes(child):
            raise VariantError(f'"{name}" is not a pruned version of this model: its parts or their shapes differ')
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
                f'"{name}" is zero nowhere but where this model is, and this model is zero where "{name}" is not: '
                "were the dense and the pruned model swapped?"
            )
        if news == 0:
            raise VariantError(
                f'"{name}" is zero nowhere but where this model is: it is not pruned, or its masks were not applied'
            )
        return cls(record, MaskSet(bits, inputs), values)

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
        _check_in_memory(anatomy)
        self.check_belongs_to(anatomy.fingerprint())
        for key in self.masks:
            anatomy.set_weight(*key, self.weight(key, anatomy.weight(*key)))

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write an ordinary checkpoint that ``from_pretrained`` loads, with the recipe and a model card beside it.

        A model that is streamed from its shards is also written so, a block at a time.

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
        anatomy = Anatomy(model)
        self.check_belongs_to(anatomy.fingerprint())
        with whole_folder(folder) as partial:
            write_checkpoint(self, anatomy, tokenizer, partial)
            write_json(partial / RECIPE_FILE, self.record.model_dump(mode="json"))

    def check_belongs_to(self, model_fingerprint: str) -> None:
        """Raise ``VariantError`` unless the variant was made from the dense model with this fingerprint."""
        if model_fingerprint != self.record.model_fingerprint:
            raise VariantError(
                f'variant "{self.id}" belongs to another model ({self.record.model}), or this one is pruned already'
            )


def is_variant(folder: Path) -> bool:
    """Whether a folder is a variant that prunescope wrote, whole or not, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if not names <= {RECIPE_FILE, MASKS_FILE, WEIGHTS_FILE}:
        return False
    try:
        content = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return is_mask_file(folder / MASKS_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"id", "model_fingerprint"} <= content.keys()


class DenseCopy:
    """The dense weights of a model, kept aside so that it can become one variant after another quickly.

    Parameters
    ----------
    model
        The dense model. The copy takes as much memory as its prunable weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._anatomy = Anatomy(model)
        _check_in_memory(self._anatomy)
        self._fingerprint = self._anatomy.fingerprint()
        #: Every projection's weight in the dense model.
        self.dense: Mapping[Key, Tensor] = {key: self._anatomy.weight(*key).clone() for key in self._anatomy}

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
                self._anatomy.set_weight(*key, variant.weight(key, self.dense[key]))
            yield
        finally:
            for key in variant.masks:
                self._anatomy.set_weight(*key, self.dense[key])


def _check_in_memory(anatomy: Anatomy) -> None:
    if anatomy.streamed:
        raise ModelError("this model was loaded with stream=True, to be pruned and exported only; load it whole")


def _shapes(anatomy: Anatomy) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in anatomy.model.named_parameters(remove_duplicate=False)}


def _check_unchanged(parent: Anatomy, child: Anatomy, names: Iterable[str], called: str) -> None:
    """Raise ``VariantError`` unless those of the parameters that hold no projections are the same in both models."""
    projections = parent.block_parameters()
    for name in names:
        if name not in projections:
            before = parent.model.get_parameter(name)
            after = child.model.get_parameter(name).to(before)
            if not torch.equal(before, after) and not torch.allclose(after.float(), before.float(), rtol=_ROUNDING):
                raise VariantError(
                    f'"{called}" differs from this model in more than its projections ({name}): it was trained after '
                    "it was pruned, or made from another model, and cannot be measured against this one"
                )


def _stated(record: VariantRecord, child: Anatomy) -> VariantRecord:
    """Return a record with what :meth:`Variant.export` wrote beside a checkpoint, if it is of the same dense model."""
    folder = str(child.model.name_or_path)
    path = Path(folder) / RECIPE_FILE
    if not folder:  # a model that was never loaded from anywhere
        return record
    try:
        stated = VariantRecord.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return record  # no such file, or another tool's
    if stated.model_fingerprint != record.model_fingerprint:
        remark = f"its {RECIPE_FILE} is left aside, since it speaks of another dense model ({stated.model})"
        return record.model_copy(update={"remarks": (remark,)})
    return stated.model_copy(update={"id": record.id, "model": record.model})


def _reason(error: ValueError) -> str:
    """Return in a few words what is wrong with a file."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


class _Named(Mapping[str, Tensor]):
    """Values by the names that they have in a file, each read when it is asked for."""

    def __init__(self, values: Mapping[Key, Tensor], order: Iterable[Key]) -> None:
        self._keys = {f"{layer}.{role}": (layer, role) for layer, role in order}
        self._values = values

    def __getitem__(self, name: str) -> Tensor:
        return self._values[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _stretch(values: Mapping[Key, Tensor], key: Key, start: int, stop: int) -> Tensor:
    """Return some of a projection's values, without reading the others where they are in a file."""
    return values.stretch(key, start, stop) if isinstance(values, _KeptValues) else values[key][start:stop]


class _KeptValues(Mapping[Key, Tensor]):
    """Values of kept weights, read from their file as they are asked for."""

    def __init__(self, path: Path, record: VariantRecord, masks: MaskSet) -> None:
        self._path = path
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise VariantError(f"{path} is damaged ({error}); delete the variant's folder and run again") from error
        if metadata.get(_WEIGHTS_FORMAT) != record.model_fingerprint:
            raise VariantError(
                f"{path} is not a weight file of this variant; delete the variant's folder and run again"
            )
        self._names = {key: f"{key[0]}.{key[1]}" for key in masks if f"{key[0]}.{key[1]}" in sizes}
        if len(self._names) != len(sizes) or any(sizes[n] != [masks.kept(k)] for k, n in self._names.items()):
            raise VariantError(f"{path} does not fit its masks; delete the variant's folder and run again")

    def __contains__(self, key: object) -> bool:
        return key in self._names  # without reading it, which Mapping's own does

    def __getitem__(self, key: Key) -> Tensor:
        name = self._names[key]
        with safe_open(self._path, "pt") as file:
            values: Tensor = file.get_tensor(name).clone()  # else the whole file stays mapped
        return values

    def stretch(self, key: Key, start: int, stop: int) -> Tensor:
        with safe_open(self._path, "pt") as file:
            values: Tensor = file.get_slice(self._names[key])[start:stop].clone()
        return values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def prune(
    model: Any,
    tokenizer: Any,
    recipes: Recipe | Sequence[Recipe],
    corpus: Corpus | None = None,
    calibration: CalibrationSet | Sequence[CalibrationSet] = (),
    *,
    name: str | None = None,
    batch_tokens: int = 2048,
    progress: Progress = lambda tokens: None,
) -> list[Variant]:
    """Make pruned variants: one for each recipe and calibration set, those of a set together, in their order.

    Parameters
    ----------
    model, tokenizer
        As :func:`pruning.load_model` gives them; the model is unchanged afterwards.
    recipes
        What to make. One that needs no text makes one variant, whatever the calibration sets.
    corpus, calibration
        Where the text is, and how much of which languages to take; needed unless no recipe is calibrated.
    name
        What to call the model in frames; its ``name_or_path`` by default.
    batch_tokens
        Tokens that go through a block at a time.
    progress
        Told of the tokens as they go through a block.

    Raises
    ------
    TextError
        If there is too little text.
    RecipeError, ModelError
        If a recipe cannot be carried out on this model.
    """
    wanted = [recipes] if isinstance(recipes, Recipe) else list(recipes)
    sets = [calibration] if isinstance(calibration, CalibrationSet) else list(calibration)
    jobs = planned_jobs(wanted, sets)
    text = CalibrationText.draw(tokenizer, corpus, sets) if corpus is not None and sets else None
    anatomy = Anatomy(model)
    pruned = sweep(anatomy, jobs, text, batch_tokens=batch_tokens, progress=progress)
    return variants_of(anatomy.fingerprint(), {job: pruned(job) for job in jobs}, name or model.name_or_path, corpus)


def planned_jobs(recipes: Iterable[Recipe], sets: Iterable[CalibrationSet]) -> list[Job]:
    """Return a job for every recipe that needs no text, then one for every calibration set and other recipe.

    Raises
    ------
    RecipeError
        If two of them would have the same name.
    """
    recipes, sets = list(recipes), list(sets)
    jobs = [Job(recipe) for recipe in recipes if not recipe.calibrated or not sets]
    jobs += [Job(recipe, calibration) for calibration in sets for recipe in recipes if recipe.calibrated]
    named: dict[str, Job] = {}
    for job in jobs:
        other = named.setdefault(job.id, job)
        if other != job:
            raise RecipeError(f'two variants would be called "{job.id}"; give their calibration sets other names')
    return list(named.values())


def variants_of(fingerprint: str, results: Mapping[Job, Pruned], name: str, corpus: Corpus | None) -> list[Variant]:
    """Return what a sweep has made of the dense model with this fingerprint, as variants."""
    variants = []
    for job, pruned in results.items():
        text = calibration_fingerprint(corpus, job.calibration) if corpus and job.calibration else None
        record = VariantRecord(
            id=job.id,
            model=name,
            model_fingerprint=fingerprint,
            recipe=job.recipe,
            calibration=job.calibration,
            text_fingerprint=text,
            remarks=pruned.remarks,
        )
        variants.append(Variant(record, pruned.masks, pruned.values or {}))
    return variants
