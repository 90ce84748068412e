from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from analysis.stats.discriminant import predicted_classes


@pytest.mark.parametrize("width", [3, 20, 200])
def test_predictions_are_those_of_the_explicit_covariance(width):
    """More features than samples, or fewer: the same discriminant as scikit-learn's with Ledoit and Wolf's shrinkage."""
    rng = np.random.default_rng(width)
    y = np.arange(60) % 4
    places = rng.normal(size=(4, width)) * 0.6
    fitted = places[y] + rng.normal(size=(60, width)) * rng.uniform(0.3, 2, width) + 3
    tested = places[y] + rng.normal(size=(60, width)) + 3
    residuals = fitted - np.stack([fitted[y == c].mean(axis=0) for c in range(4)])[y]
    shrinkage = ledoit_wolf(residuals, assume_centered=True)[1]

    class Pooled:
        def fit(self, x: np.ndarray) -> Pooled:
            """Scikit-learn asks for each class's covariance; all get the pooled one."""
            self.covariance_ = ledoit_wolf(residuals, assume_centered=True)[0]
            return self

    reference = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Pooled(), priors=np.full(4, 0.25))
    expected = reference.fit(fitted, y).predict(tested)
    assert 0 < shrinkage < 1
    found = predicted_classes(fitted @ fitted.T, tested @ fitted.T, y, width)
    np.testing.assert_array_equal(found, expected)


def test_samples_that_are_all_alike_are_no_error():
    found = predicted_classes(np.zeros((6, 6)), np.zeros((4, 6)), np.arange(6) % 3, 10)
    assert found.tolist() == [0, 0, 0, 0]
