"""Two halves of the questions: what is chosen on one is estimated on the other (Kriegeskorte et al. 2009).

The questions on which a component looks best flatter it. So causes are chosen on one half and their effect is estimated
on the other; then the halves are swapped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from probes.items import Item

#: Values of ``estimated_on``: all questions, one half (what was chosen on the other), or the average of both halves.
EVERY, FIRST, SECOND, BOTH = "all", "first", "second", "both"
HALVES = (FIRST, SECOND)
#: Half to the other one.
OTHER = {FIRST: SECOND, SECOND: FIRST}


def halves(templates: Sequence[str], strata: Sequence[str] = ()) -> Int[np.ndarray, " questions"]:
    """Return the half, 0 or 1, that each question is in.

    Templates are never split, and each stratum is spread over both halves as evenly as its templates allow. The same
    questions are always split in the same way.

    Parameters
    ----------
    templates
        Of each question.
    strata
        Of each question: what should be in both halves, such as its kind and grade.

    Examples
    --------
    >>> halves(["a", "a", "b", "b", "c", "d"], ["x", "x", "x", "x", "y", "y"]).tolist()
    [0, 0, 1, 1, 0, 1]
    """
    strata = strata or [""] * len(templates)
    names, of = np.unique(list(templates), return_inverse=True)
    first = {name: list(templates).index(name) for name in names.tolist()}
    sizes = np.bincount(of, minlength=len(names))
    order = sorted(range(len(names)), key=lambda i: (strata[first[names[i]]], -sizes[i], first[names[i]]))
    half = np.zeros(len(names), dtype=np.int64)
    total = np.zeros(2)
    of_stratum: dict[str, np.ndarray] = {}
    for i in order:
        own = of_stratum.setdefault(strata[first[names[i]]], np.zeros(2))
        half[i] = min((0, 1), key=lambda h: (own[h], total[h], h))
        own[half[i]] += sizes[i]
        total[half[i]] += sizes[i]
    return half[of]


def item_strata(items: Sequence[Item]) -> list[str]:
    """Return what is spread over both halves: category, kind and grade."""
    return [f"{item.category}/{item.kind}/{item.grade}" for item in items]
