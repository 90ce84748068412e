"""Whether an answer is kept in a form that languages share: states of one language put into questions of another.

An item of a minimal pair is asked in one language; at the last token of its prompt it is given the state that its
*twin*, which has the opposite answer, has there in another language (:func:`probes.patching.cross`). If the answer is
read off what both languages share, the margin moves all the way to that of the twin in the language asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from probes import Item
from probes.patching import Crossed
from probes.scoring import objective
from pruning.errors import StudyError
from pruning.files import whole_file

from ..frames import tidy
from ..stats.intervals import unit_interval

#: What each draw of :attr:`Crossing.patched` gets: its twin's state, and the control's.
_DRAWS = ("twin", "control")


@dataclass(frozen=True)
class Pairing:
    """The items of minimal pairs that are in both languages, and which items of the other language they get.

    Attributes
    ----------
    items, twins
        Places of the items asked, and of their twins, among the items of the language asked.
    sources, controls
        Places, among the items of the other language, of the twin, and of an item of another template that has the
        twin's answer.
    """

    items: Int[np.ndarray, " pairs"]
    twins: Int[np.ndarray, " pairs"]
    sources: Int[np.ndarray, " pairs"]
    controls: Int[np.ndarray, " pairs"]

    @classmethod
    def of(cls, items: Sequence[Item], others: Sequence[Item], *, seed: int = 0) -> Pairing:
        """Return the pairing of items with those of another language (or of the same one), by their ids.

        Items whose pair the other language does not have, with the same answers, are left out, and those for which
        there is no control.
        """
        pairs, there = defaultdict(list), {item.id: place for place, item in enumerate(others)}
        for place, item in enumerate(items):
            pairs[item.twin].append(place)
        found: list[tuple[int, int, int, int]] = []
        rng = np.random.default_rng(seed)
        for place, item in enumerate(items):
            twin = next((other for other in pairs[item.twin] if other != place), None)
            if twin is None or len(pairs[item.twin]) != 2 or not _opposite(item, items[twin]):
                continue
            if any(one.id not in there or others[there[one.id]].answer != one.answer for one in (item, items[twin])):
                continue
            answer = items[twin].answer
            alike = [i for i, other in enumerate(others) if other.template != item.template and other.answer == answer]
            if alike:
                found.append((place, twin, there[items[twin].id], int(rng.choice(alike))))
        return cls(*np.array(found, dtype=np.int64).reshape(-1, 4).T)


def _opposite(item: Item, twin: Item) -> bool:
    return item.choices == twin.choices and item.answer != twin.answer


@dataclass(frozen=True, eq=False)
class Crossing:
    """Margins of an item's answer, of one model, language asked, and language whose states are put in.

    Attributes
    ----------
    layers
        The blocks, int64 ``[layers]``.
    items
        Places of the items, int64 ``[items]``.
    own, twin
        Margin of the item's answer with its own prompt, and with that of its twin, float64 ``[items]``.
    patched
        The same with its own prompt and the states of the other language's twin, and of the control, float64
        ``[2, layers, items]``.
    """

    layers: np.ndarray
    items: np.ndarray
    own: np.ndarray
    twin: np.ndarray
    patched: np.ndarray

    @classmethod
    def of(cls, pairing: Pairing, crossed: Crossed, answers: Int[np.ndarray, " items"]) -> Crossing:
        """Return the margins, given the answers of all items asked and the scores of those of the pairing, in order."""
        own = answers[pairing.items]
        place = {item: k for k, item in enumerate(pairing.items.tolist())}
        of_twin = crossed.clean[[place[twin] for twin in pairing.twins.tolist()]]
        patched = [[_margins(scores, own) for scores in draw] for draw in crossed.patched]
        return cls(
            crossed.layers, pairing.items, _margins(crossed.clean, own), _margins(of_twin, own), np.array(patched)
        )

    def save(self, path: Path) -> None:
        """Write atomically as safetensors."""
        with whole_file(path) as partial:
            save_file({name: torch.from_numpy(values.copy()) for name, values in vars(self).items()}, partial)

    @classmethod
    def open(cls, path: Path) -> Crossing:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StudyError
            If the file is damaged.
        """
        try:
            return cls(**{name: values.numpy() for name, values in load_file(path).items()})
        except (SafetensorError, OSError, TypeError) as error:
            raise StudyError(f"{path} is damaged; delete it and run again") from error


def _margins(scores: Float[np.ndarray, "items choices"], answers: Int[np.ndarray, " items"]) -> np.ndarray:
    return objective(torch.from_numpy(scores), torch.from_numpy(answers)).numpy()


def crossing_frame(
    place: Mapping[str, Any],
    found: Mapping[tuple[str, str], Crossing],
    columns: Mapping[str, Mapping[str, Any]],
    templates: Sequence[str],
) -> pd.DataFrame:
    """Return the frame ``crossing``.

    Parameters
    ----------
    place
        Language, task and category that are asked.
    found
        ``(model, other language)`` to its margins.
    columns
        Model to the columns that describe it.
    templates
        Of each item asked; they are resampled.
    """
    rows = [
        {**columns[model], **place, "source_language": source, **row}
        for (model, source), crossing in found.items()
        for row in _rows(crossing, np.asarray(templates)[crossing.items])
    ]
    return tidy("crossing", rows)


def _rows(crossing: Crossing, templates: np.ndarray) -> Iterator[dict[str, Any]]:
    if not len(crossing.items):
        return
    names, unit = np.unique(templates, return_inverse=True)
    units = len(names)

    def summed(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((units, values.shape[0]))
        np.add.at(sums, unit, values.T)
        return sums

    size, swing = summed(np.ones((1, len(unit)))), summed((crossing.own - crossing.twin)[None])
    n = len(unit)
    whole = unit_interval(lambda weights: (weights @ swing) / (weights @ size), units)
    yield {"metric": "swing", **_values(whole, 0), "n": n}
    significant = whole[0][0] > 0 and whole[1][0] > 0
    for draw, patched in zip(_DRAWS, crossing.patched, strict=True):
        moved = summed(crossing.own - patched)

        def share(weights: np.ndarray, moved: np.ndarray = moved) -> np.ndarray:
            total = weights @ swing
            nothing = np.abs(total) < 1e-12  # such a draw says nothing, and counts as the estimate itself
            estimate = moved.sum(axis=0) / swing.sum()
            return np.where(nothing, estimate, (weights @ moved) / np.where(nothing, 1.0, total))

        def mean(weights: np.ndarray, moved: np.ndarray = moved) -> np.ndarray:
            result: np.ndarray = (weights @ moved) / (weights @ size)
            return result

        estimates = {f"{draw}_moved": unit_interval(mean, units)}
        if significant:
            estimates[f"{draw}_share"] = unit_interval(share, units)
        for metric, values in estimates.items():
            for k, layer in enumerate(crossing.layers.tolist()):
                yield {"layer": layer, "metric": metric, **_values(values, k), "n": n}


def _values(estimate: tuple[np.ndarray, np.ndarray, np.ndarray], k: int) -> dict[str, float]:
    return {name: float(part[k]) for name, part in zip(("value", "low", "high"), estimate, strict=True)}
