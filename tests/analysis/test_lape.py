from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis import lape


def naive_select(p: np.ndarray, quantile: float, share: float) -> set[tuple[int, int, int]]:
    """The published rule, neuron by neuron."""
    layers, neurons, languages = p.shape
    threshold = sorted(p.ravel())[max(round(quantile * p.size), 1) - 1]
    ranked = []
    for layer in range(layers):
        for neuron in range(neurons):
            row = p[layer, neuron]
            if not any(value > threshold for value in row):
                continue
            shares = [value / sum(row) for value in row if value > 0]
            ranked.append((max(-sum(s * np.log(s) for s in shares), 0.0), layer, neuron))
    # Rounded, so that sums in another order do not break ties the other way.
    ranked.sort(key=lambda entry: (round(entry[0], 9), entry[1], entry[2]))
    chosen = ranked[: round(share * layers * neurons)]
    return {(i, j, k) for _, i, j in chosen for k in range(languages) if p[i, j, k] > threshold}


probabilities = arrays(np.float64, (3, 20, 4), elements=st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]))


@settings(deadline=None, max_examples=60)
@given(probabilities, st.sampled_from([0.5, 0.8, 0.95]), st.sampled_from([0.01, 0.1, 0.5]))
def test_selection_equals_a_naive_version_of_the_published_rule(p, quantile, share):
    found = lape.select(p, threshold_quantile=quantile, selected_share=share).members
    assert set(map(tuple, np.argwhere(found).tolist())) == naive_select(p, quantile, share)


@pytest.mark.parametrize(
    ("layers", "neurons", "published"),
    [(32, 11008, 3523), (40, 13824, 5530), (80, 28672, 22938), (30, 16384, 4915), (32, 14336, 4588)],
)
def test_set_sizes_are_those_published(layers, neurons, published):
    assert lape.selection_size(layers * neurons) == published


def test_planted_neurons_are_found_and_never_active_ones_are_not():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.3, size=(4, 100, 5))
    p[:, 90:] = 0  # never fires
    planted = {(0, 3, 1), (1, 50, 4), (2, 7, 0), (3, 89, 2)}
    for layer, neuron, language in planted:
        p[layer, neuron] = 0.001
        p[layer, neuron, language] = 0.9
    found = lape.select(p)
    assert set(map(tuple, np.argwhere(found.members).tolist())) == planted


def test_a_model_that_never_fires_has_no_language_neurons():
    assert not lape.select(np.zeros((2, 50, 3))).members.any()


def test_entropy_is_highest_for_neurons_that_fire_alike_everywhere():
    assert lape.entropy(np.full((1, 1, 8), 0.4))[0, 0] == pytest.approx(np.log(8))
