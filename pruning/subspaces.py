"""Language-specific subspaces of a model's residual stream, in a file (``subspaces.safetensors``).

A recipe with the parameter ``specific`` gives what lies in them less weight in the statistics behind its scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RecipeError, first_line, shortened
from .files import is_file, whole_file

SUBSPACES_FILE = "subspaces.safetensors"
_FORMAT: Final = "prunescope-subspaces-1"
_WRITE = "write it with: prunescope subspaces DIR"
#: Largest difference of a basis from an orthonormal one.
_ORTHONORMAL = 1e-3


class Subspaces(BaseModel):
    """Language-specific subspaces of the residual stream, one after each block: what is known of their file.

    Attributes
    ----------
    path
        The file.
    sha256
        SHA-256 (hex) of its content, by which subspaces are told apart.
    model_fingerprint
        Fingerprint of the dense model.
    languages
        That they tell apart.
    ranks
        Dimensions of the subspace after each block; 0: none.
    hidden
        Width of the stream.
    fitted_on
        The data behind them, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(default="", exclude=True)
    sha256: str
    model_fingerprint: str
    languages: tuple[str, ...]
    ranks: tuple[int, ...] = Field(min_length=1)
    hidden: int
    fitted_on: str = ""

    @classmethod
    def open(cls, path: Path | str) -> Subspaces:
        """Read what is known of a file, and check all of it; bases are read again when they are needed.

        Raises
        ------
        RecipeError
            If the file is missing, damaged, or holds no subspaces.
        """
        place = shortened(path, 200)
        if not is_file(path):
            raise RecipeError(f"there is no file {place} with subspaces; {_WRITE} --out {SUBSPACES_FILE}")
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("format") != _FORMAT:
                    raise RecipeError(f'{place} has no subspaces ("format" is not "{_FORMAT}"); {_WRITE}')
                bases = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - is no mapping
            about = json.loads(said["about"])
            known = cls(path=str(path), sha256=said["sha256"], **about)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{place} is damaged ({first_line(error)}); {_WRITE} again") from error
        whole = {_name(layer): (known.hidden, rank) for layer, rank in enumerate(known.ranks) if rank}
        if {name: tuple(basis.shape) for name, basis in bases.items()} != whole or known.sha256 != _sha256(
            about, bases
        ):
            raise RecipeError(f"{place} is damaged (its content is not what it says); {_WRITE} again")
        for name, basis in bases.items():
            rank = basis.shape[1]
            if not ((basis.T.double() @ basis.double() - torch.eye(rank)).abs() < _ORTHONORMAL).all():
                raise RecipeError(f'{place}: basis "{name}" is not orthonormal; {_WRITE} again')
        return known

    @classmethod
    def save(
        cls,
        path: Path,
        bases: Sequence[Float[Tensor, "hidden rank"] | None],
        *,
        model_fingerprint: str,
        languages: Sequence[str],
        fitted_on: str = "",
    ) -> Subspaces:
        """Write subspaces, whole or not at all.

        Parameters
        ----------
        path
            The file.
        bases
            Orthonormal columns, one basis after each block; ``None``: no subspace.
        model_fingerprint, languages, fitted_on
            As of the attributes.

        Raises
        ------
        DiskError
            If it cannot be written.
        """
        tensors = {
            _name(layer): basis.float().contiguous().clone() for layer, basis in enumerate(bases) if basis is not None
        }
        about = {
            "model_fingerprint": model_fingerprint,
            "languages": list(languages),
            "ranks": [0 if basis is None else basis.shape[1] for basis in bases],
            "hidden": next(iter(tensors.values())).shape[0],
            "fitted_on": fitted_on,
        }
        metadata = {"format": _FORMAT, "about": json.dumps(about), "sha256": _sha256(about, tensors)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata)
        return cls.open(path)

    def before(self, layer: int) -> Float[Tensor, "hidden rank"] | None:
        """Return the basis of the stream before a block, float32: that after the block before; ``None`` if none.

        The first block reads the embeddings, which have none.

        Raises
        ------
        RecipeError
            If the file was changed since it was opened.
        """
        if not 0 < layer <= len(self.ranks) or not self.ranks[layer - 1]:
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get("sha256") == self.sha256:
                    basis: Tensor = file.get_tensor(_name(layer - 1))
                    return basis
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"cannot read {shortened(self.path, 200)} any more: {first_line(error)}") from error
        raise RecipeError(f"{shortened(self.path, 200)} was changed since it was opened; start again")


def _name(layer: int) -> str:
    return f"after.{layer}"


def _sha256(about: Mapping[str, object], bases: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(bases):
        digest.update(name.encode())
        digest.update(bases[name].float().contiguous().numpy().data)
    return digest.hexdigest()
