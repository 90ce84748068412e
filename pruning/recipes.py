"""Recipes, by which a model is pruned or quantized: validated, hashable, and the same from Python, TOML or JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from .allocation import DIAGNOSIS, STANDARDIZED, UNIFORM, allocation_named
from .correction import NONE, corrector_named, refiner_named
from .errors import RecipeError, shortened, unknown
from .files import content_sha256
from .methods import Method, method_named
from .models.anatomy import ROLES, role_kind
from .models.families import is_reader, roles_of
from .models.layouts import MLP_READERS
from .parameters import SPECIFIC, Parameter, checked, exact
from .patterns import BLOCKS, MODEL, Pattern, is_structure, n_of_m, pattern_named
from .quantization import MULTIPLE, WIDTHS, Grid
from .recovery import recovery_named
from .statistics import OF_INPUTS
from .subspaces import Subspaces
from .text.calibration import CalibrationSet

#: Value of the calibration column for variants made without text, and for the dense model.
UNCALIBRATED = "none"
#: Value of the scope column for variants pruned everywhere, and for the dense model.
EVERYWHERE = "all"
#: Digits of the hash that distinguishes diagnoses, and subspaces, in names.
_DIGITS = 6
#: Number of inputs that share a scale, unless a recipe says otherwise.
_GROUP = 128
_OF_PARTS = {SPECIFIC: Parameter(1.0, 0, 1, "weight of the language-specific part of the inputs")}
_BLOCKS = re.compile(r"(\d*):(\d*)|(\d+)")


class Recipe(BaseModel):
    """How a model is pruned or quantized: method, sparsity or bits, pattern, allocation, propagation and what follows.

    Attributes
    ----------
    method
        A registered method (``pruning.methods.known_methods()``).
    sparsity
        Share of weights to prune, between 0 and 1; may be omitted with an n:m pattern. 0 for methods that quantize.
    pattern
        Which weights compete with each other: ``row``, ``matrix``, ``model`` (one global threshold), or n:m, which
        removes n out of every m consecutive inputs; or which structures are removed as a whole: ``neurons``, ``heads``,
        ``neurons+heads`` or ``blocks``. Defaults to the method's native pattern; empty for methods that quantize.
    allocation
        How sparsity is distributed over blocks: ``uniform``, ``owl``, ``cross-lingual`` or ``alpha``; over matrices,
        by `importance`: ``diagnosis``; over neurons and heads: ``standardized``. Defaults to the method's native
        allocation.
    propagation
        ``pruned``: each block's statistics are gathered with the preceding blocks already pruned, as published.
        ``dense``: all statistics come from the dense model, which is cheaper but gives other results from the second
        block on. Methods that need only derivatives of the whole model's loss are always ``dense``, and so is pattern
        ``blocks``.
    refinement
        ``swaps`` exchanges kept and pruned weights of a row for as long as that lowers the reconstruction error;
        ``dsnot`` does so until a row's expected output is that of the dense row; ``none`` by default. Methods that
        update weights refuse it.
    correction
        ``admm`` or ``least-squares`` update the kept weights after the mask is settled, starting from the dense ones;
        ``firing`` sets biases so that each MLP neuron fires as often as before; ``none`` by default. With a refinement
        or a correction, a recipe needs calibration text whatever its method.
    recover
        ``lora`` or ``fine-tune`` train the kept weights on the calibration text after all other steps; removed ones
        stay zero; ``none`` by default. The whole model must be in memory.
    roles
        Prune only these projections, such as ``("o",)``; all by default.
    blocks
        Prune only these blocks, as comma-separated Python slices without a step: ``0:4`` or ``0:4,30:``; all by
        default.
    parameters
        Hyperparameters of the method, the allocation, the refinement, the correction and the recovery, such as
        ``{"power": 0.7}``.
    bits, group
        For methods that quantize only: bits of a code (2, 3, 4 or 8), and how many consecutive inputs share a scale
        (a multiple of 8; 0: the whole row; 128 by default).
    subspaces
        With the parameter ``specific`` only, which is the weight, 0 to 1, that the language-specific part of the
        residual stream keeps in the statistics that weights are scored by: the subspaces that this part lies in, such
        as ``Subspaces.open("subspaces.safetensors")``. For methods that score by sums of squares or the Gram matrix.
    importance
        For allocation ``diagnosis`` only: how much restoring each matrix's dense weights recovers, such as
        ``{"9.down": 0.12}``, for every matrix in scope. See :class:`pruning.Remedy`.

    Raises
    ------
    RecipeError
        (wrapped in pydantic's ``ValidationError``) if a value is unknown or out of range, or values are incompatible.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    sparsity: float
    pattern: str = ""
    allocation: str = ""
    propagation: Literal["pruned", "dense"] = "pruned"
    refinement: str = NONE
    correction: str = NONE
    recover: str = NONE
    roles: tuple[str, ...] = ()
    blocks: str = ""
    parameters: tuple[tuple[str, float], ...] = ()
    importance: tuple[tuple[str, float], ...] = ()
    subspaces: Subspaces | None = None
    bits: int = 0
    group: int = 0

    @model_validator(mode="before")
    @classmethod
    def _native_choices(cls, given: object) -> object:
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            return given
        filled: dict[str, Any] = dict(given)
        method = method_named(filled["method"])
        filled["bits"] = filled.get("bits") or 0
        if filled.get("group") is None:
            filled["group"] = _GROUP if method.quantize else 0
        if method.quantize and filled.get("sparsity") is None:
            filled["sparsity"] = 0.0
        filled["pattern"] = filled.get("pattern") or ("" if method.quantize else method.pattern)
        numbers = n_of_m(str(filled["pattern"]))
        if not filled.get("allocation"):
            fixed = numbers is not None or filled["pattern"] == MODEL or is_structure(str(filled["pattern"]))
            filled["allocation"] = UNIFORM if fixed and method.scores != "channels" else method.allocation
        if numbers and filled.get("sparsity") is None:
            filled["sparsity"] = numbers[0] / numbers[1]
        dense = (method.differentiates and not method.of_inputs) or filled["pattern"] == BLOCKS
        if dense or not filled.get("propagation"):
            filled["propagation"] = "dense" if dense else method.propagation
        parameters = filled.get("parameters", ())
        if isinstance(parameters, Mapping):
            filled["parameters"] = tuple(sorted(parameters.items()))
        if isinstance(filled.get("importance"), Mapping):
            filled["importance"] = tuple(filled["importance"].items())
        if isinstance(filled.get("roles"), str):
            filled["roles"] = (filled["roles"],)
        return filled

    @field_validator("sparsity")
    @classmethod
    def _true_share(cls, sparsity: float, known: Any) -> float:
        method = known.data.get("method", "")
        if method and method_named(method).quantize:
            if sparsity:
                raise RecipeError(f'"{method}" quantizes: write bits = 4 instead of sparsity = {sparsity:g}')
            return 0.0
        if not 0 < sparsity < 1:
            raise RecipeError(
                f"sparsity {sparsity:g} is not between 0 and 1; it is the share of weights to prune, such as 0.5"
            )
        return sparsity

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, name: str) -> str:
        return pattern_named(name).name if name else name

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, name: str) -> str:
        return allocation_named(name).name

    @field_validator("refinement")
    @classmethod
    def _known_refinement(cls, name: str) -> str:
        return refiner_named(name).name

    @field_validator("correction")
    @classmethod
    def _known_correction(cls, name: str) -> str:
        return corrector_named(name).name

    @field_validator("recover")
    @classmethod
    def _known_recovery(cls, name: str) -> str:
        return recovery_named(name).name

    @field_validator("parameters")
    @classmethod
    def _each_once(cls, parameters: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        if len(dict(parameters)) < len(parameters):
            raise RecipeError("a name occurs twice in parameters")
        return parameters

    @field_validator("roles")
    @classmethod
    def _known_roles(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        for role in roles:
            if role not in ROLES:
                raise RecipeError(unknown("role", role, ROLES))
        return tuple(role for role in ROLES if role in roles)

    @field_validator("importance")
    @classmethod
    def _one_number_a_matrix(cls, importance: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        for name, value in importance:
            if not math.isfinite(value):
                raise RecipeError(f'importance of "{name}" is {value:g}; it must be a finite number')
        if len(dict(importance)) < len(importance):
            raise RecipeError("a matrix occurs twice in importance")
        return tuple(sorted(importance))

    @field_validator("blocks")
    @classmethod
    def _readable_blocks(cls, blocks: str) -> str:
        blocks = blocks.replace(" ", "")
        for part in blocks.split(",") if blocks else ():
            if not _BLOCKS.fullmatch(part) or part == ":":
                raise RecipeError(
                    f'invalid blocks "{shortened(blocks)}"; write "0:4" (the first four), "30:" or "0:4,30:"'
                )
        return blocks

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        self._check_bits()
        numbers = n_of_m(self.pattern)
        if numbers and abs(self.sparsity - numbers[0] / numbers[1]) > 1e-9:
            raise RecipeError(
                f'pattern "{self.pattern}" removes {numbers[0] / numbers[1]:g} of the weights; '
                f"omit sparsity instead of setting it to {self.sparsity:g}"
            )
        if numbers:
            object.__setattr__(self, "sparsity", numbers[0] / numbers[1])
        if self.allocation not in (UNIFORM, STANDARDIZED) and (numbers or self.pattern == MODEL):
            raise RecipeError(
                f'pattern "{self.pattern}" fixes the sparsity of every matrix; '
                f'allocation "{self.allocation}" needs pattern "row" or "matrix"'
            )
        if self.allocation == DIAGNOSIS and not self.importance:
            raise RecipeError(
                f'allocation "{DIAGNOSIS}" needs importance, the file that prunescope diagnose writes (remedy.json): '
                'diagnosis = "remedy.json" in a study, importance = Remedy.open(path).importance in Python'
            )
        if self.importance and self.allocation != DIAGNOSIS:
            raise RecipeError(f'importance needs allocation "{DIAGNOSIS}", not "{self.allocation}"')
        self._check_structure()
        if self.refinement != NONE and self.scoring.solve is not None:
            raise RecipeError(
                f'refinement "{self.refinement}" exchanges weights with their dense values, and "{self.method}" '
                'updates them; leave refinement out, or refine the mask of another method, such as "wanda"'
            )
        known = dict(self.scoring.parameters) | dict(allocation_named(self.allocation).parameters)
        known |= dict(refiner_named(self.refinement).parameters) | dict(corrector_named(self.correction).parameters)
        known |= dict(recovery_named(self.recover).parameters)
        known |= self._of_parts
        owner = "+".join(f'"{step}"' for step in self._steps)
        given = checked(f"{owner} with {self.allocation} allocation", known, dict(self.parameters))
        object.__setattr__(self, "parameters", tuple(sorted(given.items())))
        self._check_parts()
        return self

    def _check_parts(self) -> None:
        if self.specific == 1:
            object.__setattr__(self, "subspaces", None)  # nothing is given less weight
        elif self.subspaces is None:
            raise RecipeError(
                f"specific = {exact(self.specific)} needs subspaces, the file that prunescope subspaces writes: "
                'subspaces = "subspaces.safetensors" in a study, subspaces = Subspaces.open(path) in Python'
            )

    def _check_structure(self) -> None:
        if not self.choosing.structure:
            if self.scoring.scores != "weights":
                raise RecipeError(
                    f'{self.method} removes whole structures: use pattern "{self.scoring.pattern}" (its native one), '
                    f'not "{self.pattern}"'
                )
            if self.allocation == STANDARDIZED:
                raise RecipeError(f'allocation "{STANDARDIZED}" compares whole structures; use pattern "neurons+heads"')
            return
        removes = f'pattern "{self.pattern}" removes whole structures'
        fitting = {"weights": True, "channels": self.pattern != BLOCKS, "blocks": self.pattern == BLOCKS}
        if not fitting[self.scoring.scores]:
            raise RecipeError(f'{self.method} has no scores for pattern "{self.pattern}"; use "{self.scoring.pattern}"')
        if self.scoring.solve is not None:
            raise RecipeError(f'{removes}, and {self.method} chooses single weights; use pattern "row", or wanda-sp')
        if self.follows:
            raise RecipeError(
                f"{removes}; leave out refinement and correction, which follow masks of single weights, or use pattern "
                '"row"'
            )
        if self.roles:
            raise RecipeError(f"{removes}, which determines the projections; leave out roles")
        fitting_allocations = (UNIFORM,) if self.pattern == BLOCKS else (UNIFORM, STANDARDIZED)
        if self.allocation not in fitting_allocations:
            either = " or ".join(f'"{name}"' for name in fitting_allocations)
            raise RecipeError(f'{removes}, with allocation {either}, not "{self.allocation}"')

    def _check_bits(self) -> None:
        if not self.quantizes:
            if self.bits or self.group:
                raise RecipeError(
                    f'"{self.method}" prunes: bits and group are for methods that quantize (rtn, gptq, awq); pruning '
                    "and quantizing in one recipe is not possible yet"
                )
            return
        if self.pattern or self.allocation != UNIFORM:
            raise RecipeError(f'"{self.method}" quantizes all weights alike: leave pattern and allocation out')
        if self.follows or self.recovers:
            raise RecipeError(
                f'"{self.method}" quantizes, and has no mask: leave refinement, correction and recover out'
            )
        if self.bits not in WIDTHS:
            given = f"bits = {self.bits} is not possible" if self.bits else f'"{self.method}" needs bits'
            raise RecipeError(f"{given}; write bits = 2, 3, 4 or 8")
        if self.group < 0 or self.group % MULTIPLE:
            raise RecipeError(
                f"group = {self.group} is not a multiple of {MULTIPLE}; it is the number of consecutive inputs that "
                "share a scale, such as 128 (0: the whole row)"
            )

    @property
    def quantizes(self) -> bool:
        """Whether the method quantizes instead of pruning."""
        return self.scoring.quantize is not None

    @property
    def grid(self) -> Grid:
        """The grid, for methods that quantize."""
        return Grid(self.bits, self.group, bool(dict(self.parameters).get("symmetric", 0)))

    @property
    def scoring(self) -> Method:
        """The method."""
        return method_named(self.method)

    @property
    def calibrated(self) -> bool:
        """Whether any part of it needs calibration text."""
        return bool(self.needs) or allocation_named(self.allocation).surveys or self.recovers

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the method, the refinement and the correction request."""
        refining = refiner_named(self.refinement).needs if self.refinement != NONE else frozenset()
        correcting = corrector_named(self.correction).needs if self.correction != NONE else frozenset()
        return self.scoring.needs | refining | correcting

    def spares(self, roles: Collection[str]) -> frozenset[str]:
        """Return what :attr:`needs` has for a correction alone that leaves projections with these roles as they are."""
        corrector = corrector_named(self.correction)
        if corrector.settle is None or not set(MLP_READERS).isdisjoint(roles):
            return frozenset()
        refining = refiner_named(self.refinement).needs if self.refinement != NONE else frozenset()
        return corrector.needs - self.scoring.needs - refining

    @property
    def of_inputs(self) -> frozenset[str]:
        """Those of a projection's inputs, for which text passes through block by block."""
        return self.needs & set(OF_INPUTS)

    @property
    def follows(self) -> bool:
        """Whether a refinement or a correction follows the choice of the mask."""
        return (self.refinement, self.correction) != (NONE, NONE)

    @property
    def updates(self) -> bool:
        """Whether weights are computed, by the method or by a correction, rather than only chosen."""
        corrector = corrector_named(self.correction)
        rescales = corrector.settle is not None and bool(self.correction_parameters.get("scale"))
        return self.scoring.solves or corrector.correct is not None or rescales

    @property
    def recovers(self) -> bool:
        """Whether the kept weights are fine-tuned in the end."""
        return self.recover != NONE

    @property
    def unrecovered(self) -> Recipe:
        """The recipe without fine-tuning in the end: what it chooses, this one trains."""
        known = recovery_named(self.recover).parameters
        parameters = tuple((name, value) for name, value in self.parameters if name not in known)
        return self.model_copy(update={"recover": NONE, "parameters": parameters})

    @property
    def whole(self) -> str:
        """What needs the whole model in memory, in words that a message starts with; empty if nothing does."""
        if self.scoring.differentiates:
            return f"{self.method} differentiates the loss"
        return f'recover = "{self.recover}" trains on the loss' if self.recovers else ""

    @property
    def _steps(self) -> tuple[str, ...]:
        """The method, and what follows it."""
        return (self.method, *(step for step in (self.refinement, self.correction, self.recover) if step != NONE))

    @property
    def specific(self) -> float:
        """Weight of the language-specific part of the stream in the statistics that weights are scored by."""
        return float(dict(self.parameters).get(SPECIFIC, 1.0))

    @property
    def weighting(self) -> tuple[str, float] | None:
        """The hash of the subspaces, and the weight of the part in them; ``None`` if all keeps its weight."""
        return None if self.subspaces is None else (self.subspaces.sha256, self.specific)

    @property
    def _of_parts(self) -> Mapping[str, Parameter]:
        return _OF_PARTS if self.scoring.weighs_parts else {}

    @property
    def choosing(self) -> Pattern:
        """The pattern."""
        return pattern_named(self.pattern or "row")  # what quantizes chooses nothing

    @property
    def method_parameters(self) -> dict[str, float]:
        """The parameters that belong to the method."""
        return self._of(self.scoring.parameters)

    @property
    def refinement_parameters(self) -> dict[str, float]:
        """The parameters that belong to the refinement."""
        return self._of(refiner_named(self.refinement).parameters)

    @property
    def correction_parameters(self) -> dict[str, float]:
        """The parameters that belong to the correction."""
        return self._of(corrector_named(self.correction).parameters)

    @property
    def recovery_parameters(self) -> dict[str, float]:
        """Every parameter of the recovery, with its value."""
        known = recovery_named(self.recover).parameters
        return {name: float(dict(self.parameters).get(name, known[name].default)) for name in known}

    def _of(self, known: Mapping[str, Any]) -> dict[str, float]:
        return {name: value for name, value in self.parameters if name in known}

    @property
    def allocation_parameters(self) -> dict[str, float]:
        """Every parameter of the allocation, with its value."""
        known = allocation_named(self.allocation).parameters
        return {name: float(dict(self.parameters).get(name, known[name].default)) for name in known}

    @property
    def importance_sha256(self) -> str:
        """SHA-256 of the importances, in hexadecimal; empty if there are none."""
        return content_sha256(dict(self.importance)) if self.importance else ""

    def covers(self, layer: int, role: str) -> bool:
        """Whether a projection is in the recipe's scope."""
        kind = role_kind(role)
        return (not self.roles or kind in self.roles) and kind in self._structured and self.covers_block(layer)

    @property
    def _structured(self) -> frozenset[str]:
        """The kinds of roles that the pattern may prune."""
        return roles_of(self.choosing.structure)

    def reads(self, layer: int, role: str) -> bool:
        """Whether the method needs statistics of a projection's input."""
        read = {"weights": True, "channels": is_reader(role), "blocks": False}[self.scoring.scores]
        return read and self.covers(layer, role)

    def covers_block(self, layer: int) -> bool:
        """Whether any projection of a block may be in the recipe's scope."""
        if not self.blocks:
            return True
        for part in self.blocks.split(","):
            start, colon, stop = part.partition(":")
            first = int(start or 0)
            last = (int(stop) if stop else layer + 1) if colon else first + 1
            if first <= layer < last:
                return True
        return False

    @property
    def scope(self) -> str:
        """The recipe's scope in words: ``all``, ``o``, ``blocks 0:4``, ``q k v, blocks 0:4``."""
        parts = [" ".join(self.roles)] if self.roles else []
        parts += [f"blocks {self.blocks}"] if self.blocks else []
        return ", ".join(parts) or EVERYWHERE

    @property
    def pattern_label(self) -> str:
        """The pattern in frames and names; of methods that quantize the grid: ``4bit-g128``, or ``4bit-row``."""
        if not self.quantizes:
            return self.pattern
        return f"{self.bits}bit-" + (f"g{self.group}" if self.group else "row")

    @property
    def method_label(self) -> str:
        """The method's name in frames, and what follows it, with every parameter that is not the default.

        >>> Recipe(method="wanda", sparsity=0.5, refinement="swaps", correction="admm").method_label
        'wanda+swaps+admm'
        >>> Recipe(method="wanda", sparsity=0.5, recover="lora", parameters={"steps": 500}).method_label
        'wanda+lora(steps=500)'
        """
        set_here: list[Mapping[str, float | str]] = [
            {**self.method_parameters, **self._of(self._of_parts), **self._named_subspaces},
            self.refinement_parameters,
            self.correction_parameters,
            self._of(recovery_named(self.recover).parameters),
        ]
        labels = zip((self.method, self.refinement, self.correction, self.recover), set_here, strict=True)
        return "+".join(_label(name, inside) for name, inside in labels if name != NONE)

    @property
    def allocation_label(self) -> str:
        """The allocation's name in frames, likewise, and the first digits of the importances' hash if there are any."""
        known = allocation_named(self.allocation).parameters
        return _label(self._allocation_name, {name: value for name, value in self.parameters if name in known})

    @property
    def _named_subspaces(self) -> dict[str, str]:
        """The first digits of the hash of the subspaces, if there are any, by what they are called in names."""
        return {"subspaces": self.subspaces.sha256[:_DIGITS]} if self.subspaces else {}

    @property
    def _allocation_name(self) -> str:
        """The allocation's name, with the hash of the diagnosis it follows, if any."""
        return f"{self.allocation}={self.importance_sha256[:_DIGITS]}" if self.importance else self.allocation

    def variant_id(self, calibration: CalibrationSet | None) -> str:
        """Return the id of the variant made by this recipe with a calibration set: readable, and unique in a study.

        >>> Recipe(method="wanda", sparsity=0.5).variant_id(CalibrationSet.named("en+sw"))
        'wanda-0.5-row-pruned-en+sw-s0'
        >>> Recipe(method="magnitude", sparsity=0.3, roles=("o",), blocks="0:4").variant_id(None)
        'magnitude-0.3-matrix-o-blocks0_4'
        >>> Recipe(method="wanda", pattern="2:4", correction="admm").variant_id(CalibrationSet.named("sw"))
        'wanda+admm-0.5-2of4-pruned-sw-s0'
        >>> Recipe(method="gptq", bits=4).variant_id(CalibrationSet.named("en"))
        'gptq-4bit-g128-pruned-en-s0'
        >>> Recipe(method="wanda", sparsity=0.5).variant_id(
        ...     CalibrationSet.named("sw", items="reasoning", item_share=0.5)
        ... )
        'wanda-0.5-row-pruned-sw-items=0.5-s0'
        """
        sparsity = f"{self.sparsity:g}" if n_of_m(self.pattern) else exact(self.sparsity)  # the pattern says it all
        parts = ["+".join(self._steps)] if self.quantizes else ["+".join(self._steps), sparsity]
        parts += [self.pattern_label.replace(":", "of")]
        parts += [self._allocation_name] if self.allocation != UNIFORM else []
        parts += [f"{name}={exact(value)}" for name, value in self.parameters]
        parts += [f"{name}={value}" for name, value in self._named_subspaces.items()]
        parts += ["+".join(self.roles)] if self.roles else []
        parts += [f"blocks{self.blocks.replace(':', '_')}"] if self.blocks else []
        if calibration is not None:
            parts += [self.propagation, calibration.name]
            parts += [f"items={exact(calibration.item_share)}"] if calibration.item_share else []
            parts += [f"s{calibration.seed}"]
        return "-".join(parts)


def _label(name: str, parameters: Mapping[str, float | str]) -> str:
    said = {key: value if isinstance(value, str) else exact(value) for key, value in parameters.items()}
    inside = ", ".join(f"{key}={value}" for key, value in said.items())
    return f"{name}({inside})" if inside else name
