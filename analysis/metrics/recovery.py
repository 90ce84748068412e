"""Diagnosis: which components of a pruned model recover the drop when they are restored.

Gradients rank all components in one pass; those ranked highest are then patched exactly (:mod:`probes.patching`).
Recovery is the share of the drop that restoring a component brings back, with an interval over items. Without a
significant drop there is nothing to explain, and no causes are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from probes import Session
from probes.patching import (
    DAMAGE,
    RESTORE,
    Component,
    DamagedModel,
    Direction,
    Patched,
    attribute,
    neurons,
    patch,
    residual,
    role_output,
    role_weights,
    stream_part,
)
from probes.reading import Progress
from probes.scoring import ChoiceScores, Question
from pruning.models.anatomy import Anatomy

from ..frames import tidy
from ..stats.bootstrap import segment_interval
from .lsar import LSAR

#: Components that are patched exactly besides the curves.
CONFIRMED = 20
#: Kinds that may be named as causes: each is a small part of the model. What restoring the whole stream, or nearly all
#: of it, recovers after a block says where the damage has accumulated, not what caused it.
_CAUSES = ("weights", "output", "specific", "neurons", "random_neurons")
#: Kinds that are drawn as curves over the blocks.
_CURVES = ("residual", "agnostic", "specific", "random")
#: Component of the rows on the drop itself.
EVERYTHING = "everything"


@dataclass(frozen=True)
class Asked:
    """What is scored, and which questions are resampled together.

    Attributes
    ----------
    task, category, language
        As in frames.
    questions
        Items, or segments of text.
    twins
        Of each question: the name of its minimal pair; questions of one name are resampled together.
    """

    task: str
    category: str
    language: str
    questions: Sequence[Question]
    twins: Sequence[str]


def components_of(
    anatomy: Anatomy,
    projections: Sequence[tuple[int, str]],
    subspaces: Sequence[LSAR],
    language_neurons: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
) -> list[Component]:
    """Return the components that a diagnosis examines.

    Parameters
    ----------
    anatomy
        Of the model.
    projections
        Those that were pruned.
    subspaces
        The language-specific subspace after each block (:func:`analysis.metrics.lsar.fit_layers`); beside each its
        complement, and as a control a random subspace of the same rank inside that complement.
    language_neurons
        Neurons that are specific to the language (LAPE), by block; beside them as many random ones of the same blocks.
    seed
        Of the random subspaces and neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Component] = [role_weights(*key) for key in projections]
    found += [role_output(layer, role) for layer, role in anatomy if role in anatomy.sites(layer)]
    for layer, subspace in enumerate(subspaces):
        basis = torch.from_numpy(subspace.basis_).float()
        drawn = torch.randn(basis.shape, generator=generator)
        control = torch.linalg.qr(drawn - basis @ (basis.T @ drawn))[0]
        found.append(residual(layer))
        found.append(stream_part("specific", layer, basis))
        found.append(stream_part("agnostic", layer, basis, outside=True))
        found.append(stream_part("random", layer, control))
    chosen = {layer: torch.tensor(sorted(own)) for layer, own in (language_neurons or {}).items() if len(own)}
    if chosen:
        width = anatomy.n_neurons
        others = {}
        for layer, own in chosen.items():
            rest = torch.tensor(sorted(set(range(width)) - set(own.tolist())))
            others[layer] = rest[torch.randperm(len(rest), generator=generator)[: len(own)]].sort().values
        found.append(neurons("neurons", anatomy, chosen))
        found.append(neurons("random_neurons", anatomy, others))
    return found


def diagnose(
    session: Session,
    damage: DamagedModel,
    asked: Asked,
    components: Sequence[Component],
    columns: Mapping[str, Any],
    *,
    confirm: int = CONFIRMED,
    progress: Progress = lambda tokens: None,
) -> pd.DataFrame:
    """Return the frame ``recovery``: the drop, and the share of it that each component recovers.

    All components are estimated by attribution. The curves over the blocks, the groups of neurons and the `confirm`
    most likely causes are then patched exactly; the causes also the other way round (direction ``damage``: the dense
    model is corrupted with the pruned one's values, as a share of the same drop). Causes have a ``position``, 1 for the
    one that recovers most.

    Parameters
    ----------
    session
        Of the dense model.
    damage
        The pruned model.
    asked
        What is scored.
    components
        As from :func:`components_of`.
    columns
        That describe the pruned model.
    confirm
        How many causes are confirmed exactly.
    progress
        Told of the tokens as they are read.
    """
    estimate = attribute(session, asked.questions, damage, components, progress=progress)
    exact = {}
    for direction, chosen in to_confirm(asked, components, estimate, confirm).items():
        some = [components[i] for i in chosen]
        found = patch(session, asked.questions, damage, some, direction=direction, progress=progress)
        exact[direction] = {i: found.exact[k] for k, i in enumerate(chosen)}
    return recovery_frame(asked, components, columns, estimate, exact)


def to_confirm(
    asked: Asked, components: Sequence[Component], estimate: Patched, confirm: int = CONFIRMED
) -> dict[Direction, list[int]]:
    """Return which components are to be patched exactly in which direction; none if there is no significant drop.

    Parameters
    ----------
    asked, components
        As for :func:`diagnose`.
    estimate
        From :func:`probes.attribute`.
    confirm
        How many causes are confirmed.
    """
    drop = _Drop(asked, estimate)
    if not drop.significant:
        return {}
    shares = drop.shares(estimate)
    causes = [i for i, component in enumerate(components) if component.kind in _CAUSES]
    causes.sort(key=lambda i: -shares[i])
    likeliest = _likeliest(components, causes, confirm)
    curves = {i for i, c in enumerate(components) if c.kind in _CURVES or "neurons" in c.kind}
    return {RESTORE: sorted(likeliest | curves), DAMAGE: sorted(likeliest)}


def recovery_frame(
    asked: Asked,
    components: Sequence[Component],
    columns: Mapping[str, Any],
    estimate: Patched,
    exact: Mapping[Direction, Mapping[int, ChoiceScores]],
) -> pd.DataFrame:
    """Return the frame ``recovery`` of what attribution and exact patching found.

    Parameters
    ----------
    asked, components, columns
        As for :func:`diagnose`.
    estimate
        From :func:`probes.attribute`.
    exact
        Direction to the scores with each component patched, for those that :func:`to_confirm` names.
    """
    drop = _Drop(asked, estimate)
    place = {**columns, "language": asked.language, "task": asked.task, "category": asked.category}
    rows: list[dict[str, Any]] = [{**place, "component": EVERYTHING, **drop.lost()}]
    shares = drop.shares(estimate) if drop.significant else {}
    for direction, scores in exact.items():
        found = {i: drop.recovered(own, direction) for i, own in scores.items()}
        positions = _positions(components, found) if direction == RESTORE else {}
        for i, component in enumerate(components):
            own = {**place, "direction": direction, **_where(component), "position": positions.get(i)}
            if i in found:
                rows.append({**own, **found[i]})
            if direction == RESTORE:
                rows.append({**own, "metric": "attributed_recovery", "value": float(shares[i])})
    return tidy("recovery", rows)


def _likeliest(components: Sequence[Component], causes: Sequence[int], confirm: int) -> set[int]:
    """Choose half of them among the masks: which mask caused the drop, and where it shows, are two questions."""
    masks = [i for i in causes if components[i].kind == "weights"][: confirm // 2]
    others = [i for i in causes if components[i].kind != "weights"][: confirm - len(masks)]
    return {*masks, *others}


def _where(component: Component) -> dict[str, Any]:
    return {"component": component.kind, "layer": component.layer, "role": component.role}


def _positions(components: Sequence[Component], exact: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
    """Rank the causes by what they recover; among equals, the smaller and earlier component is first."""
    causes = [i for i in exact if components[i].kind in _CAUSES]
    causes.sort(
        key=lambda i: (
            -round(float(exact[i]["value"][0]), 4),
            _CAUSES.index(components[i].kind),
            components[i].layer if components[i].layer is not None else -1,
        )
    )
    return {i: position for position, i in enumerate(causes, start=1)}


class _Drop:
    """The drop in every metric, and shares of it, with intervals over minimal pairs."""

    def __init__(self, asked: Asked, scores: Patched) -> None:
        is_text = all(question.choices == 1 for question in asked.questions)
        names = list(dict.fromkeys(asked.twins))
        self.cluster = np.array([names.index(twin) for twin in asked.twins])
        self.clusters = len(names)
        self.metrics = ("loss",) if is_text else ("margin", "accuracy", "loss")
        self.dense, self.pruned = self._sums(scores.dense), self._sums(scores.pruned)
        self.size = np.bincount(self.cluster, minlength=self.clusters).astype(np.float64)
        self.n = len(asked.questions)
        change = self.dense - self.pruned
        self.total = float(change[:, 0].sum())
        _, low, _ = segment_interval(lambda weights: weights @ change, self.clusters)
        #: Whether the drop is significant.
        self.significant = bool(self.total > 0 and low[0] > 0)

    def _sums(self, scores: ChoiceScores) -> np.ndarray:
        """Return the sums of every metric, higher is better, by cluster: ``[clusters, metrics]``."""
        of = {"margin": scores.margin, "accuracy": scores.correct, "loss": scores.right}
        return np.stack([np.bincount(self.cluster, of[m], self.clusters) for m in self.metrics], axis=1)

    def shares(self, estimate: Patched) -> dict[int, float]:
        """Return the share of the drop that each component is estimated to recover."""
        return {i: float(effect.sum() / self.total) for i, effect in estimate.attributed.items()}

    def lost(self) -> dict[str, Any]:
        change = self.dense - self.pruned
        value, low, high = segment_interval(lambda w: (w @ change) / (w @ self.size)[..., None], self.clusters)
        names = {"margin": "margin_lost", "accuracy": "accuracy_lost", "loss": "loss_added"}
        return {"metric": [names[m] for m in self.metrics], "value": value, "low": low, "high": high, "n": self.n}

    def recovered(self, scores: ChoiceScores, direction: Direction) -> dict[str, Any]:
        """Return the share of every metric's drop that is recovered (or, in the other direction, caused)."""
        lost = self.dense - self.pruned
        got = self._sums(scores)
        change = got - self.pruned if direction == RESTORE else self.dense - got
        there = np.abs(lost.sum(axis=0)) > 1e-12
        metrics = [f"{m}_recovery" for m, kept in zip(self.metrics, there, strict=True) if kept]
        lost, change = lost[:, there], change[:, there]
        estimate = change.sum(axis=0) / lost.sum(axis=0)

        def share(weights: np.ndarray) -> np.ndarray:
            total = weights @ lost
            nothing = np.abs(total) < 1e-12  # such a draw says nothing, and counts as the estimate itself
            return np.where(nothing, estimate, (weights @ change) / np.where(nothing, 1.0, total))

        value, low, high = segment_interval(share, self.clusters)
        return {"metric": metrics, "value": value, "low": low, "high": high, "n": self.n}


def main_metric(frame: pd.DataFrame) -> str:
    """Return the metric that a diagnosis is ranked by: margin recovery, or loss recovery for text."""
    return "margin_recovery" if (frame["metric"] == "margin_recovery").any() else "loss_recovery"


def agreement(frame: pd.DataFrame) -> tuple[float, int, int]:
    """Return how attribution and exact patching agree: Spearman's ρ, the overlap of their top tens, and n."""
    restored = frame[frame["direction"] == RESTORE].copy()
    keys = ["component", "layer", "role"]
    restored[keys] = restored[keys].astype(object).where(restored[keys].notna(), "")
    both = restored.pivot_table(index=keys, columns="metric", values="value", observed=True, aggfunc="first")
    both = both[[main_metric(frame), "attributed_recovery"]].dropna()
    exact, estimate = both.iloc[:, 0], both.iloc[:, 1]
    rho = float(spearmanr(exact, estimate).statistic) if len(both) > 2 else float("nan")
    shared = set(exact.nlargest(10).index) & set(estimate.nlargest(10).index)
    return rho, len(shared), len(both)


def importance(frame: pd.DataFrame) -> dict[str, float]:
    """Return the estimated recovery from undoing the mask of each matrix, by ``BLOCK.ROLE``."""
    rows = frame[(frame["component"] == "weights") & (frame["metric"] == "attributed_recovery")]
    return {f"{row['layer']:.0f}.{row['role']}": float(row["value"]) for row in rows.to_dict("records")}
