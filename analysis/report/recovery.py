"""What a diagnosis found, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from probes.patching import RESTORE
from pruning.models.anatomy import EXPERTS, role_kind
from pruning.text.languages import language_name

from ..frames import labels
from ..metrics.added import AGNOSTIC_ADDED
from ..metrics.agreement import RANDOM, WHOLE, agreement
from ..metrics.halves import BOTH, EVERY, HALVES, OTHER
from ..metrics.recovery_frame import EVERYTHING, main_metric, named_causes
from ..metrics.together import RANDOM_TOGETHER, TOGETHER

_KINDS = {
    "weights": "weights",
    "output": "outputs",
    "head": "heads",
    "residual": "the whole residual stream",
    "specific": "the language-specific part",
    "agnostic": "the language-agnostic part",
}
_TOKENS = {
    "residual_differing": "at the words in which the prompts of a pair differ",
    "residual_last": "at the last token",
    "residual_elsewhere": "at all others",
}
#: Causes that are listed.
_LISTED = 3
#: Share of the drop that masks undone together are counted up to.
_HALF = 0.5


def diagnosis_findings(frame: pd.DataFrame) -> list[str]:
    """Say in plain sentences what a diagnosis found.

    Parameters
    ----------
    frame
        As from :func:`diagnose`: of one variant, language and category.
    """
    first = frame.iloc[0]
    what = labels.category_label(str(first["category"]))
    where = f"{what} in {language_name(str(first['language']))}"
    frame = frame.astype({"estimated_on": object})
    lost = frame[frame["component"] == EVERYTHING]
    sentences = [_lost_in_words(lost[lost["estimated_on"] == EVERY].set_index("metric"), where)]
    exact = frame[(frame["direction"] == RESTORE) & (frame["metric"] == main_metric(frame, "restored"))]
    if not len(exact):
        sentences.append("There is no drop to explain, so no causes are named.")
        return sentences
    shown = _Shown(frame)
    sentences += _without_shares(lost, shown)
    sentences += _stream_in_words(shown)
    sentences += _tokens_in_words(shown)
    sentences += _causes_in_words(frame, shown)
    sentences += _together_in_words(frame)
    sentences += _neurons_in_words(shown)
    sentences += _agreement_in_words(frame)
    return sentences


class _Shown:
    """What restoring components brings back: as a share where there is one, in nats elsewhere."""

    def __init__(self, frame: pd.DataFrame) -> None:
        restored = frame[frame["direction"] == RESTORE].copy()
        for name in ("component", "role", "metric"):
            restored[name] = restored[name].astype(object)
        restored["role"] = restored["role"].where(restored["role"].notna(), "")
        restored["estimated_on"] = restored["estimated_on"].where(restored["estimated_on"].notna(), "")
        restored["layer"] = restored["layer"].astype(float).fillna(-1)
        keys = ["metric", "component", "layer", "role", "estimated_on"]
        self.rows = restored.drop_duplicates(keys).set_index(keys).sort_index()
        self.share, self.nats = main_metric(frame, "recovery"), main_metric(frame, "restored")
        drops = frame[frame["metric"] == ("margin_lost" if self.nats == "margin_restored" else "loss_added")]
        self.lost = dict.fromkeys(HALVES, float("nan")) | drops.set_index("estimated_on")["value"].to_dict()

    def row(
        self, component: str, layer: Any = None, role: Any = None, on: str = EVERY, *, metric: str | None = None
    ) -> pd.Series | None:
        """Return value and interval of one estimate, by default the share, or nothing if it is not there."""
        metric = metric or self.share
        key = (metric, component, -1.0 if layer is None or pd.isna(layer) else float(layer), _name(role), on)
        return self.rows.loc[key] if key in self.rows.index else None

    def words(self, component: str, layer: Any = None, role: Any = None, on: str = EVERY) -> str:
        """Return an estimate in words."""
        row = self.row(component, layer, role, on)
        if row is not None:
            return f"{100 * row['value']:.0f} % {_interval(row, 100, 0)}".replace("-0 %", "0 %")
        row = self.row(component, layer, role, on, metric=self.nats)
        return "nothing" if row is None else f"{row['value']:+.2f} nats {_interval(row, 1, 2)}"

    def curve(self, component: str, on: str) -> pd.Series:
        """Return what is restored by block, in nats."""
        rows = self.rows.loc[[self.nats]].reset_index()
        rows = rows[(rows["component"] == component) & (rows["estimated_on"] == on)]
        return rows.set_index(rows["layer"].astype(int))["value"].sort_index()


def _name(role: Any) -> str:
    return "" if role is None or pd.isna(role) else str(role)


def _interval(row: Any, factor: int, digits: int) -> str:
    if not np.isfinite(row["low"]):
        return "(no interval)"
    low, high = (f"{factor * float(row[name]):.{digits}f}" for name in ("low", "high"))
    return f"[{low}, {high}]".replace("[-0,", "[0,").replace(" -0]", " 0]")


def _lost_in_words(lost: pd.DataFrame, where: str) -> str:
    metric = "margin_lost" if "margin_lost" in lost.index else "loss_added"
    row = lost.loc[metric]
    name = "the margin of the right choice" if metric == "margin_lost" else "the log-likelihood of a segment"
    if not (row["low"] > 0):
        interval = f"[{0 - row['high']:+.2f}, {0 - row['low']:+.2f}]" if np.isfinite(row["low"]) else "(no interval)"
        return (
            f"Pruning changed {name} ({where}, n = {row['n']:.0f}) by {0 - row['value']:+.2f} nats {interval}: "
            "no significant drop."
        )
    accuracy = ""
    if "accuracy_lost" in lost.index:
        change = lost.loc["accuracy_lost"]
        value, low, high = (100 * change[column] for column in ("value", "low", "high"))
        accuracy = f", and accuracy by {value:.1f} points [{low:.1f}, {high:.1f}]"
    return (
        f"Pruning lowers {name} by {row['value']:.2f} nats {_interval(row, 1, 2)} ({where}, n = {row['n']:.0f})"
        f"{accuracy}."
    )


def _without_shares(lost: pd.DataFrame, shown: _Shown) -> Iterator[str]:
    """Say on which half no share of the drop can be given."""
    metric = "margin_lost" if (lost["metric"] == "margin_lost").any() else "loss_added"
    for half in HALVES:
        row = lost[(lost["metric"] == metric) & (lost["estimated_on"] == half)]
        if len(row) and not (row["low"].iloc[0] > 0):
            own = row.iloc[0]
            yield (
                f"On the {half} half of the questions the drop is not significant ({own['value']:.2f} nats "
                f"{_interval(own, 1, 2)}, n = {own['n']:.0f}): what is restored there is given in nats, not as a share."
            )


def _stream_in_words(shown: _Shown) -> Iterator[str]:
    """Say by which block half of the drop comes back; the block is found on one half and its share on the other."""
    found = _half_back(shown)
    if not found:
        return
    said = [
        f"{shown.words('residual', layer, on=OTHER[half])} after block {layer} (on the {OTHER[half]} half)"
        for half, layer in found.items()
    ]
    yield (
        f"Restoring the whole residual stream recovers {' and '.join(said)}: after the first block that brings half of "
        "the drop back on the other half, or else the one that brings back most. Blocks are numbered from 0."
    )
    for layer in dict.fromkeys(found.values()):
        agnostic, specific = (shown.words(part, layer) for part in ("agnostic", "specific"))
        yield (
            f"After block {layer}, restoring the language-agnostic part alone recovers {agnostic}, the "
            f"language-specific part {specific}{_beside_controls(shown, layer)}."
        )
    compared = [layer for layer in _control_layers(shown) if layer not in found.values()]
    for layer in compared:
        yield (
            f"After block {layer}, where random subspaces were patched too, restoring the language-specific part "
            f"recovers {shown.words('specific', layer)}{_beside_controls(shown, layer)}."
        )


def _half_back(shown: _Shown) -> dict[str, int]:
    """Return the first block after which the whole stream restores half of the drop, or else most, by half."""
    found: dict[str, int] = {}
    for half in HALVES:
        curve, drop = shown.curve("residual", half), shown.lost[half]
        if len(curve) and drop > 0:
            reached = curve[curve >= drop / 2]
            found[half] = int(reached.index.min()) if len(reached) else int(curve.idxmax())
    return found


def _tokens_in_words(shown: _Shown) -> Iterator[str]:
    """Say what is restored at which tokens of minimal pairs, and from which block on it is at the last one."""
    for layer in dict.fromkeys(_half_back(shown).values()):
        there = {kind: words for kind, words in _TOKENS.items() if layer in shown.curve(kind, EVERY)}
        if there:
            said = ", ".join(f"{words} {shown.words(kind, layer)}" for kind, words in there.items())
            yield f"After block {layer}, restoring the stream at some tokens alone recovers: {said}."
    from_here = {}
    for half in HALVES:
        curves = pd.DataFrame({kind: shown.curve(kind, half) for kind in _TOKENS}).dropna()
        before = curves.index[curves["residual_differing"] >= curves["residual_last"]]
        later = curves.index if not len(before) else curves.index[curves.index > before.max()]
        if len(later):
            from_here[half] = int(later.min())
    if len(from_here) == len(HALVES):
        first, second = from_here.values()
        where = (
            f"after block {first} on either half of the questions"
            if first == second
            else f"after block {first} on the first half of the questions and after block {second} on the second"
        )
        yield f"The last token alone recovers more than the differing words {where}, and after every later block."


def _control_layers(shown: _Shown) -> list[int]:
    rows = shown.rows.reset_index()
    rows = rows[(rows["component"] == "random") & (rows["metric"] == shown.nats) & (rows["estimated_on"] == EVERY)]
    return rows["layer"].astype(int).tolist()


def _beside_controls(shown: _Shown, layer: int) -> str:
    """Return what random subspaces recover, if they were patched exactly after this block."""
    row = shown.row("random", layer)
    if row is None:
        return ""
    ratio = shown.row("random", layer, on="", metric="error_ratio")
    matched = "of the same rank"
    if ratio is not None:
        matched += f", with {ratio['value']:.2f} times its pruning error,"
    low, high = (f"{100 * row[name]:.0f}".replace("-0", "0") for name in ("low", "high"))
    return f", {row['n']:.0f} random subspaces {matched} between {low} and {high} %"


def _causes_in_words(frame: pd.DataFrame, shown: _Shown) -> Iterator[str]:
    """Name the components that either half chose, by what they recover on the other."""
    ranked = frame[(frame["direction"] == RESTORE) & frame["position"].notna() & (frame["metric"] == shown.nats)]
    for half in HALVES:
        rows = ranked[ranked["estimated_on"] == OTHER[half]].sort_values("position").head(_LISTED)
        if len(rows):
            listed = "; ".join(_cause(row, shown) for row in rows.to_dict("records"))
            yield f"Chosen on the {half} half of the questions, estimated on the {OTHER[half]}: {listed}."
    causes = named_causes(frame)
    shared = causes[(causes["estimated_on"] == BOTH) & causes["significant"]].sort_values("position").head(_LISTED)
    if len(shared):
        listed = "; ".join(_cause(row, shown) for row in shared.to_dict("records"))
        yield f"Chosen by both halves, average of both estimates: {listed}."
    else:
        yield (
            "No single component is chosen by both halves and recovers significantly, so none is named as the cause."
        )


def _cause(row: Mapping[Any, Any], shown: _Shown) -> str:
    return f"{describe(row)}, {shown.words(row['component'], row['layer'], row['role'], row['estimated_on'])}"


def _together_in_words(frame: pd.DataFrame) -> Iterator[str]:
    """Say how many masks have to be undone until half of the drop is back, and how many random ones."""
    rows = frame[frame["estimated_on"] == BOTH].astype({"component": object})
    rows = rows[rows["metric"] == main_metric(frame)]
    ranked, random = (rows[rows["component"] == kind].sort_values("masks") for kind in (TOGETHER, RANDOM_TOGETHER))
    if not len(ranked):
        return
    every = int(ranked["masks"].max())
    reached = ranked[ranked["value"] >= _HALF]
    first = (reached if len(reached) else ranked).iloc[0]
    at_random = random[random["value"] >= _HALF]
    beside = f"{int(at_random['masks'].iloc[0])} masks" if len(at_random) else f"more than {int(random['masks'].max())}"
    yield (
        f"Undone together on the half of the questions that did not rank them, {int(first['masks'])} of {every} "
        f"masks ({100 * first['weight_share']:.0f} % of the weights in all of these projections) recover "
        f"{100 * first['value']:.0f} % {_interval(first, 100, 0)} of the drop: the fewest, "
        f"of 1, 2, 4, …, that bring back half of it. With the same roles in random blocks it takes {beside}."
    )
    beyond = frame[(frame["metric"] == "beyond_sum") & (frame["estimated_on"] == BOTH)].sort_values("masks")
    beyond = beyond[beyond["masks"] > 1]
    if len(beyond):
        row = beyond.iloc[-1]
        yield (
            f"The first {int(row['masks'])} restore {row['value']:+.2f} nats {_interval(row, 1, 2)} beyond the sum of "
            "what each restores alone."
        )


def _neurons_in_words(shown: _Shown) -> Iterator[str]:
    row = shown.row("random_neurons")
    if row is not None:
        low, high = (f"{100 * row[name]:.0f}".replace("-0", "0") for name in ("low", "high"))
        yield (
            f"The language-specific neurons recover {shown.words('neurons')}, as many random neurons of the same "
            f"blocks that fire as often between {low} and {high} % ({row['n']:.0f} draws)."
        )


def _agreement_in_words(frame: pd.DataFrame) -> Iterator[str]:
    said = []
    for found in agreement(frame):
        over = "" if found.over == WHOLE else f" {found.over}"
        counted = f"{found.n} blocks" if found.over == WHOLE else f"n = {found.n}"
        top = f", {found.shared} of the first {found.top} shared" if found.over == RANDOM else ""
        said.append(
            f"{_KINDS[found.kind]}{over} ρ = {found.rho:.2f} [{found.low:.2f}, {found.high:.2f}] ({counted}{top})"
        )
    if said:
        yield (f"Attribution against exact patching (Spearman's ρ within one kind of component): {'; '.join(said)}.")


def describe(row: Mapping[Any, Any]) -> str:
    """Return a component in words."""
    layer = "" if pd.isna(row["layer"]) else f" in block {int(row['layer'])}"
    role = str(row["role"])
    if role == EXPERTS:
        role = "all experts together"
    elif role_kind(role) in ("expert", "head", "cross_head"):
        role = role.replace("cross_", "cross-attention ").replace(".", " ")
    return {
        "weights": f"the weights of {role}{layer}",
        "output": f"the output of {role}{layer}",
        "head": f"{role}{layer}",
        "specific": f"the language-specific part{layer.replace('in', 'after')}",
        "neurons": "the language-specific neurons",
        AGNOSTIC_ADDED: f"what{layer.removeprefix(' in')} does to the language-agnostic part",
    }.get(str(row["component"]), f"{row['component']}{layer}")
