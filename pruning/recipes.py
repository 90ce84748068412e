"""What to prune, and how: validated, hashable, and the same from Python, TOML or a JSON file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from .allocation import DIAGNOSIS, UNIFORM, allocation_named
from .errors import RecipeError, shortened, unknown
from .files import content_sha256
from .methods import Method, method_named
from .models.anatomy import ROLES, role_kind
from .parameters import checked, exact
from .patterns import MODEL, Pattern, n_of_m, pattern_named
from .text.calibration import CalibrationSet

#: Calibration column of variants that no text was needed for, and of the dense model.
UNCALIBRATED = "none"
#: Scope column of variants that were pruned everywhere, and of the dense model.
EVERYWHERE = "all"
#: Digits of the hash that tells one diagnosis from another in names.
_DIGITS = 6
_BLOCKS = re.compile(r"(\d*):(\d*)|(\d+)")


class Recipe(BaseModel):
    """How weights are chosen: method, sparsity, pattern, allocation, propagation and scope.

    Attributes
    ----------
    method
        A registered method (``pruning.methods.known_methods()``).
    sparsity
        Share of weights removed, above 0 and below 1; may be left out with an n:m pattern.
    pattern
        Which weights compete with each other: ``row``, ``matrix``, ``model`` (one threshold over all), or n:m, which
        removes n out of every m consecutive inputs; the method's native one by default.
    allocation
        How much each block gives: ``uniform``, ``owl`` or ``cross-lingual``; the method's native one by default. With
        ``diagnosis`` each matrix has a share of its own, by its `importance`.
    propagation
        ``pruned``: each block's statistics are gathered behind the already pruned blocks (as published);
        ``dense``: all statistics come from the dense model, which is cheaper and another method from the second
        block on. Methods that differentiate the loss of the whole model are always ``dense``.
    roles
        Only these projections, such as ``("o",)``; all by default.
    blocks
        Only these blocks, in Python's notation without a step: ``0:4``, joined by commas, ``0:4,30:``; all by
        default.
    parameters
        What the method and the allocation leave to their user, such as ``{"power": 0.7}``.
    importance
        For allocation ``diagnosis``, and for no other: how much undoing the mask of each matrix brings back, such as
        ``{"9.down": 0.12}``, for every matrix in scope. See :class:`pruning.Remedy`.

    Raises
    ------
    RecipeError
        (wrapped in pydantic's ``ValidationError``) if something is unknown, out of range or does not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    sparsity: float
    pattern: str = ""
    allocation: str = ""
    propagation: Literal["pruned", "dense"] = "pruned"
    roles: tuple[str, ...] = ()
    blocks: str = ""
    parameters: tuple[tuple[str, float], ...] = ()
    importance: tuple[tuple[str, float], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _native_choices(cls, given: object) -> object:
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
            return given
        filled: dict[str, Any] = dict(given)
        method = method_named(filled["method"])
        filled["pattern"] = filled.get("pattern") or method.pattern
        numbers = n_of_m(str(filled["pattern"]))
        if not filled.get("allocation"):
            fixed = numbers is not None or filled["pattern"] == MODEL
            filled["allocation"] = UNIFORM if fixed else method.allocation
        if numbers and filled.get("sparsity") is None:
            filled["sparsity"] = numbers[0] / numbers[1]
        if method.differentiates or not filled.get("propagation"):
            filled["propagation"] = "dense" if method.differentiates else "pruned"
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
    def _true_share(cls, sparsity: float) -> float:
        if not 0 < sparsity < 1:
            raise RecipeError(
                f"sparsity {sparsity:g} is not between 0 and 1; it is the share of weights to remove, such as 0.5"
            )
        return sparsity

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, name: str) -> str:
        return pattern_named(name).name

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, name: str) -> str:
        return allocation_named(name).name

    @field_validator("parameters")
    @classmethod
    def _each_once(cls, parameters: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        if len(dict(parameters)) < len(parameters):
            raise RecipeError("parameters names one of them twice")
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
                raise RecipeError(f'importance of "{name}" is {value:g}, which is no number to rank by')
        if len(dict(importance)) < len(importance):
            raise RecipeError("importance names a matrix twice")
        return tuple(sorted(importance))

    @field_validator("blocks")
    @classmethod
    def _readable_blocks(cls, blocks: str) -> str:
        blocks = blocks.replace(" ", "")
        for part in blocks.split(",") if blocks else ():
            if not _BLOCKS.fullmatch(part) or part == ":":
                raise RecipeError(
                    f'blocks "{shortened(blocks)}" is not like "0:4" (the first four), "30:" or "0:4,30:"'
                )
        return blocks

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        numbers = n_of_m(self.pattern)
        if numbers and abs(self.sparsity - numbers[0] / numbers[1]) > 1e-9:
            raise RecipeError(
                f'pattern "{self.pattern}" removes {numbers[0] / numbers[1]:g} of the weights; '
                f"leave sparsity out instead of setting it to {self.sparsity:g}"
            )
        if numbers:
            object.__setattr__(self, "sparsity", numbers[0] / numbers[1])
        if self.allocation != UNIFORM and (numbers or self.pattern == MODEL):
            raise RecipeError(
                f'pattern "{self.pattern}" settles how much every matrix gives; '
                f'allocation "{self.allocation}" goes with row or matrix'
            )
        if self.allocation == DIAGNOSIS and not self.importance:
            raise RecipeError(
                f'allocation "{DIAGNOSIS}" needs importance, the file that prunescope diagnose writes (remedy.json): '
                'diagnosis = "remedy.json" in a study, importance = Remedy.open(path).importance in Python'
            )
        if self.importance and self.allocation != DIAGNOSIS:
            raise RecipeError(f'importance goes with allocation "{DIAGNOSIS}", not with "{self.allocation}"')
        known = dict(self.scoring.parameters) | dict(allocation_named(self.allocation).parameters)
        given = checked(f'"{self.method}" with {self.allocation} allocation', known, dict(self.parameters))
        object.__setattr__(self, "parameters", tuple(sorted(given.items())))
        return self

    @property
    def scoring(self) -> Method:
        """The method."""
        return method_named(self.method)

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration text: for the method, or for the allocation."""
        return self.scoring.calibrated or allocation_named(self.allocation).surveys

    @property
    def choosing(self) -> Pattern:
        """The pattern."""
        return pattern_named(self.pattern)

    @property
    def method_parameters(self) -> dict[str, float]:
        """Those of the parameters that the method takes."""
        return {name: value for name, value in self.parameters if name in self.scoring.parameters}

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
        return (not self.roles or role_kind(role) in self.roles) and self.covers_block(layer)

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
        """What the recipe is confined to, in words: ``all``, ``o``, ``blocks 0:4``, ``q k v, blocks 0:4``."""
        parts = [" ".join(self.roles)] if self.roles else []
        parts += [f"blocks {self.blocks}"] if self.blocks else []
        return ", ".join(parts) or EVERYWHERE

    @property
    def method_label(self) -> str:
        """What frames call the method: its name, with every parameter that is not the default."""
        return _label(self.method, self.method_parameters)

    @property
    def allocation_label(self) -> str:
        """What frames call the allocation, likewise; with the start of the importances' SHA-256 if it has any."""
        known = allocation_named(self.allocation).parameters
        return _label(self._allocation_name, {name: value for name, value in self.parameters if name in known})

    @property
    def _allocation_name(self) -> str:
        """The allocation, and which diagnosis it follows."""
        return f"{self.allocation}={self.importance_sha256[:_DIGITS]}" if self.importance else self.allocation

    def variant_id(self, calibration: CalibrationSet | None) -> str:
        """Return the name of the variant that this recipe makes with a calibration set: readable and unique in a study.

        >>> Recipe(method="wanda", sparsity=0.5).variant_id(CalibrationSet.named("en+sw"))
        'wanda-0.5-row-pruned-en+sw-s0'
        >>> Recipe(method="magnitude", sparsity=0.3, roles=("o",), blocks="0:4").variant_id(None)
        'magnitude-0.3-matrix-o-blocks0_4'
        """
        sparsity = f"{self.sparsity:g}" if n_of_m(self.pattern) else exact(self.sparsity)  # the pattern says it all
        parts = [self.method, sparsity, self.pattern.replace(":", "of")]
        parts += [self._allocation_name] if self.allocation != UNIFORM else []
        parts += [f"{name}={exact(value)}" for name, value in self.parameters]
        parts += ["+".join(self.roles)] if self.roles else []
        parts += [f"blocks{self.blocks.replace(':', '_')}"] if self.blocks else []
        if calibration is not None:
            parts += [self.propagation, calibration.name, f"s{calibration.seed}"]
        return "-".join(parts)


def _label(name: str, parameters: Mapping[str, float]) -> str:
    inside = ", ".join(f"{key}={exact(value)}" for key, value in parameters.items())
    return f"{name}({inside})" if inside else name
