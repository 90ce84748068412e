from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from analysis.stats.jackknife import jackknife_interval


def test_the_interval_of_a_mean_is_students():
    x = np.random.default_rng(0).normal(size=15)
    value, low, high = jackknife_interval(np.array(x.mean()), (x.sum() - x) / 14)
    expected = t.interval(0.95, 14, loc=x.mean(), scale=x.std(ddof=1) / np.sqrt(15))
    assert (float(low), float(high)) == pytest.approx(expected)
    assert value == x.mean()
