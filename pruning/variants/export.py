"""Exporting variants as ordinary checkpoints, with a model card that states the recipe."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jinja2 import Environment, StrictUndefined
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import VariantError
from ..files import write_json, write_text
from ..models.anatomy import Anatomy, role_kind
from ..models.checkpoint import INDEX
from ..models.quiet import no_progress_bars
from ..models.streaming import Streamed, residence_of
from ..parameters import NONE
from ..projections import Key
from ..text.languages import named
from .masks import MaskSet
from .others import replaced, unties
from .smaller import needs_biases, rebuilt, smallest
from .store import VariantRecord

CARD_FILE = "README.md"
#: A Hub id, which a model card can name as base model; the path of a folder is not.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@runtime_checkable
class Exportable(Protocol):
    """What an export needs to know about a variant."""

    @property
    def record(self) -> VariantRecord:
        """The record of the variant."""

    @property
    def masks(self) -> MaskSet:
        """The masks."""

    @property
    def values(self) -> Mapping[Key, Tensor]:
        """Values of the kept weights, where they were updated."""

    def bits(self) -> float:
        """Return the size of its projections in bits a weight."""

    def changes(self, key: Key) -> bool:
        """Whether a projection differs from the dense model's."""

    @property
    def biases(self) -> Mapping[Key, Tensor]:
        """Biases that differ from the dense model's."""

    @property
    def others(self) -> Mapping[str, Tensor]:
        """Parameters beside the projections that differ from the dense model's."""

    def weight(self, key: Key, dense: Tensor) -> Tensor:
        """Return the weight of one projection, given the dense model's."""

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager that turns a model into the variant."""


def write_checkpoint(variant: Exportable, anatomy: Anatomy, tokenizer: Any, folder: Path) -> str:
    """Write a variant as a checkpoint into an existing folder, without its removed structures if that is possible.

    Returns
    -------
    str
        What was cut out, or why removed structures are stored as zeros; empty if the variant has none.

    Raises
    ------
    VariantError
        If it has biases that a checkpoint of its architecture has no place for.
    """
    model: Any = anatomy.model
    residence = residence_of(model)
    recipe = variant.record.recipe
    structure = recipe.choosing.structure if recipe is not None else ()
    own, said = None, ""
    if isinstance(residence, Streamed):
        if needs_biases(variant, anatomy):
            raise VariantError(f'"{variant.record.id}" adds biases to the dense model; export it without --stream')
        said = "full size, with zeros: it is written block by block" if structure else ""
    elif structure:
        own, said = smallest(variant, anatomy, structure)
        said = f"smaller: {said}" if own is not None else f"full size, with zeros: {said}"
    if own is None and needs_biases(variant, anatomy):
        own, reason = rebuilt(variant, anatomy, ())
        if own is None:
            instead = "with parameters = { bias = 0 }"
            if recipe is not None and recipe.correction != NONE:
                instead = f'without correction = "{recipe.correction}"'
            raise VariantError(f'"{variant.record.id}" cannot be exported: {reason}; prune {instead}')
    if own is not None:
        with no_progress_bars():
            own.save_pretrained(folder)
    elif isinstance(residence, Streamed):
        if unties(anatomy, variant.others):
            raise VariantError(
                f'"{variant.record.id}" has a head or embeddings of its own, which are tied in the dense model; export '
                "it without --stream"
            )
        _copy_the_rest(residence.shards.folder, folder)
        model.config.save_pretrained(folder)  # not copied, since the dtype may differ
        _write_shards(variant, anatomy, residence, folder)
    else:
        with variant.applied(model), _untied(anatomy, variant), no_progress_bars():
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / CARD_FILE, model_card(variant, said))
    return said


@contextmanager
def _untied(anatomy: Anatomy, variant: Exportable) -> Iterator[None]:
    """Context manager in which a model is saved with all parameters, if the variant's are not tied as the dense ones.

    Otherwise transformers would leave out those that are tied in the dense model.
    """
    if not unties(anatomy, variant.others):
        yield
        return
    model: Any = anatomy.model
    configs = list({id(config): config for config in (model.config, anatomy.config)}.values())
    before = [config.tie_word_embeddings for config in configs]
    ties = model.all_tied_weights_keys
    try:
        for config in configs:
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {name: own for name, own in ties.items() if name not in variant.others}
        yield
    finally:
        for config, tied in zip(configs, before, strict=True):
            config.tie_word_embeddings = tied
        model.all_tied_weights_keys = ties


def model_card(variant: Exportable, said: str = "") -> str:
    """Return a model card in Markdown, with Hub metadata; `said` as :func:`write_checkpoint` returns it."""
    record, masks = variant.record, variant.masks
    kinds: dict[str, list[int]] = {}
    for key in masks:
        outputs, inputs = masks.shape(key)
        counts = kinds.setdefault(role_kind(key[1]), [0, 0])
        counts[0] += outputs * inputs - masks.kept(key)
        counts[1] += outputs * inputs
    calibration = record.calibration
    template = (package_files("pruning.variants") / "model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(template).render(
        record=record,
        hub_id=_HUB_ID.fullmatch(record.model) is not None and not Path(record.model).exists(),
        recipe=record.recipe,
        calibration=calibration,
        languages=[named(tag) for tag in calibration.languages] if calibration else [],
        sparsity=masks.sparsity() if masks else 0.0,
        bits=variant.bits(),
        removed={kind: removed / total for kind, (removed, total) in kinds.items()},
        corrected=bool(variant.values),
        said=said,
        biases=len(variant.biases),
        others=len(variant.others),
        version=version("prunescope"),
    )


def _write_shards(variant: Exportable, anatomy: Anatomy, residence: Streamed, folder: Path) -> None:
    """Write one shard per block and one for everything else, with the tensor names of the original checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = anatomy.model
    layers = len(anatomy.blocks)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    left = [name for name in model.state_dict() if residence.is_stored(name) or name not in parameters]
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(layers + 1):
        block = f"{anatomy.path(layer, 'residual')}." if layer < layers else ""
        names = [name for name in left if name.startswith(block)]
        left = [name for name in left if name not in names]
        with residence.present([name for name in names if name in parameters]):
            for role in anatomy.roles(layer) if layer < layers else ():
                if variant.changes((layer, role)):
                    anatomy.set_weight(layer, role, variant.weight((layer, role), anatomy.weight(layer, role)))
                if (layer, role) in variant.biases:
                    anatomy.set_bias(layer, role, variant.biases[layer, role])
            with replaced(anatomy, variant.others, [name for name in names if name in parameters]):
                state = model.state_dict()
                tensors = revert_weight_conversion(model, {name: state[name] for name in names})
        shard = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Copy configuration files, but neither weights nor code."""
    for path in source.iterdir():
        if path.suffix == ".json" and path.is_file() and not path.name.endswith((".index.json", "recipe.json")):
            shutil.copyfile(path, folder / path.name)
