"""The language-specific part of the residual stream in what projections read, for recipes that give it less weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import RecipeError
from ..input_parts import InputPart
from ..models.anatomy import Anatomy, role_kind
from ..models.layouts import STREAM_READERS
from ..models.norms import Norm, norm_of
from ..projections import Key
from ..recipes import Recipe
from ..statistics import InputStatistics
from ..subspaces import Subspaces


def weighted(recipe: Recipe, inputs: Mapping[str, InputStatistics]) -> Mapping[str, InputStatistics]:
    """Return the statistics by which a recipe scores weights: with the language-specific part at its weight.

    Inputs that have no such part, those of ``o`` and ``down`` and in the first block, keep theirs.
    """
    if recipe.subspaces is None:
        return inputs
    part = recipe.subspaces.sha256
    return {leader: own.weighted(part, recipe.specific) for leader, own in inputs.items()}


def check_parts(anatomy: Anatomy, recipe: Recipe, covered: Iterable[Key]) -> None:
    """Check that the subspaces of a recipe, if it has any, fit a model.

    Parameters
    ----------
    anatomy, recipe
        The model and the recipe.
    covered
        The projections in its scope.

    Raises
    ------
    RecipeError
        If the subspaces are of another width or number of blocks, nothing in scope reads the stream, or the norm
        through which it is read is not known.
    """
    subspaces = recipe.subspaces
    if subspaces is None:
        return
    if anatomy.encoder_decoder:
        raise RecipeError(
            f"specific is for models with a single stack of blocks, and this {anatomy.kind} model has an encoder and a "
            "decoder; leave it out"
        )
    if (subspaces.hidden, len(subspaces.ranks)) != (anatomy.hidden_size, len(anatomy.blocks)):
        raise RecipeError(
            f"the subspaces are of {len(subspaces.ranks)} blocks of width {subspaces.hidden}, and this model has "
            f"{len(anatomy.blocks)} of width {anatomy.hidden_size}; write those of a study of this model with "
            "prunescope subspaces"
        )
    reading = [(n, role) for n, role in covered if n and subspaces.ranks[n - 1] and role_kind(role) in STREAM_READERS]
    if not reading:
        raise RecipeError(
            f"specific = {recipe.specific:g} changes nothing: no projection in scope reads the stream behind a block "
            "with a subspace; add blocks behind the first, and roles such as q or up"
        )
    for layer, role in reading:
        if not anatomy.norm_before(layer, role):
            raise RecipeError(
                f"specific needs the norm through which {role} reads the stream, which is not known of "
                f'"{anatomy.kind}" models; leave it out'
            )


class StreamParts:
    """The parts of the inputs of one model's projections, each computed once as long as its block is at work.

    Parameters
    ----------
    anatomy
        Anatomy of the dense model.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._norms: dict[str, Norm] = {}
        self._parts: dict[tuple[str, str], InputPart | None] = {}

    def of(self, layer: int, role: str, wanted: Iterable[Subspaces]) -> dict[str, InputPart]:
        """Return the parts of what a projection reads, by the hash of their subspaces; its block must be loaded."""
        path = self._anatomy.norm_before(layer, role)
        found = {}
        for subspaces in wanted if path else ():
            place = (path, subspaces.sha256)
            if place not in self._parts:
                self._parts[place] = self._part(layer, path, subspaces)
            part = self._parts[place]
            if part is not None:
                found[subspaces.sha256] = part
        return found

    def leave(self) -> None:
        """Forget those of the present block."""
        self._norms.clear()
        self._parts.clear()

    def _part(self, layer: int, path: str, subspaces: Subspaces) -> InputPart | None:
        basis = subspaces.before(layer)
        if basis is None:
            return None
        if path not in self._norms:
            module, device = self._anatomy.module(layer, path), self._anatomy.device
            self._norms[path] = norm_of(module, self._anatomy.hidden_size, device)
        norm = self._norms[path]
        part = InputPart.of(basis, norm.gain.cpu(), norm.shift.cpu(), centred=norm.centred)
        return part.to(self._anatomy.device)
