"""Swaps: exchange a kept and a pruned weight of a row for as long as that lowers the row's reconstruction error.

For a row w with pruned weights P, the error is ``(w ⊙ P) G (w ⊙ P)ᵀ``. With ``c = G (w ⊙ P)``, pruning the kept weight
i and reviving the pruned weight j changes it by ``a_i + b_j − 2 w_i w_j G_ij``, where
``a_i = 2 w_i c_i + w_i² G_ii`` and ``b_j = −2 w_j c_j + w_j² G_jj``. The best pair is found exactly without looking at
all of them. With ``s_i = |w_i| √G_ii``, and ``ρ_i`` the largest correlation of input i with another one, no pair with i
changes the error by less than ``a_i + min_j (b_j − 2 ρ_i s_i s_j)``, and none with j by less than
``b_j + min_i (a_i − 2 ρ_j s_j s_i)``. As functions of ``ρ_i s_i`` and ``ρ_j s_j`` these minima are concave, so chords
between a few of their values lie below them. Only weights whose bounds are below the best pair known so far are
compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..parameters import Parameter
from ..patterns import Pattern
from ..statistics import InputStatistics
from .registry import Refiner

#: Weights whose rows are refined together, and pairs that are compared at a time: few enough for a CPU's cache.
_AT_A_TIME = {"cpu": 1 << 18}
_AT_A_TIME_ON_A_GPU = 1 << 23
#: Chords of the concave function.
_CHORDS = 8
#: Kept and pruned weights of each row that are compared first: their best pair mostly is the row's.
_FIRST = 32
#: Share of a row's error by which a swap must lower it: less is rounding.
_ROUNDING = 1e-6
#: Share of rows that must have swaps left; else the others are put aside.
_STILL = 0.9
#: Higher than any cost of a weight, and finite.
_HIGH = 1e30
#: Higher than any pair.
_NO_PAIR = torch.iinfo(torch.int64).max


def refine(
    weight: Float[Tensor, "outputs inputs"],
    mask: Bool[Tensor, "outputs inputs"],
    inputs: InputStatistics,
    pattern: Pattern,
    *,
    swaps: float = 25,
) -> Bool[Tensor, "outputs inputs"]:
    """Return a mask with less reconstruction error and as many weights in every row (or group of n:m).

    After SparseSwaps (2512.10922): the best exchange of a row, again and again, until none lowers its error. Kept
    weights must have their dense values.

    Parameters
    ----------
    weight, mask
        Dense weights and mask.
    inputs
        Must have the Gram matrix, on any scale.
    pattern
        With n:m, weights are exchanged within their group of m inputs.
    swaps
        Most exchanges per row.

    Raises
    ------
    ArithmeticError
        If the Gram matrix is not finite.
    """
    known = _known(inputs)
    rows = max(
        _AT_A_TIME.get(weight.device.type, _AT_A_TIME_ON_A_GPU) // inputs.inputs // max(pattern.group // 4, 1), 1
    )
    blocks = _blocks(known.gram, pattern.group) if pattern.group else None
    parts = zip(weight.split(rows), mask.split(rows), strict=True)
    return torch.cat([_refined(dense.float(), kept, known, blocks, int(swaps)) for dense, kept in parts])


@dataclass(frozen=True)
class _Inputs:
    """What swaps need of the inputs: G, ``√G_ii``, and the largest correlation of each with another one."""

    gram: Float[Tensor, "inputs inputs"]
    norms: Float[Tensor, " inputs"]
    correlation: Float[Tensor, " inputs"]


def _known(inputs: InputStatistics) -> _Inputs:
    if "swaps" not in inputs.memo:
        gram = inputs.gram_itself()
        norms = gram.diagonal().sqrt()
        if not bool(torch.isfinite(norms.sum())):
            raise ArithmeticError("the Gram matrix of the inputs is not finite")
        inverse = torch.where(norms > 0, 1 / norms, 0)
        largest = []
        for start in range(0, len(gram), 512):
            part = (gram[start : start + 512] * inverse).abs_().mul_(inverse[start : start + 512, None])
            part.diagonal(start).zero_()
            largest.append(part.amax(dim=1))
        inputs.memo["swaps"] = _Inputs(gram, norms, torch.cat(largest))
    known: _Inputs = inputs.memo["swaps"]
    return known


@dataclass
class _Rows:
    """Some rows between two swaps.

    Attributes
    ----------
    weight, kept
        Dense weights and current mask, ``[rows, inputs]``.
    change
        ``c``, what the pruned weights would add to the input of every weight, ``[rows, inputs]``.
    size
        ``s``, Wanda's score, ``[rows, inputs]``.
    """

    weight: Tensor
    kept: Tensor
    change: Tensor
    size: Tensor

    def __getitem__(self, which: Tensor) -> _Rows:
        return _Rows(self.weight[which], self.kept[which], self.change[which], self.size[which])

    def errors(self) -> Tensor:
        """Return the reconstruction error of each row."""
        return (self.weight * self.change).masked_fill_(self.kept, 0).sum(dim=1)

    def costs(self) -> tuple[Tensor, Tensor]:
        """Return ``a``, infinite for pruned weights, and ``b``, infinite for kept ones."""
        square, cross = self.size.square(), 2 * self.weight * self.change
        return (square + cross).masked_fill_(~self.kept, torch.inf), (square - cross).masked_fill_(self.kept, torch.inf)

    def exchange(self, numbers: Tensor, pairs: Tensor, gram: Tensor) -> None:
        """Prune and revive a weight in each of some rows, ``[n]``."""
        i, j = pairs // len(gram), pairs % len(gram)
        self.kept[numbers, i] = False
        self.kept[numbers, j] = True
        gained = gram[i].mul_(self.weight[numbers, i, None]).sub_(gram[j].mul_(self.weight[numbers, j, None]))
        self.change.index_add_(0, numbers, gained)


@dataclass
class _Best:
    """The best swap of each row that is known so far.

    Attributes
    ----------
    value
        By how much it changes the row's error; infinite if there is none, ``[rows]``.
    pair
        ``i · inputs + j`` for pruning i and reviving j; of equally good pairs the first, ``[rows]``.
    """

    value: Tensor
    pair: Tensor

    @classmethod
    def none(cls, like: Tensor) -> _Best:
        value = like.new_full((len(like),), torch.inf)
        return cls(value, torch.zeros_like(value, dtype=torch.int64))

    def consider(self, rows: Tensor, values: Tensor, pairs: Tensor) -> None:
        """Take in further pairs, each of one row, all three ``[pairs]``."""
        lowest = self.value.scatter_reduce(0, rows, values, "amin")
        tied = pairs.masked_fill(values != lowest[rows], _NO_PAIR)
        first = torch.full_like(self.pair, _NO_PAIR).scatter_reduce(0, rows, tied, "amin")
        self.pair = torch.where(lowest < self.value, first, self.pair)
        self.value = lowest


def _refined(weight: Tensor, kept: Tensor, known: _Inputs, blocks: Tensor | None, swaps: int) -> Tensor:
    """Return the mask of some rows after their swaps."""
    refined = kept.clone()
    numbers = torch.arange(len(weight), device=weight.device)
    rows = _Rows(weight, kept.clone(), weight.masked_fill(kept, 0) @ known.gram, weight.abs() * known.norms)
    for _ in range(swaps):
        least = -_ROUNDING * rows.errors()
        best = _best_in_rows(rows, known, least) if blocks is None else _best_in_groups(rows, blocks)
        better = (best.value < least).nonzero().flatten()
        if len(better) < _STILL * len(numbers):
            refined[numbers] = rows.kept
            numbers, rows, best = numbers[better], rows[better], _Best(best.value[better], best.pair[better])
            better = torch.arange(len(numbers), device=weight.device)
        if len(better) == 0:
            break
        rows.exchange(better, best.pair[better], known.gram)
    refined[numbers] = rows.kept
    return refined


def _best_in_rows(rows: _Rows, known: _Inputs, least: Tensor) -> _Best:
    """Return the best swap of every row, if any changes its error by less than `least`, which is negative."""
    pruning, reviving = rows.costs()
    weaker = rows.size * known.correlation
    pruned = pruning + _below(reviving, rows.size, weaker)
    revived = reviving + _below(pruning, rows.size, weaker)
    best = _Best.none(pruning)
    some = [bound.topk(min(_FIRST, bound.shape[1]), largest=False).indices for bound in (pruned, revived)]
    _compare(rows, known, pruning, reviving, _numbers(some[0]), some[0].flatten(), some[1], best)
    limit = torch.minimum(best.value, least)[:, None]
    left, others = (pruned < limit).nonzero(), int((revived < limit).sum(dim=1).amax())
    if len(left) and others:
        partners = revived.topk(others, largest=False).indices
        _compare(rows, known, pruning, reviving, left[:, 0], left[:, 1], partners, best)
    return best


def _numbers(places: Tensor) -> Tensor:
    return torch.arange(len(places), device=places.device).repeat_interleave(places.shape[1])


def _below(cost: Tensor, size: Tensor, at: Tensor) -> Tensor:
    """Return a lower bound of ``min_j (cost_j − 2 at_i size_j)`` for all i of each row, by chords."""
    most = at.amax(dim=1, keepdim=True).clamp_min_(1e-30)
    ends = torch.linspace(0, 1, _CHORDS + 1, device=at.device).square() * most  # closer together where most weights are
    minima = [torch.addcmul(cost, size, end, value=-2).amin(dim=1) for end in ends[:, :, None].unbind(1)]
    heights = torch.stack(minima, dim=1).clamp_max_(_HIGH)  # finite also where there is nothing to exchange
    chord = (at / most).sqrt_().mul_(_CHORDS).to(torch.int64).clamp_max_(_CHORDS - 1)
    slopes = heights.diff(dim=1) / ends.diff(dim=1)
    offsets = heights[:, :-1] - slopes * ends[:, :-1]
    return slopes.gather(1, chord).mul_(at).add_(offsets.gather(1, chord))


def _compare(
    rows: _Rows,
    known: _Inputs,
    pruning: Tensor,
    reviving: Tensor,
    numbers: Tensor,
    columns: Tensor,
    partners: Tensor,
    best: _Best,
) -> None:
    """Compare pruning a weight of a row, given by number and column, with reviving the row's partners ``[rows, k]``."""
    inputs = reviving.shape[1]
    weights, costs = rows.weight.gather(1, partners), reviving.gather(1, partners)
    few = max(4 * rows.weight.numel() // partners.shape[1], 1)
    for some, i in zip(numbers.split(few), columns.split(few), strict=True):
        j = partners[some]
        cross = known.gram.take(j + i[:, None] * inputs).mul_(weights[some]).mul_(rows.weight[some, i, None])
        values, place = torch.add(costs[some], cross, alpha=-2).min(dim=1)
        pairs = i * inputs + j.gather(1, place[:, None])[:, 0]
        best.consider(some, values.add_(pruning[some, i]), pairs)


def _best_in_groups(rows: _Rows, blocks: Tensor) -> _Best:
    """Return the best swap of every row within a group, given the blocks ``[groups, m, m]`` of G on its diagonal."""
    groups, m, _ = blocks.shape
    pruning, reviving = (cost.unflatten(1, (groups, m)) for cost in rows.costs())
    weight = rows.weight.unflatten(1, (groups, m))
    cross = (weight[..., :, None] * weight[..., None, :]).mul_(blocks)
    values, place = (pruning[..., :, None] + reviving[..., None, :]).sub_(cross, alpha=2).flatten(1).min(dim=1)
    group, i, j = place // m**2, place // m % m, place % m
    return _Best(values, (group * m + i) * (groups * m) + group * m + j)


def _blocks(gram: Tensor, m: int) -> Tensor:
    """Return the blocks of a matrix on its diagonal, ``[groups, m, m]``."""
    return gram.unflatten(1, (-1, m)).unflatten(0, (-1, m)).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


SWAPS = Refiner(
    "swaps",
    "after SparseSwaps, 2512.10922",
    refine,
    {"swaps": Parameter(25, 1, 100_000, "most swaps per output row", whole=True)},
)
