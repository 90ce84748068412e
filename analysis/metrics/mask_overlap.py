"""Mask overlap: do different calibration texts keep the same weights?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from pruning import Anatomy, MaskSet, Variant
from pruning.models.arithmetic import fast_float32
from pruning.projections import Key
from pruning.text.calibration import Drawn, shared_text
from pruning.variants.masks import intersection_over_union, overlaps, unpack_bits

from ..frames import alike, labels, tidy
from ..stats.jackknife import nested_jackknife_interval

#: Weights of all variants together that are compared at a time: whole matrices of a large model would take gigabytes,
#: and longer, since these fit into a processor's cache.
_AT_A_TIME = 1 << 20
#: Weights of each variant that are read from its files at a time: to open them takes as long as thousands of weights.
_READ = 1 << 19
#: For each value of a byte, its bits: a mask as numbers.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32)


def analyze(
    masks: Mapping[str, MaskSet],
    columns: Mapping[str, Mapping[str, Any]],
    text: Mapping[str, Sequence[Drawn]] | None = None,
) -> pd.DataFrame:
    """Return the frame ``mask_overlap`` for every pair of variants that differ in calibration set or seed only.

    One projection of the variants of a recipe is looked at at a time: of a 14336 × 4096 one, bit-packed, 7.3 MB a
    variant.

    Parameters
    ----------
    masks
        Variant to its masks.
    columns
        Variant to the columns that describe it.
    text
        Variant to the calibration text that it was made with, as far as it is known.
    """
    text = text or {}
    rows: list[dict[str, Any]] = []
    for group in alike({name: columns[name] for name in masks}):
        members = [masks[name] for name in group]
        found = {
            key: (intersection_over_union(both), _chance(np.diagonal(both) / np.prod(members[0].shape(key))))
            for key, both in (overlaps(members).items() if len(group) > 1 else ())
        }
        rows += of_pairs(group, columns, text, ("iou", "iou_chance"), found)
    return tidy("mask_overlap", rows)


def of_pairs(
    group: Sequence[str],
    columns: Mapping[str, Mapping[str, Any]],
    text: Mapping[str, Sequence[Drawn]],
    metrics: Sequence[str],
    found: Mapping[Key, Sequence[Float[np.ndarray, "variants variants"]]],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``mask_overlap`` of every two variants of a recipe.

    Parameters
    ----------
    group
        The variants.
    columns, text
        As for :func:`analyze`.
    metrics
        Names of the metrics.
    found
        Of each projection, one matrix for each metric; only what is above the diagonal is read.
    """
    for i, j in combinations(range(len(group)), 2):
        one, other = group[i], group[j]
        yield {
            **columns[one],
            "layer": [layer for layer, _ in found] * len(metrics),
            "role": [role for _, role in found] * len(metrics),
            "other_calibration": columns[other]["calibration"],
            "other_seed": columns[other]["seed"],
            "shared_text": shared(text.get(one), text.get(other)),
            "metric": [metric for metric in metrics for _ in found],
            "value": [float(matrices[which][i, j]) for which in range(len(metrics)) for matrices in found.values()],
        }


def shared(one: Sequence[Drawn] | None, other: Sequence[Drawn] | None) -> float:
    """Return the share of their text that two variants have in common; NaN if it is not known."""
    return shared_text(one, other) if one and other else float("nan")


def draws_share(frame: pd.DataFrame) -> float:
    """Return the largest share of their text that two draws of one calibration set have in common, 0 without two.

    Parameters
    ----------
    frame
        The frame ``mask_overlap``, or the rows of one recipe.
    """
    same = (frame["calibration"].astype(str) == frame["other_calibration"].astype(str)).to_numpy()
    return float(frame.loc[same, "shared_text"].fillna(0).max()) if same.any() else 0.0


def sparsity(masks: Mapping[str, MaskSet], columns: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return the frame ``sparsity``: the share of weights that each variant removed of each projection."""
    rows = [
        {
            **columns[variant],
            "layer": [layer for layer, _ in kept],
            "role": [role for _, role in kept],
            "metric": ["sparsity"] * len(kept),
            "value": [kept.sparsity(key) for key in kept],
        }
        for variant, kept in masks.items()
    ]
    return tidy("sparsity", rows)


def _chance(kept: Float[np.ndarray, " masks"]) -> Float[np.ndarray, "masks masks"]:
    """Return the IoU expected of every two of independent random masks that keep these shares."""
    both = np.outer(kept, kept)
    either = kept[:, None] + kept - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def agreement(variants: Sequence[Variant], dense: Anatomy) -> pd.DataFrame:
    """Return the rows of ``mask_overlap`` on how alike the values are that corrected weights came to.

    One block of the dense model is in memory at a time, and of each variant 2^19 weights of one projection: with 30
    variants about 50 MB in bfloat16, whatever the size of the model.

    Parameters
    ----------
    variants
        Pairs that differ in calibration set or seed only, and have masks and corrected weights, are compared.
    dense
        The dense model: a correction is the difference from it.
    """
    corrected = {variant.id: variant for variant in variants if variant.values and variant.masks}
    columns = {name: variant.columns() for name, variant in corrected.items()}
    text = {name: variant.record.text for name, variant in corrected.items()}
    rows: list[dict[str, Any]] = []
    for group in alike(columns):
        if len(group) < 2:
            continue
        members = [corrected[name] for name in group]
        cosines: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        for layer, keys in groupby(members[0].masks, key=lambda key: key[0]):
            with dense.loaded(layer, to_read=True):
                for key in keys:
                    cosines[key] = _cosines(members, key, dense.weight(*key))
        rows += of_pairs(group, columns, text, ("value_cosine", "correction_cosine"), cosines)
    return tidy("mask_overlap", rows)


def _cosines(
    variants: Sequence[Variant], key: Key, dense: Float[Tensor, "outputs inputs"]
) -> tuple[Float[np.ndarray, "variants variants"], Float[np.ndarray, "variants variants"]]:
    """Return the cosines of every pair's values, and of their corrections, over the weights that both keep."""
    sums = _Sums(len(variants), max(_AT_A_TIME // (len(variants) * dense.shape[1]), 1), dense)
    rows = max(_READ // dense.shape[1], 1)
    for before, *read in zip(
        dense.split(rows), *(variant.pieces(key, dense, rows) for variant in variants), strict=True
    ):
        for start in range(0, len(before), sums.rows):
            few = slice(start, start + sums.rows)
            sums.add(before[few], [(bits[few], weight[few]) for bits, weight in read])
    return sums.cosines


class _Sums:
    """Products of every two variants' weights, and of their corrections, added up over some rows at a time.

    Parameters
    ----------
    count
        Number of variants.
    rows
        Most rows at a time, few enough for those of all variants to stay in a processor's cache.
    dense
        The dense weight.
    """

    def __init__(self, count: int, rows: int, dense: Float[Tensor, "outputs inputs"]) -> None:
        self.rows = rows
        self._dots = torch.zeros(2, count, count, dtype=torch.float64, device=dense.device)
        self._squares = torch.zeros_like(self._dots)
        size = (count, min(rows, len(dense)), dense.shape[1])
        self._values, self._changes, self._kept = (torch.empty(size, device=dense.device) for _ in range(3))

    def add(
        self, dense: Float[Tensor, "rows inputs"], variants: Sequence[tuple[UInt8[np.ndarray, "rows bytes"], Tensor]]
    ) -> None:
        """Add some rows, given the packed mask and the weight of each variant."""
        values, changes, kept = (whole[:, : len(dense)] for whole in (self._values, self._changes, self._kept))
        for number, (bits, weight) in enumerate(variants):
            values[number].copy_(weight)
            _write_bits(bits, kept[number])
        torch.sub(values, dense.float(), out=changes).mul_(kept)
        kept = kept.flatten(1)
        for which, those in enumerate((values.flatten(1), changes.flatten(1))):
            with fast_float32(dense.device):
                self._dots[which] += those @ those.T
                self._squares[which] += those.square_() @ kept.T  # [i, j]: of i's values, where j keeps too

    @property
    def cosines(self) -> tuple[Float[np.ndarray, "variants variants"], Float[np.ndarray, "variants variants"]]:
        """The cosines of values, and of corrections."""
        cosines = self._dots / (self._squares * self._squares.mT).sqrt().clamp(min=1e-30)
        return cosines[0].cpu().numpy(), cosines[1].cpu().numpy()


def _write_bits(packed: UInt8[np.ndarray, "rows bytes"], out: Float[Tensor, "rows inputs"]) -> None:
    """Write a packed mask as zeros and ones."""
    if out.device.type != "cpu":
        out.copy_(unpack_bits(torch.from_numpy(packed).to(out.device), out.shape[1]))
    elif out.shape[1] % 8 == 0:
        np.take(_BITS, packed, axis=0, out=out.numpy().reshape(*packed.shape, 8), mode="clip")
    else:
        out.copy_(torch.from_numpy(np.unpackbits(packed, axis=1, count=out.shape[1])))


def mean_matrix(frame: pd.DataFrame, metric: str = "iou") -> pd.DataFrame:
    """Return the mean of a metric over layers and roles, for every pair of the calibration sets of one recipe.

    Symmetric, with an empty diagonal; rows and columns are called as figures call sets.
    """
    shown = frame[frame["metric"] == metric]
    one, other = ["calibration", "seed"], ["other_calibration", "other_seed"]
    mean = shown.groupby([*one, *other], observed=True)["value"].mean()
    sets = labels.sets_of(pd.concat([shown[one], shown[other].set_axis(one, axis=1)]))
    names = [labels.set_label(*pair) for pair in sets]
    matrix = pd.DataFrame(np.nan, index=names, columns=names)
    for (a, sa, b, sb), value in mean.items():
        first, second = labels.set_label(a, sa), labels.set_label(b, sb)
        matrix.loc[first, second] = matrix.loc[second, first] = value
    return matrix


def set_matrix(frame: pd.DataFrame, metric: str = "iou") -> pd.DataFrame:
    """Return the mean of a metric over layers, roles and draws, for every pair of the calibration sets of one recipe.

    Symmetric; on the diagonal that of two draws of the set, empty if there is only one draw.
    """
    shown = frame[frame["metric"] == metric].astype({"calibration": str, "other_calibration": str})
    turned = shown.rename(columns={"calibration": "other_calibration", "other_calibration": "calibration"})
    mean = pd.concat([shown, turned]).groupby(["calibration", "other_calibration"])["value"].mean().unstack()
    mean = mean.loc[sorted(mean.index, key=labels.calibration_rank), sorted(mean.columns, key=labels.calibration_rank)]
    names = [labels.set_label(name, 0) for name in mean.index]
    return mean.set_axis(names, axis=0).set_axis(names, axis=1)


class Overlaps(NamedTuple):
    """Mean overlap of draws of one set, of draws of different sets, and the first minus the second.

    Each is a value with its 95 % interval over draws; nan where there is no such pair, or no interval.
    """

    same: tuple[float, float, float]
    different: tuple[float, float, float]
    difference: tuple[float, float, float]


def mean_overlaps(frame: pd.DataFrame, metric: str = "iou") -> Overlaps:
    """Return the mean of a metric over layers and roles within and between the calibration sets of one recipe.

    Sets, and pairs of sets, count alike. A draw is in many pairs, so draws, not pairs, are left out in turn: the
    jackknife over draws nested in sets, which are taken as given. Between sets that takes two draws of each, within
    them three: without one of two there is no pair left.

    Parameters
    ----------
    frame
        The frame ``mask_overlap`` of one recipe.
    metric
        Of those of the frame.
    """
    shown = frame[frame["metric"] == metric]
    one, other = ["calibration", "seed"], ["other_calibration", "other_seed"]
    draws = labels.sets_of(pd.concat([shown[one], shown[other].set_axis(one, axis=1)]))
    return within_and_between(mean_matrix(frame, metric).to_numpy(), [name for name, _ in draws])


def within_and_between(matrix: Float[np.ndarray, "draws draws"], sets: Sequence[str]) -> Overlaps:
    """Return what :func:`mean_overlaps` does, from the overlaps of all pairs of draws and the set of each.

    Parameters
    ----------
    matrix
        Symmetric; the diagonal is not looked at.
    sets
        Of each draw.
    """
    number = np.unique(list(sets), return_inverse=True)[1]
    members = np.eye(number.max() + 1)[number]
    pairs = np.where(np.eye(len(number), dtype=bool), 0, matrix)

    def estimates(kept: Int[np.ndarray, " kept"]) -> Float[np.ndarray, " 3"]:
        own = members[kept]
        counts = own.sum(axis=0)
        counts = np.outer(counts, counts) - np.diag(counts)
        means = np.divide(
            own.T @ pairs[np.ix_(kept, kept)] @ own, counts, out=np.full_like(counts, np.nan), where=counts > 0
        )
        same, different = (
            found[np.isfinite(found)] for found in (np.diag(means), means[np.triu_indices(len(means), 1)])
        )
        of_each = [found.mean() if len(found) else np.nan for found in (same, different)]
        return np.array([*of_each, of_each[0] - of_each[1]])

    every = np.arange(len(number))
    without = np.stack([estimates(np.delete(every, left)) for left in every])
    least = np.bincount(number).min()
    found = []
    for k, (value, needed) in enumerate(zip(estimates(every), (3, 2, 3), strict=True)):
        of_sets = [without[number == each, k] for each in range(number.max() + 1)] if least >= needed else []
        found.append(nested_jackknife_interval(float(value), of_sets))
    return Overlaps(*found)


def cluster(matrix: pd.DataFrame) -> NDArray[np.float64]:
    """Cluster calibration sets by distance, 1 − mean IoU or share of equal codes: scipy's average linkage.

    Parameters
    ----------
    matrix
        As from :func:`set_matrix`.
    """
    distance = 1 - matrix.to_numpy(copy=True)
    np.fill_diagonal(distance, 0)
    tree: NDArray[np.float64] = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return tree
