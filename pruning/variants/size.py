"""How much space compressed projections take, in bits a weight, so that pruning and quantization can be compared."""

from __future__ import annotations

from math import comb, log2

from ..patterns import is_structure, n_of_m

#: Bits of a weight that is stored as it is: checkpoints are in bfloat16 or float16, and count as such in float32 too.
DENSE_BITS = 16.0


def pruned_bits(sparsity: float, pattern: str) -> float:
    """Return the bits a weight of a pruned projection: 16 for each that is kept, and the mask.

    A mask takes one bit a weight; an n:m pattern, of which there are only C(m, n) in every m weights, log2 C(m, n) / m;
    whole neurons and heads next to nothing.

    >>> pruned_bits(0.5, "row"), round(pruned_bits(0.5, "2:4"), 3), pruned_bits(0.5, "neurons")
    (9.0, 8.646, 8.0)
    """
    numbers = n_of_m(pattern)
    mask = log2(comb(numbers[1], numbers[0])) / numbers[1] if numbers else float(not is_structure(pattern))
    return DENSE_BITS * (1 - sparsity) + mask
