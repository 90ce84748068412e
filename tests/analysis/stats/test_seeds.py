from __future__ import annotations

import numpy as np
import pytest

from analysis.stats.seeds import seed_margin, spread_between_draws


def test_margin_covers_differences_between_draws_of_one_set():
    rng = np.random.default_rng(0)
    draws = [[rng.normal(0, 1, size=1) + np.zeros(5) for _ in range(2)] for _ in range(2000)]
    spread = spread_between_draws(draws)
    assert spread == pytest.approx(np.sqrt(2), rel=0.05)
    differences = np.array([(a - b).mean() for a, b in draws])
    assert np.mean(np.abs(differences) <= seed_margin(spread, 1)) == pytest.approx(0.95, abs=0.02)
    assert seed_margin(spread, 4) == pytest.approx(seed_margin(spread, 1) / 2)


def test_sets_that_were_drawn_once_say_nothing():
    assert np.isnan(spread_between_draws([[np.ones(3)], [np.zeros(3)]]))
