"""Geometry of one layer of one model of an 8B model's width, against the product of its states with itself.

    make benchmarks, or pytest tests/benchmarks/test_geometry_cost.py -s

All else (subspaces, intervals, 24 discriminants, CKA) should cost a small multiple of that product, which any method
that compares states needs. The time is scaled up to a study of 31 models of 32 layers in seven languages.
"""

from __future__ import annotations

import numpy as np
from benchmarks.harness import headline, in_turn, number, ratios, report

from analysis.metrics import geometry_states

LANGUAGES, SEGMENTS, HIDDEN = 7, 100, 4096
MODELS, LAYERS = 31, 32


def test_geometry_over_one_product(capsys):
    rng = np.random.default_rng(0)
    segments = geometry_states.Segments.of([[str(k) for k in range(SEGMENTS)]] * LANGUAGES)
    places = np.repeat(rng.normal(size=(LANGUAGES, HIDDEN)), SEGMENTS, axis=0)
    states = rng.normal(size=(LANGUAGES * SEGMENTS, HIDDEN)) + places
    noisy = states + rng.normal(size=states.shape)
    dense = geometry_states.States(segments, states, LANGUAGES - 1)
    geometry_states.compared(dense, dense)

    def ours() -> None:
        geometry_states.compared(dense, geometry_states.States(segments, noisy, LANGUAGES - 1))

    def product() -> None:
        assert (noisy @ noisy.T).shape == (len(noisy), len(noisy))

    with capsys.disabled():
        headline(f"geometry of {LANGUAGES * SEGMENTS} states of {HIDDEN} dimensions")
        measured = in_turn(number("ROUNDS", 5), {"ours": ours, "product": product})
        report("ours / one product of the states", ratios(measured["ours"], measured["product"]))
        minutes = [MODELS * LAYERS * seconds / 60 for seconds in measured["ours"]]
        report(f"minutes, {MODELS} models of {LAYERS} layers (scaled up)", minutes)
    assert np.median(ratios(measured["ours"], measured["product"])) < 10
