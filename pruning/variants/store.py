"""A variant on disk: ``recipe.json`` and what was done to each projection.

``masks.safetensors`` says which weights were kept, ``weights.safetensors`` has their values if they were updated, and
``codes.safetensors`` has quantized projections, which have no mask; ``biases.safetensors`` has their biases, and
``others.safetensors`` the parameters beside the projections, as far as they differ from the dense model's.
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
from ..projections import Key, key_of, name_of
from ..recipes import EVERYWHERE, UNCALIBRATED, Recipe
from ..text.calibration import CalibrationSet, Drawn
from .biases import BIASES_FILE, GrowingBiases
from .codes import CodeSet, GrowingCodes, PackedCodes
from .masks import GrowingMasks, MaskSet, is_mask_file
from .others import OTHERS_FILE, OTHERS_FORMAT
from .stated import STATED_DIGITS, Stated
from .tensors import GrowingTensors, StoredTensors, damaged, room_for

RECIPE_FILE = "recipe.json"
MASKS_FILE = "masks.safetensors"
WEIGHTS_FILE = "weights.safetensors"
CODES_FILE = "codes.safetensors"
_WEIGHTS_FORMAT = "prunescope-weights-1"
#: Pattern and allocation in frames of a model pruned elsewhere; pattern of one whose weights were changed, or
#: quantized, elsewhere: these have no masks.
UNKNOWN, CHANGED, QUANTIZED = "unknown", "changed", "quantized"


class VariantRecord(BaseModel):
    """The content of a variant's ``recipe.json``.

    Attributes
    ----------
    id
        Name of the variant, unique in a study.
    model, model_fingerprint
        Name and fingerprint of the dense model.
    recipe
        The recipe; ``None`` for a model made elsewhere.
    calibration, text_fingerprint
        The calibration set, and the fingerprint of the text that it draws from.
    text
        What it took of each language's text.
    remarks
        Notes, such as experts that no token was routed to.
    found
        Of a model made elsewhere: what was done to it, in words.
    stated
        Of a model made elsewhere: what its name says of it.
    pattern
        Of a model made elsewhere: ``unknown`` if it was pruned and nobody states the pattern, the stated one if its
        masks agree, ``changed`` or ``quantized``.
    bits
        Size in bits a weight of quantized weights that are stored decoded: in an exported checkpoint, and of a model
        quantized elsewhere, as its checkpoint states it.
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
    found: str = ""
    stated: Stated = Stated()
    pattern: str = UNKNOWN
    bits: float | None = None
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

    def columns(self, sparsity: float, bits: float) -> dict[str, Any]:
        """Return the columns that describe the variant in frames.

        Parameters
        ----------
        sparsity
            Its sparsity as measured, used if there is no recipe.
        bits
            Its size in bits a weight.
        """
        recipe, calibration, stated = self.recipe, self.calibration, self.stated
        columns: dict[str, Any] = {"model": self.model}
        propagation, drawn, seed, share = UNCALIBRATED, UNCALIBRATED, 0, 0.0
        if recipe is None:
            seed = stated.seed or 0
            if stated.calibration is not None:
                propagation, drawn = UNKNOWN, stated.calibration
            columns |= {
                "method": stated.method or self.id,
                "sparsity": round(sparsity, STATED_DIGITS if stated.method else 4),
                "pattern": self.pattern,
                "allocation": UNKNOWN,
                "scope": EVERYWHERE,
            }
        else:
            if calibration:
                propagation, drawn, seed = recipe.propagation, calibration.name, calibration.seed
                share = calibration.item_share
            columns |= {
                "method": recipe.method_label,
                "sparsity": recipe.sparsity,
                "pattern": recipe.pattern_label,
                "allocation": recipe.allocation_label,
                "scope": recipe.scope,
            }
        text = {"calibration": drawn, "seed": seed}
        return columns | {"propagation": propagation, "item_share": share, "bits": bits, **text}


def _reason(error: ValueError) -> str:
    """Return a short reason why a file is invalid."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def is_variant(folder: Path) -> bool:
    """Whether a folder holds a variant that prunescope wrote, complete or not, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    if not names <= {RECIPE_FILE, MASKS_FILE, WEIGHTS_FILE, CODES_FILE, BIASES_FILE, OTHERS_FILE}:
        return False
    try:
        content = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return is_mask_file(folder / MASKS_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"id", "model_fingerprint"} <= content.keys()


class VariantWriter:
    """Writes the parts of a variant into a folder, one projection at a time; see :meth:`at`."""

    def __init__(
        self,
        masks: GrowingMasks,
        values: GrowingTensors,
        codes: GrowingCodes,
        biases: GrowingBiases,
        others: GrowingTensors,
    ) -> None:
        self._masks = masks
        self._values = values
        self._codes = codes
        self._biases = biases
        self._others = others

    @classmethod
    def at(cls, folder: Path, shapes: Mapping[Key, Shape], others: Mapping[str, int] | None = None) -> VariantWriter:
        """Start in an existing folder.

        Parameters
        ----------
        folder
            The folder.
        shapes
            Shapes of all projections that may be written.
        others
            Paths of all other parameters that may be written, and their numbers of values.
        """
        sizes = {name_of(key): outputs * inputs for key, (outputs, inputs) in shapes.items()}
        room = room_for(sizes, {_WEIGHTS_FORMAT: "0" * 64})
        masks, values = GrowingMasks.at(folder / MASKS_FILE, shapes), GrowingTensors(folder / WEIGHTS_FILE, room)
        beside = GrowingTensors(folder / OTHERS_FILE, room_for(others or {}, {OTHERS_FORMAT: "0" * 64}))
        codes, biases = GrowingCodes.at(folder / CODES_FILE, shapes), GrowingBiases.at(folder, shapes)
        return cls(masks, values, codes, biases, beside)

    def add(self, key: Key, packed: Tensor, inputs: int, values: Tensor | None = None) -> None:
        """Write one pruned projection.

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

    def add_values(self, key: Key, values: Tensor) -> None:
        """Write all values of a projection that has no mask."""
        self._values.add(name_of(key), values)

    def add_codes(self, key: Key, packed: PackedCodes) -> None:
        """Write one quantized projection."""
        self._codes.add(key, packed)

    def add_bias(self, key: Key, bias: Tensor) -> None:
        """Write the bias of one projection, if it differs from the dense model's."""
        self._biases.add(key, bias)

    def add_other(self, name: str, value: Tensor) -> None:
        """Write a parameter beside the projections, by its path, if it differs from the dense model's."""
        self._others.add(name, value)

    def state(self) -> dict[str, Any]:
        """Flush to disk, and return the state that :meth:`resumed` needs."""
        return {
            "masks": self._masks.state(),
            "values": self._values.state(),
            "codes": self._codes.state(),
            "biases": self._biases.file.state(),
            "others": self._others.state(),
        }

    @classmethod
    def resumed(cls, folder: Path, state: Mapping[str, Any]) -> VariantWriter | None:
        """Return the files as of `state`, or ``None`` if one is missing or was modified."""
        masks = GrowingMasks.resumed(folder / MASKS_FILE, state["masks"])
        values = GrowingTensors.resumed(folder / WEIGHTS_FILE, state["values"])
        codes = GrowingCodes.resumed(folder / CODES_FILE, state["codes"])
        biases = GrowingTensors.resumed(folder / BIASES_FILE, state["biases"])
        others = GrowingTensors.resumed(folder / OTHERS_FILE, state["others"])
        if masks is None or values is None or codes is None or biases is None or others is None:
            return None
        return cls(masks, values, codes, GrowingBiases(biases), others)

    def finish(self, model_fingerprint: str) -> None:
        """Complete the files."""
        if len(self._codes):
            self._codes.finish(model_fingerprint)
        if len(self._masks) or not (len(self._codes) or len(self._values)):
            self._masks.finish(model_fingerprint)
        if len(self._values):
            self._values.finish({_WEIGHTS_FORMAT: model_fingerprint})
        self._biases.finish(model_fingerprint)
        if len(self._others):
            self._others.finish({OTHERS_FORMAT: model_fingerprint})


def open_codes(folder: Path, model_fingerprint: str) -> CodeSet:
    """Return the codes in a variant's folder, read on access; empty if there is no file.

    Raises
    ------
    VariantError
        If the file is damaged.
    """
    path = folder / CODES_FILE
    return CodeSet.open(path, model_fingerprint) if path.is_file() else CodeSet()


def open_masks(folder: Path, model_fingerprint: str) -> MaskSet:
    """Return the masks in a variant's folder, read on access; none if all of it is quantized or changed.

    Raises
    ------
    VariantError
        If the file is missing or damaged.
    """
    path = folder / MASKS_FILE
    if not path.exists() and any((folder / name).is_file() for name in (CODES_FILE, WEIGHTS_FILE)):
        return MaskSet({}, {})
    return MaskSet.open(path, model_fingerprint)


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
    """Values of kept weights, or of all weights where there is no mask, read from their file on access."""

    def __init__(self, path: Path, masks: MaskSet, model_fingerprint: str) -> None:
        self._file = StoredTensors(path)
        if self._file.metadata.get(_WEIGHTS_FORMAT) != model_fingerprint:
            raise VariantError(
                f"{path} is not a weight file of this variant; delete the variant's folder and run again"
            )
        shapes = self._file.shapes
        try:
            self._names = {key_of(name): name for name in self._file.in_order()}
        except ValueError as error:
            raise damaged(path, error) from error
        if not all(
            shapes[name] == (masks.kept(key),) if key in masks else len(shapes[name]) == 2
            for key, name in self._names.items()
        ):
            raise VariantError(f"{path} does not match the variant's masks; delete the variant's folder and run again")

    def __contains__(self, key: object) -> bool:
        """Whether a projection's weights were updated."""
        return key in self._names  # Mapping's default would read the values

    def __getitem__(self, key: Key) -> Tensor:
        """Read the values of one projection."""
        return self._file.read(self._names[key])

    def shape(self, key: Key) -> tuple[int, ...]:
        """Return the shape of one projection's values: how many there are, or that of the whole weight."""
        return self._file.shapes[self._names[key]]

    def stretch(self, key: Key, start: int, stop: int) -> Tensor:
        """Read a range of the values of one projection."""
        return self._file.read(self._names[key], start, stop)

    def __iter__(self) -> Iterator[Key]:
        """Iterate over the projections whose weights were updated."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of such projections."""
        return len(self._names)


def shape_of_values(values: Mapping[Key, Tensor], key: Key) -> tuple[int, ...]:
    """Return the shape of a projection's values, without reading them from a file."""
    return values.shape(key) if isinstance(values, StoredValues) else tuple(values[key].shape)


def stretch(values: Mapping[Key, Tensor], key: Key, start: int, stop: int) -> Tensor:
    """Return a range of a projection's values; from a file, only that range is read."""
    return values.stretch(key, start, stop) if isinstance(values, StoredValues) else values[key][start:stop]
