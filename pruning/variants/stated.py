"""What the name of a checkpoint says of it, and whether its weights agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..patterns import n_of_m
from .masks import Bits, MaskSet

#: Largest difference between a stated and a measured sparsity, and between rows of a matrix that should be pruned
#: alike, that rounding and weights that were zero before can explain.
_TOLERANCE = 0.01
#: Patterns n:m that are recognized where the name says that single weights compete more widely.
_STRICT = ("2:4", "4:8")
#: Digits that the measured sparsity of a model with a stated recipe is rounded to, so that draws of one recipe agree
#: where some of their removed weights were zero before.
STATED_DIGITS = 3


class Stated(BaseModel):
    """What is known of a model made elsewhere from its name alone; ``None`` where the name does not say.

    Attributes
    ----------
    method
        Method, as frames call it.
    sparsity, pattern
        Share and pattern of the removed weights. They are compared with the masks, which have the last word.
    calibration, seed
        Name of the calibration set, and its seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    calibration: str | None = None
    seed: int | None = None

    def contradictions(self, masks: MaskSet, recipe: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return what the name states but the weights, or a recipe beside them, say otherwise: column to words.

        Parameters
        ----------
        masks
            The model's masks.
        recipe
            The columns that describe the model, if its recipe is known.
        """
        if recipe is not None:
            stated = {column: value for column, value in self if value is not None}
            return {
                column: f"its recipe has {column} {recipe[column]}, not {value}"
                for column, value in stated.items()
                if value != recipe[column]
            }
        found = {}
        measured = masks.sparsity() if masks else 0.0
        if self.sparsity is not None and abs(measured - self.sparsity) > _TOLERANCE:
            found["sparsity"] = f"{measured:.1%} of its weights were removed, not {self.sparsity:.1%}"
        if self.pattern is not None:
            words = next(_unlike(masks, self.pattern), "") if masks else "it has no masks"
            if words:
                found["pattern"] = f"its pattern is not {self.pattern}: {words}"
        return found


def _unlike(masks: MaskSet, pattern: str) -> Iterator[str]:
    """Yield in words what speaks against a pattern."""
    numbers = n_of_m(pattern)
    if numbers:
        n, m = numbers
        wrong = [key for key in masks if most_kept(masks.packed(key), masks.shape(key)[1], m) > m - n]
        if wrong:
            yield f"{len(wrong)} of {len(masks)} matrices keep more than {m - n} of some {m} consecutive inputs"
        return
    for strict in _STRICT:
        n, m = n_of_m(strict) or (0, 0)
        if all(most_kept(masks.packed(key), masks.shape(key)[1], m) <= m - n for key in masks):
            yield f"no matrix keeps more than {m - n} of any {m} consecutive inputs"
    if pattern == "row":
        kept = {key: np.bitwise_count(masks.packed(key)).sum(axis=1, dtype=np.int64) for key in masks}
        uneven = [key for key, rows in kept.items() if np.ptp(rows) > _TOLERANCE * masks.shape(key)[1] + 1]
        if uneven:
            yield f"the rows of {len(uneven)} of {len(masks)} matrices keep different numbers of weights"


def most_kept(packed: Bits, inputs: int, m: int) -> int:
    """Return the largest number of weights that any `m` consecutive inputs keep.

    Parameters
    ----------
    packed, inputs
        A mask with rows packed by ``numpy.packbits``, and its number of inputs; those beyond the last full group are
        left out.
    m
        Inputs of a group.

    Examples
    --------
    >>> most_kept(np.packbits([[1, 1, 0, 0, 0, 1, 1, 1]], axis=1), 8, 4)
    3
    """
    if 8 % m == 0 and inputs % m == 0:
        return int(_IN_A_BYTE[m][packed].max())
    bits = np.unpackbits(packed, axis=1, count=inputs)[:, : inputs // m * m]
    return int(bits.reshape(len(bits), -1, m).sum(axis=2, dtype=np.uint8).max())


def _in_a_byte(m: int) -> Bits:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return bits.reshape(256, -1, m).sum(axis=2).max(axis=1).astype(np.uint8)


#: For each value of a byte, the largest number of ones in any of its groups of m bits.
_IN_A_BYTE = {m: _in_a_byte(m) for m in (1, 2, 4, 8)}
