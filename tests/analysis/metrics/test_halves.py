"""Halves of the questions share no template and are alike in kind."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from analysis.metrics.halves import halves, item_strata
from probes.items import Item


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=40))
def test_templates_stay_whole_and_halves_are_as_even_as_they_allow(drawn):
    templates = [f"t{number}/{kind}" for number, kind in drawn]
    strata = [f"k{kind}" for _, kind in drawn]
    half = halves(templates, strata)
    assert set(half.tolist()) <= {0, 1}
    for template in set(templates):
        assert len({int(own) for own, name in zip(half, templates, strict=True) if name == template}) == 1
    for stratum in set(strata):
        own = [i for i, name in enumerate(strata) if name == stratum]
        largest = max(templates.count(templates[i]) for i in own)
        assert abs(np.sum(half[own] == 0) - np.sum(half[own] == 1)) <= largest
    np.testing.assert_array_equal(half, halves(templates, strata))


def test_items_of_every_kind_and_grade_are_in_both_halves():
    items = [
        Item(id=f"{kind}{grade}{i}", template=f"{kind}{grade}{i // 3}", kind=kind, grade=grade, prompt="p",
             choices=("a", "b"), answer=0, category="reasoning")
        for kind in ("order", "quantity")
        for grade in (1, 2)
        for i in range(12)
    ]  # fmt: skip
    half = halves([item.template for item in items], item_strata(items))
    for kind in ("order", "quantity"):
        for grade in (1, 2):
            own = [half[i] for i, item in enumerate(items) if (item.kind, item.grade) == (kind, grade)]
            assert sorted(own) == [0] * 6 + [1] * 6
