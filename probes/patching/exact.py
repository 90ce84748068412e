"""Exact patching: one run of the model for each component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..scoring import Progress, Question, ScoreTable, final_states
from ..session import Session
from .components import Component, Place
from .damaged import DamagedModel
from .runs import COUNTED, DAMAGE, RESTORE, Direction, Patched, Positions, groups, patched_tokens, run, sites_of, turned


def patch(
    session: Session,
    questions: Sequence[Question],
    damage: DamagedModel,
    components: Sequence[Component],
    *,
    direction: Direction = RESTORE,
    positions: Positions = COUNTED,
    progress: Progress = lambda tokens: None,
) -> Patched:
    """Patch the components one at a time, and score the questions each time.

    Parameters
    ----------
    session
        The dense model's session.
    questions
        Questions to score.
    damage
        The pruned model.
    components
        What to patch.
    direction
        ``"restore"``: from the dense model into the pruned one; ``"damage"``: the reverse.
    positions
        Tokens whose activations are patched. All of them include the first one, whose states are by far the largest and
        which the subspaces are not fitted on.
    progress
        Called with the number of tokens read, after every batch of every run.
    """
    components = [component.on(session.anatomy.device) for component in components]
    sites = sites_of(place for component in components for place in component.places)
    dense, pruned = ScoreTable(questions), ScoreTable(questions)
    exact = [ScoreTable(questions) for _ in components]
    first, second = (dense, pruned) if direction == RESTORE else (pruned, dense)
    for group in groups(session, questions, sites):
        with turned(damage, direction == DAMAGE):
            kept = [run(session, batch, first, sites, progress) for batch in group]
        with turned(damage, direction == RESTORE):
            clean: list[dict[int, Any]] = [{} for _ in group]
            for batch, outputs in zip(group, clean, strict=True):
                run(session, batch, second, {}, progress, outputs)
            for component, scores in zip(components, exact, strict=True):
                with damage.with_weights(component.weights, dense=direction == RESTORE):
                    start = component.first_layer  # up to here, the run equals the clean one
                    for batch, values, outputs in zip(group, kept, clean, strict=True):
                        edits = [_Put(place, values[place.layer, place.site], positions) for place in component.places]
                        final = final_states(session, batch.batch, edits=edits, outputs=outputs, start=start)
                        scores.take(batch, batch.scores(session.anatomy, final))
                        progress(batch.batch.n_tokens)
    return Patched(dense.scores, pruned.scores, {i: table.scores for i, table in enumerate(exact)})


@dataclass(frozen=True, eq=False)
class _Put:
    """An edit that patches a site with the source run's values."""

    place: Place
    other: Tensor
    positions: Positions

    @property
    def layer(self) -> int:
        return self.place.layer

    @property
    def site(self) -> str:
        return self.place.site

    def change(self, value: Tensor, batch: Batch) -> Tensor:
        tokens = patched_tokens(batch, self.positions, self.place.tokens)
        return torch.where(tokens[..., None], self.place.put(value, self.other), value)
