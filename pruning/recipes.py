"""What to prune, and how: validated, hashable, and the same from Python, TOML or a JSON file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from .calibration import CalibrationSet
from .errors import RecipeError
from .methods import Method, method_named
from .patterns import pattern_named

#: Calibration column of variants that no text was needed for, and of the dense model.
UNCALIBRATED = "none"


class Recipe(BaseModel):
    """How weights are chosen: method, sparsity, pattern, allocation and propagation.

    Attributes
    ----------
    method
        A registered scoring method (``pruning.methods.known_methods()``).
    sparsity
        Share of weights removed, above 0 and below 1.
    pattern
        Which weights compete with each other: ``row`` or ``matrix``; the method's native one by default.
    allocation
        How much each block gives; ``uniform`` is the one there is.
    propagation
        ``pruned``: each block's statistics are gathered behind the already pruned blocks (as published);
        ``dense``: all statistics come from the dense model, which is cheaper and another method from the second
        block on.

    Raises
    ------
    RecipeError
        (wrapped in pydantic's ``ValidationError``) if the method or pattern is unknown or the sparsity out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    sparsity: float
    pattern: str = ""
    allocation: Literal["uniform"] = "uniform"
    propagation: Literal["pruned", "dense"] = "pruned"

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return method_named(name).name

    @field_validator("sparsity")
    @classmethod
    def _true_share(cls, sparsity: float) -> float:
        if not 0 < sparsity < 1:
            raise RecipeError(
                f"sparsity {sparsity:g} is not between 0 and 1; it is the share of weights to remove, such as 0.5"
            )
        return sparsity

    @model_validator(mode="before")
    @classmethod
    def _native_pattern(cls, given: object) -> object:
        if isinstance(given, dict) and not given.get("pattern") and isinstance(given.get("method"), str):
            return {**given, "pattern": method_named(given["method"]).pattern}
        return given

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, name: str) -> str:
        pattern_named(name)
        return name

    @property
    def scoring(self) -> Method:
        """The scoring method."""
        return method_named(self.method)

    def variant_id(self, calibration: CalibrationSet | None) -> str:
        """Return the name of the variant that this recipe makes with a calibration set: readable and unique in a study.

        >>> Recipe(method="wanda", sparsity=0.5).variant_id(CalibrationSet.named("en+sw"))
        'wanda-0.5-row-pruned-en+sw-s0'
        >>> Recipe(method="magnitude", sparsity=0.3).variant_id(None)
        'magnitude-0.3-matrix'
        """
        parts = [self.method, f"{self.sparsity:g}", self.pattern]
        if calibration is not None:
            parts += [self.propagation, calibration.name, f"s{calibration.seed}"]
        return "-".join(parts)
