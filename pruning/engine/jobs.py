"""The variants to make, and which text must pass through which block for them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch

from ..allocation import DIAGNOSIS, diagnosed
from ..correction import corrector_named
from ..errors import RecipeError
from ..models.anatomy import Anatomy
from ..patterns import BLOCKS, Shape
from ..projections import Key
from ..quantization import MULTIPLE
from ..recipes import Recipe
from ..text.calibration import CalibrationSet, CalibrationText, Piece
from .parts import check_parts
from .removable import check_blocks_removable
from .structures import check_blocks, covered_families, unit_budgets


@dataclass(frozen=True)
class Job:
    """One variant to be made: a recipe, with a calibration set unless it needs none."""

    recipe: Recipe
    calibration: CalibrationSet | None = None

    @property
    def id(self) -> str:
        """Name of the variant."""
        return self.recipe.variant_id(self.calibration)

    @property
    def choice(self) -> Job:
        """The job that chooses what this one keeps: itself, or, if it fine-tunes in the end, the same without."""
        if not self.recipe.recovers:
            return self
        recipe = self.recipe.unrecovered
        return Job(recipe, self.calibration if recipe.calibrated else None)


def choices(jobs: Iterable[Job], there: Collection[Job] = ()) -> list[Job]:
    """Return what is to be chosen for some jobs, once where they differ only in the fine-tuning that follows.

    Parameters
    ----------
    jobs
        The jobs.
    there
        Choices that were made before.
    """
    return [choice for choice in dict.fromkeys(job.choice for job in jobs) if choice not in there]


def planned_jobs(recipes: Iterable[Recipe], sets: Iterable[CalibrationSet]) -> list[Job]:
    """Return a job per recipe that needs no text, then one per calibration set and remaining recipe.

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
        if named.setdefault(job.id, job) != job:
            raise RecipeError(f'two variants would be called "{job.id}"; give their calibration sets other names')
    return list(named.values())


def check_calibrated(jobs: Iterable[Job], text: object) -> None:
    """Check that there is calibration text, and a set of it for each job that needs one.

    Raises
    ------
    RecipeError
        If not.
    """
    for job in jobs:
        if job.recipe.calibrated and (job.calibration is None or text is None):
            raise RecipeError(f"{job.recipe.method_label} needs calibration text; give a corpus and a calibration set")


def covered_shapes(anatomy: Anatomy, recipe: Recipe) -> dict[Key, Shape]:
    """Return the shape of every projection in a recipe's scope."""
    keys = [key for key in anatomy if recipe.covers(*key)]
    if recipe.choosing.structure and recipe.pattern != BLOCKS:
        layers = dict.fromkeys(layer for layer, _ in keys)
        owned = {(n, role) for n in layers for family in covered_families(anatomy, n, recipe) for role in family.roles}
        keys = [key for key in keys if key in owned]
    return {key: anatomy.shape(*key) for key in keys}


def check_fits(anatomy: Anatomy, recipe: Recipe) -> None:
    """Check that a recipe can be carried out on a model.

    Raises
    ------
    RecipeError
        If the model lacks a role or the blocks, its inputs cannot be divided into groups of m, the method or the
        recovery needs the whole model in memory but its weights stay on disk, a diagnosis does not match its matrices,
        the sparsity removes none of the structures, or blocks cannot be removed; if a float16 model should be
        fine-tuned; if subspaces do not fit the model; or if neurons' biases should be corrected and cannot be.
    """
    if anatomy.streamed and recipe.whole:
        raise RecipeError(f"{recipe.whole}, so the whole model must be in memory; load it with stream=False")
    if recipe.recovers and next(anatomy.blocks[0].parameters()).dtype == torch.float16:
        raise RecipeError(
            f'recover = "{recipe.recover}" needs a wider range of gradients than float16 has; load the model with '
            "dtype bfloat16 or float32"
        )
    kinds = dict.fromkeys(anatomy.role_kinds())
    for role in recipe.roles:
        if role not in kinds:
            raise RecipeError(f'this {anatomy.kind} model has no projection "{role}"; it has {" ".join(kinds)}')
    shapes = covered_shapes(anatomy, recipe)
    if not shapes:
        if any(recipe.covers_block(layer) for layer in range(len(anatomy.blocks))):
            raise RecipeError(f'blocks "{recipe.blocks}" of this model have no projection {" or ".join(recipe.roles)}')
        raise RecipeError(
            f'blocks "{recipe.blocks}" do not exist; this model has blocks 0 to {len(anatomy.blocks) - 1}'
        )
    if recipe.quantizes:
        _check_groups(recipe, shapes)
        return
    check_parts(anatomy, recipe, shapes)
    if corrector_named(recipe.correction).settle is not None:
        _check_biases(anatomy, recipe, shapes)
    m = recipe.choosing.group
    for (layer, role), (_, inputs) in shapes.items():
        if m and inputs % m:
            raise RecipeError(
                f'pattern "{recipe.pattern}" needs inputs in groups of {m}, but block {layer}, role {role} has '
                f"{inputs}; choose another pattern, or exclude that role with roles = [...]"
            )
    if recipe.allocation == DIAGNOSIS:
        diagnosed_sparsities(anatomy, recipe)
    if recipe.pattern == BLOCKS:
        check_blocks(anatomy, recipe)
        check_blocks_removable(anatomy)
    elif recipe.choosing.structure:
        unit_budgets(anatomy, recipe)


def _check_biases(anatomy: Anatomy, recipe: Recipe, covered: Collection[Key]) -> None:
    """Check that what neurons fire on is in scope, and can have a bias."""
    keys = [key for key in covered if key[1] in anatomy.firing_roles(key[0])]
    if not keys:
        fire = dict.fromkeys(role for layer in range(len(anatomy.blocks)) for role in anatomy.firing_roles(layer))
        remedy = f"include {' and '.join(fire)}, whose outputs decide it" if fire else "experts have no biases"
        raise RecipeError(f'correction "{recipe.correction}" sets biases of neurons: {remedy}, or leave it out')
    for layer, role in keys:
        if not anatomy.takes_bias(layer, role):
            raise RecipeError(
                f'correction "{recipe.correction}" needs a bias of {role}, which shares its module with other '
                f"projections in this {anatomy.kind} model and has none; leave it out"
            )


def _check_groups(recipe: Recipe, shapes: Mapping[Key, Shape]) -> None:
    for (layer, role), (_, inputs) in shapes.items():
        if recipe.group and inputs % recipe.group:
            common = gcd(recipe.group, inputs)
            smaller = f"group = {common}, or " if common % MULTIPLE == 0 else ""
            raise RecipeError(
                f"group = {recipe.group} does not divide the {inputs} inputs of block {layer}, role {role}; "
                f"write {smaller}group = 0 for the whole row, or exclude that role with roles = [...]"
            )


def diagnosed_sparsities(anatomy: Anatomy, recipe: Recipe) -> dict[Key, float]:
    """Return the sparsity of every matrix in the scope of a recipe whose allocation follows a diagnosis.

    Raises
    ------
    RecipeError
        If the diagnosis lacks a matrix or has one that the model does not, or the spread is too wide.
    """
    importance = dict(recipe.importance)
    names = {f"{layer}.{role}": (layer, role) for layer, role in anatomy}
    for name in importance:
        if name not in names:
            raise RecipeError(
                f'importance names "{name}", but this {anatomy.kind} model has no such matrix (its matrices are '
                f'"{next(iter(names))}" to "{list(names)[-1]}"); use a diagnosis of this model'
            )
    shapes = covered_shapes(anatomy, recipe)
    lacking = [name for name, key in names.items() if key in shapes and name not in importance]
    if lacking:
        raise RecipeError(
            f'importance lacks "{lacking[0]}"{f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""} in the '
            "recipe's scope; diagnose a variant with this scope, or restrict the recipe with roles and blocks"
        )
    by_key = {key: importance[name] for name, key in names.items() if key in shapes}
    return diagnosed(by_key, shapes, recipe.sparsity, **recipe.allocation_parameters)


def projection_seed(key: Key) -> int:
    """Return a fixed random seed for a projection."""
    return zlib.crc32(f"{key[0]}.{key[1]}".encode())


def most_held(pieces: Sequence[Piece], sets: Iterable[Sequence[Piece]]) -> int:
    """Return how many statistics of text are held at most while pieces come one by one and are summed by set.

    A piece is held until all sets that it is of have added it, each in its own order; the sums of sets are held, where
    they are of more than one piece. One more is counted for a sum that is being made.

    Parameters
    ----------
    pieces
        In the order in which they come.
    sets
        The pieces of every set, in its order.

    Examples
    --------
    >>> en, sw, zh = (Piece(language, 8, 0, 1) for language in ("en", "sw", "zh"))
    >>> most_held([en, sw, zh], [[en], [sw], [zh]]), most_held([en, sw, zh], [[en, sw, zh]])
    (3, 3)
    """
    left = [list(own) for own in sets]
    added = [0] * len(left)
    there: set[Piece] = set()  # those that a set has yet to add
    first: dict[int, Piece] = {}  # of sets of one piece so far, which it is itself
    most = 0
    for piece in pieces:
        there.add(piece)
        adding = 0
        for number, own in enumerate(left):
            while own and own[0] in there:
                first[number] = own.pop(0)
                added[number] += 1
                adding = max(adding, int(added[number] > 1))
        sums = sum(count > 1 for count in added)
        itself = {first[number] for number, count in enumerate(added) if count == 1}
        most = max(most, len(there | itself) + sums + adding)
        there = {piece for own in left for piece in own} & there
    return most


class Schedule:
    """Which text passes through which block, and for which jobs.

    Text passes through a dense block once for all jobs that see the same states: every job with dense propagation, and
    those with pruned propagation up to the first block in which they remove weights. From then on, such a job has its
    own states.

    Parameters
    ----------
    anatomy
        Anatomy of the model.
    jobs
        The jobs that read calibration text block by block.
    text
        Text of all their calibration sets.
    """

    def __init__(self, anatomy: Anatomy, jobs: Iterable[Job], text: CalibrationText | None) -> None:
        self.jobs = list(jobs)
        self.text = text
        self.blocks = len(anatomy.blocks)
        layers = {job: [layer for layer, _ in covered_shapes(anatomy, job.recipe)] for job in self.jobs}
        self._first = {job: min(covered) for job, covered in layers.items()}
        self._last = {job: max(covered) for job, covered in layers.items()}

    def pieces_of(self, job: Job) -> Sequence[Piece]:
        """Return the text of a job."""
        assert self.text is not None
        assert job.calibration is not None
        return self.text.pieces[job.calibration]

    def shares(self, job: Job, layer: int) -> bool:
        """Whether the input of this block is the dense model's for a job."""
        return job.recipe.propagation == "dense" or layer <= self._first[job]

    def on_pieces(self, layer: int) -> list[Job]:
        """Return the jobs that need the dense states before a block, for this block or a later one."""
        return [job for job in self.jobs if self._last[job] >= layer and self.shares(job, layer)]

    def pieces(self, layer: int) -> list[Piece]:
        """Return the shared text that passes through a dense block."""
        return list(dict.fromkeys(piece for job in self.on_pieces(layer) for piece in self.pieces_of(job)))

    def pieces_by_set(self, layer: int) -> dict[CalibrationSet, list[Piece]]:
        """Return the shared text of every calibration set, in the order in which its statistics are summed."""
        jobs = {job.calibration: job for job in self.on_pieces(layer) if job.calibration}
        return {calibration: list(self.pieces_of(job)) for calibration, job in jobs.items()}

    def on_their_own(self, layer: int) -> list[Job]:
        """Return the unfinished jobs with their own states before a block."""
        return [job for job in self.jobs if self._last[job] >= layer and not self.shares(job, layer)]

    def departs(self, job: Job, layer: int) -> bool:
        """Whether a job's states diverge from the dense model's after this block."""
        return job.recipe.propagation == "pruned" and self._first[job] == layer < self._last[job]

    def goes_on(self, job: Job, layer: int) -> bool:
        """Whether a job prunes any later block."""
        return self._last[job] > layer

    def tokens(self, layer: int) -> int:
        """Return how many tokens pass through a block, counting every pass."""
        assert self.text is not None
        size = {piece: tokens.numel() for piece, tokens in self.text.tokens.items()}
        total = sum(size[piece] for piece in self.pieces(layer))
        for job in self.jobs:
            own = sum(size[piece] for piece in self.pieces_of(job))
            if self.departs(job, layer):
                total += own
        for job in self.on_their_own(layer):
            own = sum(size[piece] for piece in self.pieces_of(job))
            total += own * (int(job.recipe.covers_block(layer)) + int(self.goes_on(job, layer)))
        return total

    def drop(self, job: Job, layer: int = -1) -> int:
        """Remove a job that failed while pruning block `layer`, or before the first block (-1).

        Returns
        -------
        int
            Tokens that no longer need to pass through blocks.
        """
        before = [self.tokens(later) for later in range(layer + 1, self.blocks)]
        at_this = 0
        if layer >= 0 and (self.departs(job, layer) or (not self.shares(job, layer) and self.goes_on(job, layer))):
            assert job.calibration is not None
            assert self.text is not None
            at_this = self.text.size(job.calibration)
        self.jobs.remove(job)
        return at_this + sum(before) - sum(self.tokens(later) for later in range(layer + 1, self.blocks))

    @property
    def work(self) -> int:
        """Total number of tokens that pass through blocks."""
        return sum(self.tokens(layer) for layer in range(self.blocks)) if self.jobs else 0
