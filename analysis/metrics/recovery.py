"""Diagnosis: which components of a pruned model recover the drop when they are restored.

Gradients estimate all components in one pass; those ranked highest are then patched exactly (:mod:`probes.patching`).
Causes are chosen on one half of the questions and estimated on the other, and the halves are swapped
(:mod:`analysis.metrics.halves`); beside them stand random controls (:mod:`analysis.metrics.controls`), which are never
named as causes. Recovery is the share of the drop that restoring a component brings back. Without a significant drop
there is nothing to explain, and no causes are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from probes import Session
from probes.patching import (
    COUNTED,
    DAMAGE,
    RESTORE,
    Component,
    DamagedModel,
    Direction,
    Patched,
    Positions,
    attribute,
    patch,
)
from probes.reading import Progress
from probes.scoring import ChoiceScores, Question
from pruning.errors import StudyError
from pruning.projections import Key

from .added import AGNOSTIC_ADDED, Added, added
from .components import AT_TOKENS, components_of
from .drop import Drop
from .halves import HALVES, OTHER, halves
from .recovery_frame import EVERYTHING, importance, main_metric, recovery_frame
from .together import MaskGroup, mask_groups, together_rows

__all__ = [
    "CONFIRMED",
    "EVERYTHING",
    "SAMPLED",
    "Asked",
    "Confirmation",
    "components_of",
    "diagnose",
    "importance",
    "main_metric",
    "recovery_frame",
    "to_confirm",
]

#: Causes chosen on each half and patched exactly.
CONFIRMED = 20
#: Components of each of these kinds that are drawn at random and patched exactly too, to see how well gradients do.
SAMPLED = 8
_SAMPLED_KINDS = ("weights", "output", "head")
#: What blocks add to the damage of the agnostic part: how many each half chooses beside the other causes.
ADDED = 2
#: Kinds that may be named as causes, in the order in which equals are ranked. What restoring the whole stream, or
#: nearly all of it, recovers after a block says where the damage has accumulated, not what caused it; so of the
#: agnostic part it is what a single block adds. Controls never are causes.
CAUSES = ("weights", "neurons", "head", "specific", "output", AGNOSTIC_ADDED)
#: Kinds that are what causes are compared with.
CONTROLS = ("random", "random_neurons")
#: Kinds that are patched exactly after every block, as curves.
_CURVES = ("residual", "agnostic", "specific", *AT_TOKENS)


@dataclass(frozen=True)
class Asked:
    """What is scored, and which questions are resampled together.

    Attributes
    ----------
    task, category, language
        As in frames.
    questions
        Items, or segments of text.
    templates
        Of each question: what it was made after, its minimal pair, or itself; questions of one template are never split
        and are resampled together.
    strata
        Of each question: what both halves should have alike (:func:`analysis.metrics.halves.item_strata`).
    """

    task: str
    category: str
    language: str
    questions: Sequence[Question]
    templates: Sequence[str]
    strata: Sequence[str] = ()

    @cached_property
    def halves(self) -> dict[str, list[int]]:
        """The questions of either half.

        Raises
        ------
        StudyError
            If all questions are of one template.
        """
        half = halves(self.templates, self.strata)
        if len(set(half.tolist())) < 2:
            raise StudyError("questions of one template cannot be split into halves; a diagnosis needs several")
        return {name: np.flatnonzero(half == i).tolist() for i, name in enumerate(HALVES)}

    def half(self, name: str) -> list[Question]:
        """Return the questions of one half."""
        return [self.questions[i] for i in self.halves[name]]

    def drop(self, estimates: Mapping[str, Patched]) -> Drop:
        """Return the drop, from the scores that attribution on either half came with."""
        dense, pruned = ({half: getattr(estimates[half], name) for half in HALVES} for name in ("dense", "pruned"))
        return Drop(self.questions, self.templates, self.strata, self.joined(dense), self.joined(pruned))

    def joined(self, parts: Mapping[str, ChoiceScores]) -> ChoiceScores:
        """Return the scores of all questions from those of either half."""
        width = max(part.values.shape[1] for part in parts.values())
        values = np.full((len(self.questions), width), -np.inf)
        answers = np.zeros(len(self.questions), dtype=np.int64)
        for half, part in parts.items():
            values[self.halves[half], : part.values.shape[1]] = part.values
            answers[self.halves[half]] = part.answers
        return ChoiceScores(values, answers)


@dataclass(frozen=True)
class Confirmation:
    """What is to be patched exactly.

    Attributes
    ----------
    chosen
        Half to the causes that it chose, by attribution. What blocks add (:func:`analysis.metrics.added.added`) is
        numbered after the components.
    sampled
        Components drawn at random.
    exact
        Direction to all components to patch; empty if there is no significant drop.
    together
        Half to the masks that it chose to be undone together, on the other half; empty likewise.
    """

    chosen: Mapping[str, Sequence[int]]
    sampled: Sequence[int]
    exact: Mapping[Direction, Sequence[int]]
    together: Mapping[str, Sequence[MaskGroup]]


def diagnose(
    session: Session,
    damage: DamagedModel,
    asked: Asked,
    components: Sequence[Component],
    columns: Mapping[str, Any],
    *,
    confirm: int = CONFIRMED,
    sample: int = SAMPLED,
    positions: Positions = COUNTED,
    errors: Sequence[np.ndarray] | None = None,
    progress: Progress = lambda tokens: None,
) -> pd.DataFrame:
    """Return the frame ``recovery``: the drop, and what each component recovers of it.

    All components are estimated by attribution, on either half of the questions. The curves over the blocks, the groups
    of neurons, a random sample and the causes that either half ranks highest are then patched exactly; the causes also
    the other way round (direction ``damage``: the dense model is corrupted with the pruned one's values). Causes have a
    ``position`` by what they restore on the half that chose them, 1 for the most, beside what they restore on the
    other.

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
        How many causes each half chooses.
    sample
        How many masks, and how many outputs, are drawn at random and patched exactly too.
    positions
        Tokens whose activations are patched.
    errors
        As for :func:`components_of`, to state how well random subspaces match.
    progress
        Told of the tokens as they are read.
    """
    estimates = {
        half: attribute(session, asked.half(half), damage, components, positions=positions, progress=progress)
        for half in HALVES
    }
    plan = to_confirm(asked, components, estimates, confirm, sample)
    exact = {}
    for direction, chosen in plan.exact.items():
        some = [components[i] for i in chosen]
        found = patch(
            session, asked.questions, damage, some, direction=direction, positions=positions, progress=progress
        )
        exact[direction] = {i: found.exact[k] for k, i in enumerate(chosen)}
    together: dict[str, dict[str, ChoiceScores]] = {}
    for half, sets in plan.together.items():
        masks = [one.component for one in sets]
        found = patch(session, asked.half(OTHER[half]), damage, masks, positions=positions, progress=progress)
        together[half] = {one.name: found.exact[k] for k, one in enumerate(sets)}
    weights = {key: damage.numel(key) for key in damage.projections}
    return collect(asked, components, columns, estimates, exact, plan, together, weights, errors)


def to_confirm(
    asked: Asked,
    components: Sequence[Component],
    estimates: Mapping[str, Patched],
    confirm: int = CONFIRMED,
    sample: int = SAMPLED,
    *,
    seed: int = 0,
) -> Confirmation:
    """Return what is to be patched exactly in which direction; nothing if there is no significant drop.

    Parameters
    ----------
    asked, components, confirm, sample
        As for :func:`diagnose`.
    estimates
        Half to what :func:`probes.attribute` found on it.
    seed
        Of the random sample.
    """
    if not asked.drop(estimates).significant()[0]:
        return Confirmation({half: [] for half in HALVES}, [], {}, {})
    additions = added(components)
    chosen = {}
    layers: set[int | None] = set()
    together = {}
    for half in HALVES:
        effects = {i: float(effect.sum()) for i, effect in estimates[half].attributed.items()}
        together[half] = mask_groups(components, effects, seed=seed)
        causes = [i for i, component in enumerate(components) if component.kind in CAUSES]
        chosen[half] = _likeliest(components, sorted(causes, key=lambda i: -effects[i]), confirm)
        # a gated neuron of which neither factor is left has no gradient, and its effect is known exactly anyway
        chosen[half] += [i for i in causes if components[i].kind == "neurons" and i not in chosen[half]]
        most = sorted(range(len(additions)), key=lambda k: -additions[k].rank_by(effects))[:ADDED]
        chosen[half] += [len(components) + k for k in most]
        layers |= {additions[k].layer for k in most[:1]}
        specific = [i for i in causes if components[i].kind == "specific"]
        if specific:
            layers.add(components[max(specific, key=effects.__getitem__)].layer)
    rng = np.random.default_rng(seed)
    sampled: list[int] = []
    for kind in _SAMPLED_KINDS:
        own = [i for i, component in enumerate(components) if component.kind == kind]
        sampled += [own[k] for k in rng.permutation(len(own))[:sample]]
    fixed = {
        i
        for i, c in enumerate(components)
        if c.kind in (*_CURVES, "neurons", "random_neurons") or (c.kind == "random" and c.layer in layers)
    }
    likeliest = {i for half in HALVES for i in _patched_for(chosen[half], len(components), additions)}
    exact: dict[Direction, list[int]] = {RESTORE: sorted(likeliest | fixed | set(sampled)), DAMAGE: sorted(likeliest)}
    return Confirmation(chosen, sorted(sampled), exact, together)


def collect(
    asked: Asked,
    components: Sequence[Component],
    columns: Mapping[str, Any],
    estimates: Mapping[str, Patched],
    exact: Mapping[Direction, Mapping[int, ChoiceScores]],
    plan: Confirmation,
    together: Mapping[str, Mapping[str, ChoiceScores]],
    weights: Mapping[Key, int],
    errors: Sequence[np.ndarray] | None = None,
) -> pd.DataFrame:
    """Return the frame ``recovery`` of what attribution and exact patching found.

    Parameters
    ----------
    asked, components, columns, estimates, errors
        As for :func:`diagnose` and :func:`to_confirm`.
    exact
        Direction to the scores with each component of the plan patched.
    plan
        From :func:`to_confirm`.
    together
        Half that chose masks to the name of each set of them and the scores of the other half's questions with it
        undone.
    weights
        Number of weights of each projection that was pruned.
    """
    place = {**columns, "language": asked.language, "task": asked.task, "category": asked.category}
    effects = {half: {i: float(e.sum()) for i, e in estimates[half].attributed.items()} for half in HALVES}
    drop = asked.drop(estimates)
    alone = {
        components[i].weights[0]: scores
        for i, scores in exact.get(RESTORE, {}).items()
        if components[i].kind == "weights"
    }
    joined = {
        one.name: asked.joined({OTHER[half]: together[half][one.name] for half in HALVES})
        for one in plan.together.get(HALVES[0], ())
    }
    return recovery_frame(
        place,
        drop,
        components,
        added(components),
        effects,
        exact,
        plan.chosen,
        plan.sampled,
        CAUSES,
        _CURVES,
        errors,
        together_rows(drop, plan.together, joined, alone, weights),
    )


def _patched_for(chosen: Sequence[int], components: int, additions: Sequence[Added]) -> set[int]:
    """Return the components to patch so that the effect of what was chosen is known."""
    own = {i for i in chosen if i < components}
    return own.union(*(additions[i - components].needs for i in chosen if i >= components))


def _likeliest(components: Sequence[Component], causes: Sequence[int], confirm: int) -> list[int]:
    """Choose half of them among the masks: which mask caused the drop, and where it shows, are two questions."""
    masks = [i for i in causes if components[i].kind == "weights"][: confirm // 2]
    others = [i for i in causes if components[i].kind != "weights"][: confirm - len(masks)]
    return [*masks, *others]
