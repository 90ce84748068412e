"""A variant in its folder: ``recipe.json``, ``masks.safetensors`` and, where weights were corrected,
``weights.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ..errors import VariantError
from ..files import write_json
from ..patterns import Shape
from ..projections import Key, name_of
from ..recipes import EVERYWHERE, UNCALIBRATED, Recipe
from ..text.calibration import CalibrationSet
from .masks import GrowingMasks, MaskSet, is_mask_file
from .tensors import GrowingTensors, StoredTensors, room_for

RECIPE_FILE = "recipe.json"
MASKS_FILE = "masks.safetensors"
WEIGHTS_FILE = "weights.safetensors"
_WEIGHTS_FORMAT = "prunescope-weights-1"
#: Pattern and allocation columns of a model that was pruned elsewhere.
UNKNOWN = "unknown"


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
    key
        Hash of everything that the variant depends on, the version of prunescope included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    model: str
    model_fingerprint: str
    recipe: Recipe | None = None
    calibration: CalibrationSet | None = None
    text_fingerprint: str | None = None
    remarks: tuple[str, ...] = ()
    key: str = ""

    @classmethod
    def open(cls, folder: Path) -> VariantRecord:
        """Read the record in a variant's folder.

        Raises
        ------
        VariantError
            If it is missing or damaged.
        """
        path = folder / RECIPE_FILE
        if not path.is_file():
            raise VariantError(f"there is no pruned variant in {folder} ({RECIPE_FILE} is missing)")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise VariantError(f"{path} is damaged ({_reason(error)}); delete the folder and run again") from error

    def save(self, folder: Path) -> None:
        """Write the record into a folder."""
        write_json(folder / RECIPE_FILE, self.model_dump(mode="json"))

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


def _reason(error: ValueError) -> str:
    """Return in a few words what is wrong with a file."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


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


class VariantWriter:
    """The masks and weights of a variant on their way into a folder, a projection at a time; see :meth:`at`."""

    def __init__(self, masks: GrowingMasks, values: GrowingTensors) -> None:
        self._masks = masks
        self._values = values

    @classmethod
    def at(cls, folder: Path, shapes: Mapping[Key, Shape]) -> VariantWriter:
        """Begin in a folder, which is there; `shapes` are those of the projections that may be written."""
        sizes = {name_of(key): outputs * inputs for key, (outputs, inputs) in shapes.items()}
        room = room_for(sizes, {_WEIGHTS_FORMAT: "0" * 64})
        return cls(GrowingMasks.at(folder / MASKS_FILE, shapes), GrowingTensors(folder / WEIGHTS_FILE, room))

    def add(self, key: Key, packed: Tensor, inputs: int, values: Tensor | None = None) -> None:
        """Write one projection.

        Parameters
        ----------
        key
            The projection.
        packed, inputs
            Its mask, eight weights a byte, and how many inputs it has.
        values
            Of the kept weights, in the order of the mask, if they were corrected.
        """
        self._masks.add(key, packed, inputs)
        if values is not None:
            self._values.add(name_of(key), values)

    def state(self) -> dict[str, Any]:
        """Make sure that what was added is on disk, and return what :meth:`resumed` needs."""
        return {"masks": self._masks.state(), "values": self._values.state()}

    @classmethod
    def resumed(cls, folder: Path, state: Mapping[str, Any]) -> VariantWriter | None:
        """Return the files as they were when `state` was taken; ``None`` if one is not there or was altered."""
        masks = GrowingMasks.resumed(folder / MASKS_FILE, state["masks"])
        values = GrowingTensors.resumed(folder / WEIGHTS_FILE, state["values"])
        return None if masks is None or values is None else cls(masks, values)

    def finish(self, model_fingerprint: str) -> None:
        """Write what makes the files whole."""
        self._masks.finish(model_fingerprint)
        if len(self._values):
            self._values.finish({_WEIGHTS_FORMAT: model_fingerprint})


def open_values(folder: Path, masks: MaskSet, model_fingerprint: str) -> Mapping[Key, Tensor]:
    """Return the kept weights' values in a variant's folder, each read when it is asked for; none if there is no file.

    Raises
    ------
    VariantError
        If the file is damaged or does not fit the masks.
    """
    path = folder / WEIGHTS_FILE
    return StoredValues(path, masks, model_fingerprint) if path.is_file() else {}


class StoredValues(Mapping[Key, Tensor]):
    """Values of kept weights, read from their file as they are asked for."""

    def __init__(self, path: Path, masks: MaskSet, model_fingerprint: str) -> None:
        self._file = StoredTensors(path)
        if self._file.metadata.get(_WEIGHTS_FORMAT) != model_fingerprint:
            raise VariantError(
                f"{path} is not a weight file of this variant; delete the variant's folder and run again"
            )
        shapes = self._file.shapes
        self._names = {key: name_of(key) for key in masks if name_of(key) in shapes}
        if len(self._names) != len(shapes) or any(shapes[n] != (masks.kept(k),) for k, n in self._names.items()):
            raise VariantError(f"{path} does not fit its masks; delete the variant's folder and run again")

    def __contains__(self, key: object) -> bool:
        """Whether a projection's weights were corrected."""
        return key in self._names  # without reading it, which Mapping's own does

    def __getitem__(self, key: Key) -> Tensor:
        """Read the values of one projection."""
        return self._file.read(self._names[key])

    def stretch(self, key: Key, start: int, stop: int) -> Tensor:
        """Read some of the values of one projection."""
        return self._file.read(self._names[key], start, stop)

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the projections whose weights were corrected."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._names)


def stretch(values: Mapping[Key, Tensor], key: Key, start: int, stop: int) -> Tensor:
    """Return some of a projection's values, without reading the others where they are in a file."""
    return values.stretch(key, start, stop) if isinstance(values, StoredValues) else values[key][start:stop]
