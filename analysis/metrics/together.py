"""How many masks have to be undone together until the drop is back, beside as many masks drawn at random.

Single masks recover little where the damage is spread. So the masks that gradients rank highest on one half of the
questions are undone together, the first 1, 2, 4, … of them, on the other half (:mod:`analysis.metrics.halves`). The
controls have the same roles, in blocks drawn at random, and so undo as many weights. What masks restore together beyond
the sum of what each restores alone is their interaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.patching import RESTORE, Component, Direction
from probes.scoring import ChoiceScores
from pruning.projections import Key

from .drop import Drop, Estimate
from .halves import BOTH, HALVES

#: Kinds of the rows: the masks that gradients rank highest, and those drawn at random.
TOGETHER, RANDOM_TOGETHER = "weights_together", "random_together"
#: Random draws of every number of masks.
DRAWS = 5


@dataclass(frozen=True)
class MaskGroup:
    """Masks that are undone together.

    Attributes
    ----------
    masks
        The projections, in the order in which they were taken.
    draw
        Number of the random draw; None of the masks that gradients rank highest.
    """

    masks: tuple[Key, ...]
    draw: int | None = None

    @property
    def name(self) -> str:
        """Its size and draw; unique among the sets of one half."""
        return f"{len(self.masks)}" if self.draw is None else f"{len(self.masks)}-draw-{self.draw}"

    @property
    def component(self) -> Component:
        """What is patched."""
        kind = TOGETHER if self.draw is None else RANDOM_TOGETHER
        return Component(kind, weights=self.masks, draw=self.draw)


def mask_groups(
    components: Sequence[Component], effects: Mapping[int, float], *, draws: int = DRAWS, seed: int = 0
) -> list[MaskGroup]:
    """Return the sets that one half of the questions chooses: 1, 2, 4, … and all masks, and the controls.

    Parameters
    ----------
    components
        As for :func:`analysis.metrics.recovery.diagnose`; its masks are those of kind ``weights``.
    effects
        Number of the component to the effect that gradients estimate on this half.
    draws, seed
        Of the controls.
    """
    masks = [i for i, component in enumerate(components) if component.kind == "weights"]
    ranked = [components[i].weights[0] for i in sorted(masks, key=lambda i: -effects[i])]
    if len(ranked) < 2:
        return []
    sizes = [2**power for power in range(len(ranked).bit_length()) if 2**power < len(ranked)]
    found = [MaskGroup(tuple(ranked[:size])) for size in (*sizes, len(ranked))]
    rng = np.random.default_rng(seed)
    for draw in range(draws):
        drawn = _other_blocks(ranked, rng)
        found += [MaskGroup(tuple(drawn[:size]), draw) for size in sizes]
    return found


def _other_blocks(ranked: Sequence[Key], rng: np.random.Generator) -> list[Key]:
    """Return the same roles in the same order, each in a block drawn at random."""
    blocks: dict[str, list[int]] = {}
    for layer, role in ranked:
        blocks.setdefault(role, []).append(layer)
    left = {role: [own[i] for i in rng.permutation(len(own))] for role, own in blocks.items()}
    return [(left[role].pop(), role) for _, role in ranked]


def together_rows(
    drop: Drop,
    sets: Mapping[str, Sequence[MaskGroup]],
    scores: Mapping[str, ChoiceScores],
    alone: Mapping[Key, ChoiceScores],
    weights: Mapping[Key, int],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the frame ``recovery`` on masks that are undone together.

    Parameters
    ----------
    drop
        What was lost.
    sets
        Half to the sets that it chose.
    scores
        Name of a set to the scores of all questions, each half's with the set that the other one chose.
    alone
        Mask to the scores with it alone undone, as far as they are known.
    weights
        Number of weights of each projection.
    """
    named = {half: {one.name: one for one in own} for half, own in sets.items()}
    whole = sum(weights.values())
    controls: dict[int, list[str]] = {}
    for name in scores:
        one = named[HALVES[0]][name]
        if one.draw is not None:
            controls.setdefault(len(one.masks), []).append(name)
            continue
        yield from _rows(drop, scores[name], {"component": TOGETHER, **_size(named, name, weights, whole)})
        if all(mask in alone for half in HALVES for mask in named[half][name].masks):
            each = {half: [alone[mask] for mask in named[half][name].masks] for half in HALVES}
            beyond = drop.beyond_sum(scores[name], each)
            place = {"component": TOGETHER, **_size(named, name, weights, whole)}
            for on, found in beyond.items():
                values = {key: float(part[0, 0]) for key, part in found._asdict().items()}
                yield {**place, "estimated_on": on, "metric": "beyond_sum", **values, "n": drop.n(on)}
    for names in controls.values():
        yield from _ranges(drop, [scores[name] for name in names], _size(named, names[0], weights, whole))


def _size(
    named: Mapping[str, Mapping[str, MaskGroup]], name: str, weights: Mapping[Key, int], whole: int
) -> dict[str, Any]:
    """Return how many masks a set has, and which share of the weights; the mean over both halves."""
    own = [sum(weights[mask] for mask in named[half][name].masks) for half in HALVES]
    return {"masks": len(named[HALVES[0]][name].masks), "weight_share": sum(own) / len(own) / whole}


def _rows(drop: Drop, scores: ChoiceScores, place: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for on in (*HALVES, BOTH):
        for metric, value, estimate in _estimates(drop, [scores], RESTORE, on):
            own = {key: float(part[0, value]) for key, part in estimate._asdict().items()}
            yield {**place, "direction": RESTORE, "estimated_on": on, "metric": metric, **own, "n": drop.n(on)}


def _ranges(drop: Drop, scores: Sequence[ChoiceScores], size: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield mean and range over the draws of a control."""
    for on in (*HALVES, BOTH):
        for metric, value, estimate in _estimates(drop, scores, RESTORE, on):
            own = estimate.value[:, value]
            found = {"value": float(own.mean()), "low": float(own.min()), "high": float(own.max()), "n": len(own)}
            place = {"component": RANDOM_TOGETHER, **size, "direction": RESTORE, "estimated_on": on}
            yield {**place, "metric": metric, **found}


def _estimates(
    drop: Drop, scores: Sequence[ChoiceScores], direction: Direction, on: str
) -> Iterator[tuple[str, int, Estimate]]:
    """Yield metric, its number and what is restored of it, and as a share where there is one."""
    for suffix, found in (
        ("restored", drop.restored(scores, direction, on)),
        ("recovery", drop.recovered(scores, direction, on)),
    ):
        for number, metric in enumerate(drop.metrics):
            if np.isfinite(found.value[:, number]).all():
                yield f"{metric}_{suffix}", number, found
