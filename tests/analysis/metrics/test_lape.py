from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis.metrics import lape
from probes import DENSE, Readings
from probes.readers.firing import FOLDS


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


@settings(max_examples=60)
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


COLUMNS = {
    "model": "m",
    "method": DENSE,
    "sparsity": 0.5,
    "pattern": "row",
    "allocation": "uniform",
    "scope": "all",
    "propagation": "pruned",
    "item_share": 0.0,
    "bits": 9.0,
    "calibration": "none",
    "seed": 0,
}


def reading(rates: np.ndarray, seed: int, segments: int = 16, tokens: int = 200) -> Readings:
    """What is read of neurons that fire with these rates, ``[layers, neurons]``."""
    rng = np.random.default_rng(seed)
    fired = rng.binomial(segments // FOLDS * tokens, rates, size=(FOLDS, *rates.shape))
    each = torch.full((segments,), tokens)
    none = torch.zeros(segments, 1, 8, dtype=torch.float64)
    return Readings(
        torch.zeros(segments, 1, 2),
        torch.from_numpy(fired).int(),
        each.expand(len(rates), -1),
        each.double(),
        each,
        each,
        none,
        none,
    )


def selection(rates: dict[str, np.ndarray], pruned: dict[str, np.ndarray] | None = None):
    names = {DENSE: rates, "v": pruned or rates}
    readings = {
        (name, language): reading(of[language], 100 * i + j)
        for i, (name, of) in enumerate(names.items())
        for j, language in enumerate(of)
    }
    columns = {DENSE: COLUMNS, "v": COLUMNS | {"method": "wanda", "calibration": "en"}}
    checks = lape.analyze(readings, columns)[1]
    own = checks[checks["method"] == "wanda"]
    return own.groupby("metric", observed=True)["value"].mean()


def planted_rates(seed: int = 0, languages: str = "abcd") -> dict[str, np.ndarray]:
    """1 % of 2000 neurons fire in one language each; all others alike in all, but for a few percent."""
    rng = np.random.default_rng(seed)
    common = rng.uniform(0.05, 0.3, size=(2, 1000))
    rates = {language: common.copy() for language in languages}
    for k in range(20):
        layer, neuron = k % 2, k
        for i, language in enumerate(languages):
            rates[language][layer, neuron] = 0.6 if i == k % len(languages) else 0.005
    return rates


def test_a_selection_of_real_language_neurons_is_told_from_chance():
    found = selection(planted_rates())
    assert found["selected"] == 20
    assert found["selected_by_chance"] < 2
    assert found["p_value"] == pytest.approx(1 / (lape.PERMUTATIONS + 1))
    assert found["other_half_share"] == 1
    assert found["kept_share"] == 1
    assert found["kept_by_chance"] == pytest.approx(5 / 2000)


def test_a_selection_of_noise_is_told_from_language_neurons():
    rates = np.random.default_rng(0).uniform(0.05, 0.3, size=(2, 1000))
    found = selection(dict.fromkeys("abcd", rates))
    assert found["selected"] == 20  # the rule always selects as many
    assert found["p_value"] > 0.05
    assert found["selected_by_chance"] > 5
    assert found["other_half_share"] < 0.5


def test_neurons_that_pruning_moved_to_others_are_not_kept():
    before = planted_rates()
    moved = {language: rates[:, ::-1].copy() for language, rates in before.items()}
    found = selection(before, moved)
    assert found["kept_share"] == 0
    assert found["selected"] == 20


def test_folds_add_up_to_the_whole():
    rates = planted_rates()
    readings = {(DENSE, language): reading(rates[language], i) for i, language in enumerate("abcd")}
    counts = lape.FiringCounts.of(readings, DENSE)
    assert counts.languages == tuple("abcd")
    whole = counts.probabilities()
    halves = [counts.probabilities(range(i, FOLDS, 2)) for i in (0, 1)]
    np.testing.assert_allclose(whole, (halves[0] + halves[1]) / 2)
    np.testing.assert_allclose(
        whole[..., 1], readings[DENSE, "b"].fired.sum(0).numpy() / readings[DENSE, "b"].tokens[0].sum().item()
    )


def test_distributions_are_those_of_all_neurons_that_fire():
    before = planted_rates()
    doubled = {language: np.minimum(rates * 2, 1) for language, rates in before.items()}
    before["a"][0, :100] = doubled["a"][0, :100] = 0
    readings = {
        (name, language): reading(rates[language], i)
        for name, rates in ((DENSE, before), ("v", doubled))
        for i, language in enumerate("abcd")
    }
    columns = {DENSE: COLUMNS, "v": COLUMNS | {"method": "wanda", "calibration": "en"}}
    entropies, shifts = lape.distributions(readings, columns)
    found = lape.entropy(lape.FiringCounts.of(readings, "v").probabilities())
    own = entropies[entropies["method"] == "wanda"].set_index("quantile")["value"]
    for quantile in (0.0, 0.005, 0.05, 0.5, 1.0):
        assert own[quantile] == pytest.approx(np.quantile(found[np.isfinite(found)], quantile))
    frequent = shifts[(shifts["metric"] == "other_shift") & (shifts["dense_firing"].between(0.05, 0.5))]
    assert set(frequent["language"]) == set("abcd")
    assert frequent["value"].to_numpy() == pytest.approx(1, abs=0.02)  # twice as often
    assert (shifts["method"] == "wanda").all()


# -- experts -------------------------------------------------------------------------------------------------------------


def expert_reading(rates: np.ndarray, routed: np.ndarray, seed: int, segments: int = 16) -> Readings:
    """What is read of experts of 500 neurons that fire with these rates, ``[layers, neurons]``.

    Each segment sends ``routed`` tokens ``[layers, experts]`` to them.
    """
    rng = np.random.default_rng(seed)
    layers, experts = routed.shape
    reached = np.repeat(routed, 500, axis=1) * (segments // FOLDS)
    fired = rng.binomial(reached, rates, size=(FOLDS, *rates.shape))
    each = torch.full((segments,), 200)
    none = torch.zeros(segments, layers, 8, dtype=torch.float64)
    sizes = torch.tensor([[500] * experts + [0]] * layers)
    counts = torch.from_numpy(np.tile(routed, (segments, 1, 1))).int()
    return Readings(
        torch.zeros(segments, layers, 2),
        torch.from_numpy(fired).int(),
        *(each.expand(layers, -1), each.double(), each, each, none, none),
        *(counts, torch.zeros(segments, layers), sizes),
    )


def expert_readings(unused: int = 2) -> dict[tuple[str, str], Readings]:
    """Planted neurons in two blocks of two experts; language b sends `unused` tokens a segment to expert 1 of block 1."""
    rates = planted_rates()
    readings = {}
    for i, language in enumerate(rates):
        routed = np.array([[120, 80], [150, 50]])
        if language == "b":
            routed[1] = 200 - unused, unused
        readings[DENSE, language] = expert_reading(rates[language], routed, i)
    return readings


def test_experts_neurons_fire_on_a_share_of_the_tokens_that_they_get():
    readings = expert_readings()
    found = lape.FiringCounts.of(readings, DENSE).probabilities()
    fired = readings[DENSE, "c"].fired.sum(0).numpy()
    np.testing.assert_allclose(found[0, :500, 2], fired[0, :500] / (16 * 120))
    np.testing.assert_allclose(found[1, 500:, 2], fired[1, 500:] / (16 * 50))
    half = lape.FiringCounts.of(readings, DENSE).probabilities(range(0, FOLDS, 2), [1])
    own = readings[DENSE, "c"].fired[::2, 1].sum(0).numpy()
    np.testing.assert_allclose(half[0, 500:, 2], own[500:] / (8 * 50))


def test_where_an_expert_gets_few_tokens_of_a_language_there_is_no_estimate_and_no_lape():
    readings = expert_readings()  # 32 tokens
    found = lape.FiringCounts.of(readings, DENSE).probabilities()
    assert np.isnan(found).sum() == 500
    assert np.isnan(found[1, 500:, 1]).all()
    assert not lape.select(found).members[1, 500:].any()
    frame = lape.neurons(readings, {DENSE: COLUMNS})
    rows = frame[(frame["layer"] == 1) & (frame["neuron"] >= 500)]
    assert set(rows["language"].dropna()) == set("acd")
    assert set(frame[frame["metric"] == "lape"].groupby("layer").size()) == {1000, 500}
    assert not np.isnan(lape.FiringCounts.of(expert_readings(unused=7), DENSE).probabilities()).any()  # 112 tokens


def test_selection_leaves_out_what_is_not_known():
    """As if the neurons without an estimate did not exist."""
    whole = lape.FiringCounts.of(expert_readings(), DENSE).probabilities()
    found = lape.select(whole, selected_share=0.02)
    known = whole.reshape(-1, 4)[~np.isnan(whole).any(axis=-1).ravel()]
    alone = lape.select(known[None], selected_share=0.02)
    assert found.threshold == alone.threshold
    np.testing.assert_array_equal(found.members.reshape(-1, 4)[~np.isnan(whole).any(axis=-1).ravel()], alone.members[0])
    assert found.members.any(axis=-1).sum() == 30


def test_planted_neurons_of_experts_are_told_from_chance():
    readings = expert_readings()
    readings |= {("v", language): read for (_, language), read in readings.items()}
    columns = {DENSE: COLUMNS, "v": COLUMNS | {"method": "wanda", "calibration": "en"}}
    by_language, checks = lape.analyze(readings, columns)
    found = checks[checks["method"] == "wanda"].groupby("metric", observed=True)["value"].mean()
    assert found["selected"] == 15  # 1 % of those with an estimate
    assert found["selected_by_chance"] < 2
    assert found["p_value"] == pytest.approx(1 / (lape.PERMUTATIONS + 1))
    assert found["kept_share"] == 1
    assert set(by_language["layer"]) == {0, 1}
    entropies, shifts = lape.distributions(readings, columns)
    assert np.isfinite(entropies["value"]).all()
    assert shifts["value"].to_numpy() == pytest.approx(0)


def test_there_is_nothing_to_say_of_experts_that_get_next_to_nothing():
    rates = planted_rates()
    routed = np.array([[2, 2], [2, 2]])
    readings = {(DENSE, language): expert_reading(rates[language], routed, i) for i, language in enumerate("abcd")}
    assert [len(frame) for frame in lape.analyze(readings, {DENSE: COLUMNS})] == [0, 0]
    assert [len(frame) for frame in lape.distributions(readings, {DENSE: COLUMNS})] == [0, 0]
    assert len(lape.neurons(readings, {DENSE: COLUMNS})) == 0


def test_blocks_of_other_sizes_are_filled_up_with_nothing():
    from analysis.metrics.firing import _owners

    owner = _owners(np.array([[2, 2, 1], [0, 0, 3]]), 5)
    assert owner.tolist() == [[0, 0, 1, 1, 2], [2, 2, 2, 3, 3]]
