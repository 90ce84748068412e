"""A variant on disk: ``recipe.json``, ``masks.safetensors`` and, if weights were updated, ``weights.safetensors``."""

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
from ..text.calibration import CalibrationSet, Drawn
from .masks import GrowingMasks, MaskSet, is_mask_file
from .tensors import GrowingTensors, StoredTensors, room_for

RECIPE_FILE = "recipe.json"
MASKS_FILE = "masks.safetensors"
WEIGHTS_FILE = "weights.safetensors"
_WEIGHTS_FORMAT = "prunescope-weights-1"
#: Pattern and allocation in frames of a model pruned elsewhere.
UNKNOWN = "unknown"


class VariantRecord(BaseModel):
    """The content of a variant's ``recipe.json``.

    Attributes
    ----------
    id
        Name of the variant, unique in a study.
    model, model_fingerprint
        Name and fingerprint of the dense model.
    recipe
        The recipe; ``None`` for a model pruned elsewhere.
    calibration, text_fingerprint
        The calibration set, and the fingerprint of the text that it draws from.
    text
        What it took of each language's text.
    remarks
        Notes, such as experts that no token was routed to.
    key
        Hash of everything that the variant depends on, including the code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    model: str
    model_fingerprint: str
    recipe: Recipe | None = None
    calibration: CalibrationSet | None = None
    text_fingerprint: str | None = None
    text: tuple[Drawn, ...] = ()
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
        """Return the columns that describe the variant in frames; `sparsity` is used if there is no recipe."""
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
    """Return a short reason why a file is invalid."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def is_variant(folder: Path) -> bool:
    """Whether a folder holds a variant that prunescope wrote, complete or not, and nothing else."""
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
    """Writes the masks and weights of a variant into a folder, one projection at a time; see :meth:`at`."""

    def __init__(self, masks: GrowingMasks, values: GrowingTensors) -> None:
        self._masks = masks
        self._values = values

    @classmethod
    def at(cls, folder: Path, shapes: Mapping[Key, Shape]) -> VariantWriter:
        """Start in an existing folder; `shapes` are those of all projections that may be written."""
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
            Its mask, eight weights per byte, and its number of inputs.
        values
            Values of the kept weights, in mask order, if they were updated.
        """
        self._masks.add(key, packed, inputs)
        if values is not None:
            self._values.add(name_of(key), values)

    def state(self) -> dict[str, Any]:
        """Flush to disk, and return the state that :meth:`resumed` needs."""
        return {"masks": self._masks.state(), "values": self._values.state()}

    @classmethod
    def resumed(cls, folder: Path, state: Mapping[str, Any]) -> VariantWriter | None:
        """Return the files as of `state`, or ``None`` if one is missing or was modified."""
        masks = GrowingMasks.resumed(folder / MASKS_FILE, state["masks"])
        values = GrowingTensors.resumed(folder / WEIGHTS_FILE, state["values"])
        return None if masks is None or values is None else cls(masks, values)

    def finish(self, model_fingerprint: str) -> None:
        """Complete the files."""
        self._masks.finish(model_fingerprint)
        if len(self._values):
            self._values.finish({_WEIGHTS_FORMAT: model_fingerprint})


def open_values(folder: Path, masks: MaskSet, model_fingerprint: str) -> Mapping[Key, Tensor]:
    """Return the kept weights' values in a variant's folder, read on access; empty if there is no file.

    Raises
    ------
    VariantError
        If the file is damaged or does not match the masks.
    """
    path = folder / WEIGHTS_FILE
    return StoredValues(path, masks, model_fingerprint) if path.is_file() else {}


class StoredValues(Mapping[Key, Tensor]):
    """Values of kept weights, read from their file on access."""

    def __init__(self, path: Path, masks: MaskSet, model_fingerprint: str) -> None:
        self._file = StoredTensors(path)
        if self._file.metadata.get(_WEIGHTS_FORMAT) != model_fingerprint:
            raise VariantError(
                f"{path} is not a weight file of this variant; delete the variant's folder and run again"
            )
        shapes = self._file.shapes
        self._names = {key: name_of(key) for key in masks if name_of(key) in shapes}
        if len(self._names) != len(shapes) or any(shapes[n] != (masks.kept(k),) for k, n in self._names.items()):
            raise VariantError(f"{path} does not match the variant's masks; delete the variant's folder and run again")

    def __contains__(self, key: object) -> bool:
        """Whether a projection's weights were updated."""
        return key in self._names  # Mapping's default would read the values

    def __getitem__(self, key: Key) -> Tensor:
        """Read the values of one projection."""
        return self._file.read(self._names[key])

    def stretch(self, key: Key, start: int, stop: int) -> Tensor:
        """Read a range of the values of one projection."""
        return self._file.read(self._names[key], start, stop)

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the projections whose weights were updated."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of such projections."""
        return len(self._names)


def stretch(values: Mapping[Key, Tensor], key: Key, start: int, stop: int) -> Tensor:
    """Return a range of a projection's values; from a file, only that range is read."""
    return values.stretch(key, start, stop) if isinstance(values, StoredValues) else values[key][start:stop]
