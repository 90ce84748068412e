from __future__ import annotations

import pytest
from pydantic import ValidationError

from pruning import CalibrationSet, Recipe
from pruning.methods import Method, magnitude, register


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, 50, float("nan")])
def test_sparsity_outside_zero_and_one_is_refused(sparsity):
    with pytest.raises(ValidationError, match="not between 0 and 1"):
        Recipe(method="wanda", sparsity=sparsity)


def test_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(ValidationError, match='unknown method "wnada"; did you mean "wanda"'):
        Recipe(method="wnada", sparsity=0.5)


def test_the_native_pattern_is_the_default():
    assert Recipe(method="wanda", sparsity=0.5).pattern == "row"
    assert Recipe(method="magnitude", sparsity=0.5).pattern == "matrix"
    assert Recipe(method="magnitude", sparsity=0.5, pattern="row").pattern == "row"


def test_a_method_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="registered already"):
        register(Method("magnitude", magnitude.score, calibrated=False, pattern="row", source=""))


def test_mixes_share_a_constant_total():
    for name in ("en", "en+sw", "ar+en+sw"):
        assert sum(CalibrationSet.named(name, samples=7, length=8).shares().values()) == 7


def test_more_languages_than_samples_is_refused():
    with pytest.raises(ValidationError, match="every language needs at least one sample"):
        CalibrationSet.named("ar+en+sw", samples=2, length=8)


def test_unknown_language_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match='unknown language tag "swahili"; did you mean "sw"'):
        CalibrationSet.named("en+swahili")
