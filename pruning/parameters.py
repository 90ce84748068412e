"""User-settable parameters of methods and allocations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import RecipeError, did_you_mean, shortened

#: Value of `refinement`, `correction` and `recover` in a recipe without.
NONE = "none"
#: Parameter of methods that can give the language-specific part of their inputs less weight.
SPECIFIC = "specific"


@dataclass(frozen=True)
class Parameter:
    """One numeric parameter.

    Attributes
    ----------
    default
        Value used when a recipe does not set it.
    lowest, highest
        Inclusive bounds.
    meaning
        Short description, for error messages.
    whole
        Whether it must be an integer.
    """

    default: float | int
    lowest: float | int
    highest: float | int
    meaning: str
    whole: bool = False


def exact(value: float | int) -> str:
    """Return the shortest text that identifies a number exactly.

    >>> exact(0.5), exact(1234567), exact(0.1234567)
    ('0.5', '1234567', '0.1234567')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value)).removesuffix(".0")


def checked(owner: str, known: Mapping[str, Parameter], given: Mapping[str, float | int]) -> dict[str, float]:
    """Validate parameters and return those that differ from their defaults.

    Parameters
    ----------
    owner
        Method or allocation, for error messages.
    known
        The parameters that it has.
    given
        The values to validate.

    Raises
    ------
    RecipeError
        If a name is unknown, or a value out of range or not whole where it must be.
    """
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(name, known) if known else "it has none"
            raise RecipeError(f'{owner} has no parameter "{shortened(name)}"; {hint}')
        limits = known[name]
        if not (math.isfinite(value) and limits.lowest <= value <= limits.highest):
            raise RecipeError(
                f"{name} = {exact(value)} is not between {limits.lowest:g} and {limits.highest:g} ({limits.meaning})"
            )
        if limits.whole and value != int(value):
            raise RecipeError(f"{name} = {exact(value)} is not a whole number ({limits.meaning})")
    return {name: float(value) for name, value in given.items() if value != known[name].default}
