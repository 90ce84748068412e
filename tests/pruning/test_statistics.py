from __future__ import annotations

import pytest
import torch

from pruning.errors import MethodError
from pruning.statistics import InputStatistics, Statistics

READS = {
    "squares": lambda inputs: inputs.squares,
    "norms": lambda inputs: inputs.norms,
    "norms_by_language": lambda inputs: inputs.norms_by_language(),
    "firing": lambda inputs: inputs.firing,
    "gram": lambda inputs: inputs.gram,
    "gram_above_diagonal": lambda inputs: inputs.gram_above_diagonal(),
}


def gathered(*needs: str) -> InputStatistics:
    inputs = InputStatistics(3, frozenset(needs))
    inputs.add(torch.tensor([[1.0, -2.0, 0.0], [2.0, 4.0, 0.0]]), "en")
    return inputs


@pytest.mark.parametrize(
    ("read", "asked", "missing"),
    [
        ("squares", "positive", "squares"),
        ("norms", "positive", "squares"),
        ("norms_by_language", "positive", "squares"),
        ("norms_by_language", "gram", "squares"),
        ("firing", "squares", "positive"),
        ("gram", "squares", "gram"),
        ("gram_above_diagonal", "squares", "gram"),
    ],
)
def test_what_was_not_asked_for_cannot_be_read(read, asked, missing):
    with pytest.raises(MethodError, match=f"^a method reads {missing} without requesting it; add it to the needs"):
        READS[read](gathered(asked))


def test_a_gram_matrix_has_the_squares():
    assert torch.equal(gathered("gram").squares, gathered("squares").squares)
    assert gathered("gram").squares.tolist() == [5, 20, 0]


@pytest.mark.parametrize("statistic", ["known_inputs", "known_gradient", "known_curvature"])
def test_a_method_without_needs_has_no_statistics(statistic):
    with pytest.raises(MethodError, match="without requesting it"):
        getattr(Statistics(), statistic)
