"""Geometry: was what tells languages apart rotated by pruning, or lost?

An error in a dense model's language-specific subspace, or languages found outside of it, would both be there after a
mere rotation. So each model is also looked at in its own subspace (LSAR, :mod:`analysis.metrics.lsar`), fitted in the
same way, and the two are compared: overlap of the subspaces, linear CKA, and what a linear probe reads off each part.

No text is read for it. The means of a model's subspace are those of one half of the held-out segments, and the other
half is judged in it; halves are then swapped. Fitted on the parallel text instead, the subspaces of 30 variants of an
8B model would cost another forward pass of all of them over it, and would hardly be less noisy: by default it has as
many segments.
Dense and pruned subspaces are fitted on opposite halves, so that the overlap of each model with itself, a half against
the other, is the ceiling that the number of segments sets: a pruned model with noisier means is not taken for a rotated
one. Within the judged half, the probe is fitted on one quarter and tested on the other. Halves and quarters are drawn
over ids: translations of a segment are never apart.

Everything is computed from inner products of the segments (700 × 700 for seven languages of 100 segments), and from the
means of languages, one layer of one model at a time. At 4096 dimensions that takes some 0.1 s on one core, 2.6 × the
product of the states with themselves, so 2 to 5 minutes for 31 models of 32 layers
(``tests/benchmarks/test_geometry_cost.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from probes import DENSE, Readings

from ..frames import VARIANT_COLUMNS, tidy
from ..stats.intervals import share_difference_interval, share_interval
from ..stats.jackknife import jackknife_interval
from .geometry_states import PARTS, Found, Segments, States, compared

#: Relative change of the variance between languages.
BETWEEN = "language_variance_change"
OVERLAPS = ("subspace_overlap", "largest_angle", "self_overlap", "subspace_overlap_change")
#: The dense model's part that each is compared with: its own subspace is the dense one.
_BEFORE = (0, 1, 2, 1, 2, 1)
#: Changes of up to this much (of an overlap, or of a probe's accuracy) count as none; see :func:`verdicts`.
TOLERANCE = 0.05
#: What :func:`verdicts` says.
UNCHANGED, ROTATED_INSIDE, ROTATED, SCATTERED, LOST, UNDECIDED = VERDICTS = (
    "unchanged",
    "rotated inside",
    "rotated",
    "scattered",
    "lost",
    "undecided",
)


def analyze(
    readings: Mapping[tuple[str, str], Readings],
    columns: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, Sequence[str]],
    rank: int | None = None,
) -> pd.DataFrame:
    """Return the frame ``geometry``.

    With fewer than eight segments of a language, or a single language, there is nothing but CKA in it.

    Parameters
    ----------
    readings
        ``(variant, language)`` to what was read of the held-out text.
    columns
        Variant to the columns that describe it.
    ids
        Language to the ids of the segments that were read; segments with one id are translations of each other.
    rank
        Of the subspaces; one less than there are languages by default.
    """
    languages = list(dict.fromkeys(language for _, language in readings))
    variants = list(dict.fromkeys(variant for variant, _ in readings))
    segments = Segments.of([ids[language] for language in languages])
    rank = rank or len(languages) - 1
    layers = len(readings[DENSE, languages[0]].pooled)
    found: dict[str, list[Found]] = {variant: [] for variant in variants}
    for layer in range(layers):

        def states(variant: str, layer: int = layer) -> States:
            parts = [readings[variant, language].pooled_at(layer).double().numpy() for language in languages]
            return States(segments, np.concatenate(parts), rank)

        dense = states(DENSE)
        for variant in variants:
            found[variant].append(compared(dense, dense if variant == DENSE else states(variant)))
    rows = []
    for variant in variants:
        own = _Rows(columns[variant], languages, segments, np.arange(layers))
        own.add(found[variant], None if variant == DENSE else found[DENSE])
        if variant == DENSE and segments.enough:
            width = readings[DENSE, languages[0]].pooled.shape[-1]
            own.put("overlap_chance", (np.full(layers, rank / width),))
        rows += own.rows
    return tidy("geometry", rows)


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """The rows of one model: at each layer, and of means over layers."""

    columns: Mapping[str, Any]
    languages: Sequence[str]
    segments: Segments
    layers: np.ndarray

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def put(
        self,
        metric: str,
        estimate: Any,
        n: int | None = None,
        language: str | None = None,
        layers: np.ndarray | None = None,
    ) -> None:
        """Add a metric at each layer (all by default), or, for a scalar, its mean over layers."""
        value, *interval = (np.atleast_1d(each) for each in estimate)
        place: dict[str, Any] = {"metric": [metric] * len(value), "language": language, "n": n}
        if np.ndim(estimate[0]):
            place["layer"] = self.layers if layers is None else layers
        low_high = dict(zip(("low", "high"), interval, strict=False))
        self.rows.append({**self.columns, **place, "value": value, **low_high})

    def add(self, found: Sequence[Found], dense: Sequence[Found] | None) -> None:
        """Add everything that was found, and, of a pruned model, its change from the dense one."""
        units = self.segments.units
        if found[0].cka is not None:
            self._add_cka([one.cka for one in found if one.cka is not None])
        if found[0].overlap is None or found[0].right is None:
            return
        overlap = np.stack([one.overlap for one in found if one.overlap is not None], axis=-1)  # [3, draws, layers]
        right = np.stack([one.right for one in found if one.right is not None], axis=1)  # [parts, layers, rows]
        before = None
        if dense is not None:
            own = np.stack([one.overlap for one in dense if one.overlap is not None], axis=-1)
            overlap = np.concatenate([overlap, (overlap[0] - (overlap[2] + own[2]) / 2)[None]])
            before = np.stack([one.right for one in dense if one.right is not None], axis=1)[list(_BEFORE)]
        for metric, draws in zip(OVERLAPS, overlap, strict=False):
            for each in (draws, draws.mean(axis=-1)):
                self.put(metric, jackknife_interval(np.asarray(each[0]), each[1:]), units)
        if dense is not None:
            self._add_between(found, dense)
        for part, name in enumerate(PARTS if before is not None else PARTS[: max(_BEFORE) + 1]):
            self._add_decoding(f"{name}_decoding", right[part], None if before is None else before[part])

    def _add_between(self, found: Sequence[Found], dense: Sequence[Found]) -> None:
        """Add the relative change of the variance between languages; unknown where the dense model has none."""
        after, before = (
            np.stack([one.between for one in each if one.between is not None], axis=-1) for each in (found, dense)
        )
        there, units = (before > 0).all(axis=0), self.segments.units
        if not there.any():
            return
        change = after[:, there] / before[:, there] - 1
        self.put(BETWEEN, jackknife_interval(change[0], change[1:]), units, layers=self.layers[there])
        if there.all():
            together = change.mean(axis=-1)
            self.put(BETWEEN, jackknife_interval(np.asarray(together[0]), together[1:]), units)

    def _add_decoding(
        self, metric: str, right: Float[np.ndarray, "layers rows"], before: Float[np.ndarray, "layers rows"] | None
    ) -> None:
        """Add the share of languages that a probe found, and its change; all layers together last."""
        segments, units = self.segments, self.segments.units
        for number, language in enumerate(self.languages):
            own = right[:, segments.language == number]
            shares = [share_interval(layer, np.ones(len(layer))) for layer in own]
            self.put(metric, np.transpose(shares), own.shape[1], language)
        of_units = np.eye(units)[segments.unit]
        asked = of_units.sum(axis=0)
        found = right @ of_units
        self.put(metric, np.transpose([share_interval(layer, asked) for layer in found]), units)
        self.put(metric, share_interval(found.sum(axis=0), asked * len(found)), units)
        if before is None:
            return
        gained, lost = (right > before) @ of_units, (right < before) @ of_units
        changes = [share_difference_interval(*layer, asked) for layer in zip(gained, lost, strict=True)]
        self.put(f"{metric}_change", np.transpose(changes), units)
        together = share_difference_interval(gained.sum(axis=0), lost.sum(axis=0), asked * len(found))
        self.put(f"{metric}_change", together, units)

    def _add_cka(self, cka: Sequence[Sequence[tuple[float, np.ndarray]]]) -> None:
        for number, language in enumerate(self.languages):
            draws = np.column_stack([np.append(*layer[number]) for layer in cka])  # [1 + segments, layers]
            self.put("cka", jackknife_interval(draws[0], draws[1:]), len(draws) - 1, language)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what pruning did to the languages of each pruned model, at each layer and (no layer) on average.

    A quantity counts as fallen if its whole 95 % interval lies below −:data:`TOLERANCE`, as kept if it lies above, and
    otherwise as unknown.

    ==================  ==============================================================================================
    ``lost``            languages are found less well in the model's own subspace, and in its whole state, and their
                        means have come closer
    ``scattered``       less well in its own subspace, but as well as before in the whole state
    ``rotated``         as well as before in its own subspace, which overlaps less with the dense one than each with
                        itself
    ``rotated inside``  the subspace is kept, but the dense model's probe in it finds the languages less well
    ``unchanged``       none of all that
    ``undecided``       an interval is too wide to say; or languages are found less well though their means have not
                        come closer, as when noise grows: with few segments that alone misleads a probe
    ==================  ==============================================================================================

    Returns
    -------
    pandas.DataFrame
        The variant's columns, ``layer`` and ``verdict``, one of :data:`VERDICTS`.
    """
    keys = [*VARIANT_COLUMNS, "layer"]
    rows = frame[(frame["method"] != DENSE) & frame["language"].isna()]
    rows = rows.assign(layer=rows["layer"].astype(float).fillna(-1))
    metrics = {
        "own": "own_specific_decoding_change",
        "whole": "whole_decoding_change",
        "overlap": "subspace_overlap_change",
        "transferred": "transferred_decoding_change",
        "between": BETWEEN,
    }
    tables = {}
    for short, metric in metrics.items():
        of = rows[rows["metric"] == metric].set_index(keys)
        tables[short] = pd.Series(np.select([of["high"] < -TOLERANCE, of["low"] > -TOLERANCE], [-1, 1], 0), of.index)
    states = pd.DataFrame(tables)
    found = states.apply(_verdict, axis=1) if len(states) else pd.Series(dtype=str, index=states.index)
    result = found.rename("verdict").reset_index()
    result["layer"] = result["layer"].where(result["layer"] >= 0)
    return result


def _verdict(state: pd.Series) -> str:
    """Return the verdict from what fell (-1), was kept (1), or is unknown (0)."""
    if state["own"] < 0 and state["whole"] > 0:
        return SCATTERED
    if state["own"] < 0 and state["whole"] < 0 and state["between"] < 0:
        return LOST
    if state["own"] > 0 and state["overlap"] < 0:
        return ROTATED
    if state["own"] > 0 and state["overlap"] > 0 and state["transferred"]:
        return ROTATED_INSIDE if state["transferred"] < 0 else UNCHANGED
    return UNDECIDED
