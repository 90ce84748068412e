"""The frame ``recovery``: its rows, and what is read off it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from probes.patching import RESTORE, Component, Direction
from probes.scoring import ChoiceScores

from ..frames import tidy
from .added import AGNOSTIC_ADDED, Added
from .components import AT_TOKENS
from .drop import LOST, Drop
from .halves import BOTH, EVERY, FIRST, HALVES, OTHER, SECOND

#: Component of the rows on the drop itself.
EVERYTHING = "everything"
#: What ``sample`` says of components that were drawn at random.
RANDOM_SAMPLE = "random"


def recovery_frame(
    place: Mapping[str, Any],
    drop: Drop,
    components: Sequence[Component],
    additions: Sequence[Added],
    effects: Mapping[str, Mapping[int, float]],
    exact: Mapping[Direction, Mapping[int, ChoiceScores]],
    chosen: Mapping[str, Sequence[int]],
    sampled: Sequence[int],
    causes: Sequence[str],
    curves: Sequence[str],
    errors: Sequence[np.ndarray] | None,
    together: Iterable[Mapping[str, Any]] = (),
) -> pd.DataFrame:
    """Return the frame.

    Parameters
    ----------
    place
        Values of the columns that are the same in all rows.
    drop
        What was lost.
    components
        All of them.
    additions
        What blocks add, which is numbered after the components.
    effects
        Half to the estimated effect of each component, summed over the half's questions.
    exact
        Direction to the scores with each component patched.
    chosen, sampled
        Half to the components that it chose; those drawn at random.
    causes, curves
        Kinds that may be named as causes, in the order in which equals are ranked; kinds that are drawn as curves.
    errors
        After each block: what random subspaces are matched in.
    together
        Rows on masks that are undone together (:func:`analysis.metrics.together.together_rows`).
    """
    rows: list[dict[str, Any]] = []
    for on in (EVERY, *HALVES):
        lost = drop.lost(on)
        found = {name: part[0] for name, part in lost._asdict().items()}
        metrics = [LOST[metric] for metric in drop.metrics]
        if np.isfinite(found["value"]).all():
            own = {"component": EVERYTHING, "estimated_on": on, "metric": metrics, **found, "n": drop.n(on)}
            rows.append({**place, **own})
    for direction, scores in exact.items():
        if not scores:  # no cause was chosen
            continue
        of_pairs = {i: own for i, own in scores.items() if components[i].kind in AT_TOKENS}
        others = {i: own for i, own in scores.items() if i not in of_pairs}
        patched = _Patched(drop, components, additions, others, direction)
        positions = _positions(patched, chosen, causes) if direction == RESTORE else {}
        estimated = list(patched.rows(chosen, curves))
        if of_pairs:
            estimated += _Patched(drop.pairs, components, (), of_pairs, direction).rows(chosen, curves)
        for component, on, values in estimated:
            where = {**place, "direction": direction, **_where(component), "estimated_on": on}
            where["position"] = positions.get(on, {}).get(component.label)
            rows += ({**where, **own} for own in values)
        if direction == RESTORE:
            rows += ({**place, "direction": direction, **row} for row in _attributed(drop, components, effects))
            rows += ({**place, "direction": direction, **row} for row in _matched(components, errors))
    rows += ({**place, **row} for row in together)
    names = {_key(_where(components[i])) for i in sampled}
    for row in rows:
        row["sample"] = RANDOM_SAMPLE if _key(row) in names else None
    return tidy("recovery", rows)


class _Patched:
    """Estimates of what exact patching restores, by component, set of questions and metric."""

    def __init__(
        self,
        drop: Drop,
        components: Sequence[Component],
        additions: Sequence[Added],
        scores: Mapping[int, ChoiceScores],
        direction: Direction,
    ) -> None:
        there = {len(components) + k: one for k, one in enumerate(additions) if one.needs <= set(scores)}
        self.drop, self.direction = drop, direction
        self.components = [*components, *(one.component for one in additions)]
        self.indices = [*scores, *there]
        of = [*scores.values(), *(scores[one.part] for one in there.values())]
        beyond = [
            *(None for _ in scores),
            *(None if one.before is None else scores[one.before] for one in there.values()),
        ]
        sets = [on for on in (EVERY, *HALVES) if drop.n(on)]
        sets += [BOTH] * (len(sets) == 3)
        self.restored = {on: drop.restored(of, direction, on, beyond=beyond) for on in sets}
        self.recovered = {on: drop.recovered(of, direction, on, beyond=beyond) for on in sets}
        self._additions = there

    def rows(
        self, chosen: Mapping[str, Sequence[int]], curves: Sequence[str]
    ) -> Iterator[tuple[Component, str, list[dict[str, Any]]]]:
        """Yield component, set of questions and rows: a cause's halves only where the other half chose it."""
        controls: dict[tuple[str, int | None], list[int]] = {}
        for k, i in enumerate(self.indices):
            component = self.components[i]
            if component.draw is not None:
                controls.setdefault((component.kind, component.layer), []).append(k)
                continue
            by = [half for half in HALVES if i in chosen[half]]
            if not by and (component.kind == AGNOSTIC_ADDED or self.direction != RESTORE):
                continue  # it was patched for another's sake
            whole = component.kind in curves or component.kind == "neurons"
            sets = [EVERY, *(half for half in HALVES if whole or OTHER[half] in by), *([BOTH] * (len(by) == 2))]
            for on in sets:
                if on in self.restored:
                    yield component, on, list(self._values(on, k))
        for ks in controls.values():
            for on in (on for on in (EVERY, *HALVES) if on in self.restored):
                yield self.components[self.indices[ks[0]]], on, list(self._range(on, ks))

    def _values(self, on: str, k: int) -> Iterator[dict[str, Any]]:
        for suffix, found in (("restored", self.restored[on]), ("recovery", self.recovered[on])):
            for m, metric in enumerate(self.drop.metrics):
                if np.isfinite(found.value[k, m]):
                    values = {name: float(part[k, m]) for name, part in found._asdict().items()}
                    yield {"metric": f"{metric}_{suffix}", **values, "n": self.drop.n(on)}

    def _range(self, on: str, ks: Sequence[int]) -> Iterator[dict[str, Any]]:
        for suffix, found in (("restored", self.restored[on]), ("recovery", self.recovered[on])):
            for m, metric in enumerate(self.drop.metrics):
                own = found.value[list(ks), m]
                if np.isfinite(own).all():
                    yield {"metric": f"{metric}_{suffix}", **_over_draws(own)}

    def margin(self, on: str, k: int) -> float:
        """Return what a component restores of the metric that all are ranked by."""
        values = self.restored[on].value[:, 0]
        addition = self._additions.get(self.indices[k])
        if addition is None:
            return float(values[k])
        return addition.rank_by(dict(zip(self.indices, values.tolist(), strict=True)))


def _positions(
    patched: _Patched, chosen: Mapping[str, Sequence[int]], causes: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Rank the causes of either half by what they restore on it; the ranks go with the estimates on the other half.

    Of equals the smaller and earlier component is first. Those that both halves chose are ranked by the sum of ranks.
    """
    components, found = patched.components, {}
    for half in (half for half in HALVES if half in patched.restored):
        own = [(k, components[i]) for k, i in enumerate(patched.indices) if i in chosen[half]]
        size = max((abs(patched.margin(half, k)) for k, _ in own), default=1.0)
        own.sort(
            key=lambda each: (
                -round(patched.margin(half, each[0]) / (size or 1.0), 4),
                causes.index(each[1].kind),
                each[1].layer if each[1].layer is not None else -1,
            )
        )
        found[OTHER[half]] = {component.label: rank for rank, (_, component) in enumerate(own, start=1)}
    first, second = found.get(FIRST, {}), found.get(SECOND, {})
    shared = sorted((label for label in first if label in second), key=lambda label: first[label] + second[label])
    found[BOTH] = {label: rank for rank, label in enumerate(shared, start=1)}
    return found


def _attributed(
    drop: Drop, components: Sequence[Component], effects: Mapping[str, Mapping[int, float]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows on what gradients estimate, on all questions and on either half."""
    controls: dict[tuple[str, int | None], list[int]] = {}
    for i, component in enumerate(components):
        own = [i] if component.draw is None else controls.setdefault((component.kind, component.layer), [])
        if component.draw is not None:
            own.append(i)
    groups = [[i] for i, c in enumerate(components) if c.draw is None] + list(controls.values())
    for on in (EVERY, *HALVES):
        for group in groups:
            of = drop.pairs if components[group[0]].kind in AT_TOKENS else drop
            if not of.n(on):
                continue
            lost, shares = float(of.lost(on).value[0, 0]), bool(of.significant(on)[0])
            sums = np.array([sum(effects[half][i] for half in HALVES if on in (EVERY, half)) for i in group])
            means = sums / of.n(on)
            where = {**_where(components[group[0]]), "estimated_on": on}
            control = components[group[0]].draw is not None
            for metric, values in (("restored", means), ("recovery", means / lost if shares else None)):
                if values is not None:
                    own_values = _over_draws(values) if control else {"value": float(values[0]), "n": of.n(on)}
                    yield {**where, "metric": f"attributed_{metric}", **own_values}


def _matched(components: Sequence[Component], errors: Sequence[np.ndarray] | None) -> Iterator[dict[str, Any]]:
    """Yield how much pruning error random subspaces carry, relative to the one they are matched to."""
    if errors is None:
        return
    bases = {c.layer: c.places[0].basis for c in components if c.kind == "specific"}
    drawn: dict[int, list[float]] = {}
    for component in components:
        if component.kind == "random" and component.layer is not None:
            own = errors[component.layer].astype(np.float64)
            control, target = (
                float(np.square(own @ basis.double().numpy()).sum())
                for basis in (component.places[0].basis, bases[component.layer])
                if basis is not None
            )
            if target > 0:
                drawn.setdefault(component.layer, []).append(control / target)
    for layer, ratios in drawn.items():
        yield {"component": "random", "layer": layer, "metric": "error_ratio", **_over_draws(np.array(ratios))}


def _over_draws(values: np.ndarray) -> dict[str, Any]:
    """Return mean and range over the draws of a control."""
    found = {"value": values.mean(), "low": values.min(), "high": values.max()}
    return {**{name: float(value) for name, value in found.items()}, "n": len(values)}


def _where(component: Component) -> dict[str, Any]:
    return {"component": component.kind, "layer": component.layer, "role": component.role}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["component"], row.get("layer"), row.get("role")


def main_metric(frame: pd.DataFrame, what: str = "recovery") -> str:
    """Return the metric that a diagnosis is ranked by: that of the margin, or of the loss for text."""
    margin = (frame["metric"] == "margin_lost").any() or (frame["metric"] == "margin_restored").any()
    return f"{'margin' if margin else 'loss'}_{what}"


def named_causes(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the causes that either half chose, with what they restore on the questions that did not choose them.

    One row a component: the average over both halves if both chose it, else the estimate on the one that did not.
    Ordered by position; ``significant`` says whether the interval lies above 0.
    """
    rows = frame[(frame["direction"] == RESTORE) & frame["position"].notna()]
    rows = rows[rows["metric"] == main_metric(frame, "restored")].copy()
    rows["estimated_on"] = rows["estimated_on"].astype(str)
    rows["preferred"] = (rows["estimated_on"] != BOTH).astype(int)
    keys = [rows[name].astype(object).where(rows[name].notna(), "") for name in ("component", "layer", "role")]
    rows["key"] = list(zip(*keys, strict=True))
    rows = rows.sort_values(["preferred", "position", "estimated_on"], kind="stable").drop_duplicates("key")
    rows["significant"] = rows["low"] > 0
    return rows.drop(columns=["preferred", "key"])


def importance(frame: pd.DataFrame) -> dict[str, float]:
    """Return the estimated recovery from undoing the mask of each matrix, by ``BLOCK.ROLE``.

    Where a mask was patched exactly, that is what counts: on the half or halves that did not choose it, or on all
    questions if it was drawn at random. For all others it is the gradients' estimate, averaged over the halves and
    scaled by the slope of exact on estimated effects of the masks that have both, since gradients exaggerate.
    """
    rows = frame[(frame["component"] == "weights") & (frame["direction"] == RESTORE)].copy()
    if not len(rows):
        return {}
    rows["name"] = [f"{row['layer']:.0f}.{row['role']}" for row in rows.to_dict("records")]
    rows["estimated_on"] = rows["estimated_on"].astype(str)
    lost = frame[(frame["component"] == EVERYTHING) & (frame["metric"].isin(["margin_lost", "loss_added"]))]
    lost = lost[(lost["estimated_on"] == EVERY) & (lost["metric"] == lost["metric"].iloc[0])]["value"].iloc[0]
    attributed = rows[(rows["metric"] == "attributed_restored") & rows["estimated_on"].isin(HALVES)]
    exact = rows[rows["metric"] == main_metric(frame, "restored")]
    whole = exact[exact["estimated_on"] == EVERY].set_index("name")["value"]
    swapped = exact[exact["estimated_on"].isin(HALVES) & exact["position"].notna()].groupby("name")["value"].mean()
    random = exact[(exact["sample"] == RANDOM_SAMPLE) & (exact["estimated_on"] == EVERY)].set_index("name")["value"]
    estimated = attributed.groupby("name", sort=False)["value"].mean()
    known = estimated.reindex(whole.index)
    power = float((known**2).sum())
    slope = max(float((known * whole).sum()) / power, 0.0) if power else 1.0
    found = (slope * estimated).to_dict() | random.to_dict() | swapped.to_dict()
    return {name: float(found[name]) / float(lost) for name in estimated.index}
