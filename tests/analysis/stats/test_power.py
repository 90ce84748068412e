"""Power that is predicted is the power that studies have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, ttest_ind

from analysis.stats.permutation import pairings, pairings_of_many
from analysis.stats.power import Components, power, simulate


def components(*, sets=4, blocks=1, draws=0.1, unit=0.5, unit_by_set=0.3, residual=0.3, shared=0.0):
    covariance = draws**2 * ((1 - shared) * np.eye(blocks) + shared)
    return Components(sets, covariance, unit**2, unit_by_set**2, residual**2, sets, covariance, 100)


def test_components_are_those_that_a_study_was_made_with():
    truth = components(sets=8, blocks=3, shared=0.7)
    (study,) = [[[of[0] for of in own] for own in simulate(truth, 40, 400, 1, np.random.default_rng(0), blocks=3)]]
    found = Components.of(study)
    np.testing.assert_allclose(found.draws, truth.draws, atol=0.0025)
    for name in ("unit", "unit_by_set", "residual"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.15)
    assert found.df == 8 * 39
    assert (np.diag(found.at_upper_limit().draws) > np.diag(found.draws)).all()


def test_few_draws_leave_open_how_much_draws_vary():
    few, many = (
        Components.of(
            [[of[0] for of in own] for own in simulate(components(), n, 50, 1, np.random.default_rng(1), blocks=1)]
        )
        for n in (2, 30)
    )
    assert few.at_upper_limit().draws[0, 0] > 1.7 * few.draws[0, 0] or few.draws[0, 0] == 0
    assert many.at_upper_limit().draws[0, 0] < 1.3 * many.draws[0, 0]


def test_one_draw_of_every_set_is_refused():
    with pytest.raises(ValueError, match="no set was drawn twice"):
        Components.of([[np.zeros((1, 10))], [np.ones((1, 10))]])


@pytest.mark.parametrize("comparison", ["sets", "category"])
def test_without_an_effect_it_is_the_level_of_the_test(comparison):
    found = power(components(blocks=2), comparison, 0.0, draws=3, units=30, runs=1500)
    assert found == pytest.approx(0.05, abs=0.02)


def test_where_only_draws_vary_it_is_that_of_a_t_test():
    only = components(sets=2, draws=0.1, unit_by_set=0.0, residual=1e-4)
    rng = np.random.default_rng(2)
    direct = [
        ttest_ind(0.2 + 0.1 * rng.normal(size=4), 0.1 * rng.normal(size=4), equal_var=False).pvalue < 0.05
        for _ in range(800)
    ]
    assert power(only, "sets", 0.2, draws=4, units=10) == pytest.approx(np.mean(direct), abs=0.06)


def test_where_only_segments_vary_it_is_that_of_their_number():
    only = components(sets=8, draws=0.0, unit_by_set=0.3, residual=1e-3)
    error = 0.3 * np.sqrt(2 / 100)
    assert power(only, "sets", 0.1, draws=2, units=100) == pytest.approx(norm.sf(1.96 - 0.1 / error), abs=0.06)


def test_segments_cannot_make_up_for_draws():
    noisy = components(draws=0.2)
    assert power(noisy, "sets", 0.2, draws=2, units=800, runs=300) < 0.5
    assert power(noisy, "sets", 0.2, draws=24, units=100, runs=300) > 0.7


def test_own_languages_are_tested_by_permuting_sets():
    means = np.random.default_rng(3).normal(size=(20, 4, 4)) + np.eye(4)
    assert pairings_of_many(means) == pytest.approx([pairings(one) for one in means])
    eight = np.random.default_rng(4).normal(size=(3, 8, 8)) + 0.5 * np.eye(8)
    assert pairings_of_many(eight) == pytest.approx([pairings(one) for one in eight], abs=0.03)
    study = components(sets=6, blocks=6, draws=0.1, shared=0.5)
    assert power(study, "own", 0.0, draws=2, units=50) == pytest.approx(0.05, abs=0.025)
    assert power(study, "own", 0.3, draws=2, units=50) > 0.9
    assert power(components(sets=4, blocks=4), "own", 9.0, draws=2, units=50) == 0  # 24 ways: never below 2/24
