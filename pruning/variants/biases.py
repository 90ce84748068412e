"""Biases of a variant that differ from the dense model's: one vector per projection, in ``biases.safetensors``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import VariantError
from ..models.anatomy import Anatomy
from ..patterns import Shape
from ..projections import Key, key_of, name_of
from .tensors import GrowingTensors, StoredTensors, damaged, room_for

BIASES_FILE = "biases.safetensors"
_FORMAT = "prunescope-biases-1"


class GrowingBiases:
    """A file of biases that is written one projection at a time; see :meth:`at`."""

    def __init__(self, file: GrowingTensors) -> None:
        self.file = file

    @classmethod
    def at(cls, folder: Path, shapes: Mapping[Key, Shape]) -> GrowingBiases:
        """Start in an existing folder; `shapes` are those of all projections that may be added."""
        sizes = {name_of(key): outputs for key, (outputs, _) in shapes.items()}
        return cls(GrowingTensors(folder / BIASES_FILE, room_for(sizes, {_FORMAT: "0" * 64})))

    def add(self, key: Key, bias: Tensor) -> None:
        """Write the bias of one projection."""
        self.file.add(name_of(key), bias)

    def finish(self, model_fingerprint: str) -> None:
        """Complete the file, if there is anything in it."""
        if len(self.file):
            self.file.finish({_FORMAT: model_fingerprint})


def open_biases(folder: Path, model_fingerprint: str) -> dict[Key, Tensor]:
    """Return the biases in a variant's folder; empty if there is no file.

    Raises
    ------
    VariantError
        If the file is damaged, or belongs to another variant.
    """
    path = folder / BIASES_FILE
    if not path.is_file():
        return {}
    file = StoredTensors(path)
    if file.metadata.get(_FORMAT) != model_fingerprint:
        raise VariantError(f"{path} is not a bias file of this variant; delete the variant's folder and run again")
    try:
        return {key_of(name): file.read(name) for name in file}
    except ValueError as error:
        raise damaged(path, error) from error


@contextmanager
def biased(anatomy: Anatomy, biases: Mapping[Key, Tensor]) -> Iterator[None]:
    """Context manager that replaces biases of a model, and restores what was there: a bias, or none."""
    present = {key: anatomy.bias(*key) for key in biases}
    before = {key: None if bias is None else bias.clone() for key, bias in present.items()}
    try:
        for key, bias in biases.items():
            anatomy.set_bias(*key, bias)
        yield
    finally:
        for key, dense in before.items():
            anatomy.set_bias(*key, dense)
