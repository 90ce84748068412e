"""Remedies (``remedy.json``): how much each matrix's mask matters for an ability that a pruned model lost.

A recipe with the allocation ``diagnosis`` prunes the important matrices less.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import RecipeError, shortened
from .files import write_json

REMEDY_FILE = "remedy.json"
_FORMAT: Final = "prunescope-remedy-1"


class Remedy(BaseModel):
    """Importance of each matrix, as found by diagnosing a pruned model.

    Attributes
    ----------
    model_fingerprint
        Fingerprint of the dense model.
    variant
        The pruned model that was diagnosed.
    language, category
        Language and category of the items that it fails, such as ``sw`` and ``reasoning``.
    fitted_on
        The data behind the diagnosis, in words.
    importance
        Estimated recovery from undoing the mask of each matrix, by ``BLOCK.ROLE``, such as ``9.down``.

    Raises
    ------
    RecipeError
        (wrapped in pydantic's ``ValidationError``) if an importance is NaN or infinite.

    Examples
    --------
    >>> remedy = Remedy(
    ...     model_fingerprint="4f", variant="wanda-0.5-row-pruned-en-s0", language="sw", category="reasoning",
    ...     fitted_on="half of the items", importance={"0.q": 0.01, "0.down": 0.12},
    ... )
    >>> from pruning import Recipe
    >>> Recipe(method="wanda", sparsity=0.5, allocation="diagnosis", importance=remedy.importance).allocation_label
    'diagnosis=728fc4'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["prunescope-remedy-1"] = _FORMAT
    model_fingerprint: str
    variant: str
    language: str
    category: str
    fitted_on: str
    importance: dict[str, float] = Field(min_length=1)

    @field_validator("importance")
    @classmethod
    def _finite(cls, importance: dict[str, float]) -> dict[str, float]:
        for name, value in importance.items():
            if not math.isfinite(value):
                raise RecipeError(f'"{name}" is {value:g}, which cannot be ranked')
        return importance

    @classmethod
    def open(cls, path: Path | str) -> Remedy:
        """Read a remedy.

        Raises
        ------
        RecipeError
            If the file is missing, damaged, or not a remedy.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecipeError(
                f"there is no file {path}; pass the {REMEDY_FILE} written by prunescope diagnose"
            ) from error
        except OSError as error:
            raise RecipeError(f"cannot read {shortened(path, 200)}: {error.strerror}; pass a {REMEDY_FILE}") from error
        except ValueError as error:
            raise RecipeError(f"{path} is damaged ({error}); run prunescope diagnose again") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise RecipeError(
                f'{path} is not a remedy ("format" is not "{_FORMAT}"); '
                f"pass the {REMEDY_FILE} written by prunescope diagnose"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            raise RecipeError(f"{path} is damaged ({place}: {message}); run prunescope diagnose again") from error

    def save(self, path: Path | str) -> None:
        """Write the remedy atomically as JSON."""
        write_json(Path(path), self.model_dump(mode="json"))
