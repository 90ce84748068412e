from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis import LSAR
from analysis.metrics import lsar
from probes import DENSE, Readings


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def planted(seed: int = 0, languages: int = 5, hidden: int = 40, rank: int = 3, noise: float = 1e-3):
    """Language means that differ inside a known subspace only, but for a little noise."""
    rng = np.random.default_rng(seed)
    basis = orthonormal(hidden, rank, seed)
    common = rng.normal(size=hidden) * 10
    return basis, common + rng.normal(size=(languages, rank)) @ basis.T + noise * rng.normal(size=(languages, hidden))


def test_a_planted_subspace_is_recovered():
    basis, means = planted()
    found = LSAR(rank=3).fit(means)
    cosines = np.linalg.svd(basis.T @ found.basis_, compute_uv=False)
    assert cosines.min() > 0.9999
    assert found.explained_shares_[2] > 0.9999
    assert found.explained_shares_[0] < 0.95
    assert len(found.explained_shares_) == 4
    assert found.explained_shares_[-1] == pytest.approx(1)


def test_subspace_and_mean_are_those_of_the_papers_two_step_form():
    """Xie et al., algorithm 1: SVD of the centred means, then mean and subspace re-solved with the pseudo-inverse."""
    _, means = planted(seed=3)
    M, rank = means.T, 4
    languages = M.shape[1]
    ones = np.ones(languages)
    mean = M @ ones / languages
    left, singular, right = np.linalg.svd(M - np.outer(mean, ones), full_matrices=False)
    low_rank = np.outer(mean, ones) + left[:, :rank] @ np.diag(singular[:rank]) @ right[:rank]
    solved = np.linalg.pinv(low_rank.T) @ ones
    mu = solved / (solved @ solved)
    left, _, _ = np.linalg.svd(low_rank - np.outer(mu, ones), full_matrices=False)
    found = LSAR().fit(means)
    two_step = left[:, :rank] @ left[:, :rank].T
    np.testing.assert_allclose(found.basis_ @ found.basis_.T, two_step, atol=1e-8)
    np.testing.assert_allclose(found.mean_, mu, atol=1e-8)
    assert abs(found.basis_.T @ found.mean_).max() < 1e-10


def test_parts_add_up_and_the_agnostic_part_has_no_language_left():
    _, means = planted(noise=0.5)
    found = LSAR().fit(means)
    states = np.random.default_rng(1).normal(size=(7, 40))
    whole = found.specific(states) @ found.basis_.T + found.transform(states)
    np.testing.assert_allclose(whole, states)
    np.testing.assert_allclose(found.transform(means), np.tile(found.mean_, (5, 1)), atol=1e-10)


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_beyond_the_number_of_languages_is_refused(rank):
    with pytest.raises(ValueError, match="not between 1 and 4"):
        LSAR(rank).fit(planted()[1])


def test_parameters_round_trip_as_in_scikit_learn():
    assert LSAR(rank=2).get_params() == {"rank": 2}


def reading(pooled: np.ndarray) -> Readings:
    segments = len(pooled)
    one = torch.ones(segments)
    zero = torch.zeros(segments, 1, 8, dtype=torch.float64)
    states = torch.from_numpy(pooled[None].astype(np.float32))
    return Readings(states, torch.zeros(8, 1, 4, dtype=torch.int32), one[None], one.double(), one, one, zero, zero)


BASE = {"model": "m", "method": "wanda", "sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all"}
COLUMNS = BASE | {"propagation": "pruned", "item_share": 0.0, "bits": 9.0, "calibration": "en", "seed": 0}


@pytest.mark.parametrize("inside", [True, False])
def test_planted_damage_appears_only_in_its_part(inside):
    rng = np.random.default_rng(0)
    _, means = planted(hidden=12, rank=3, noise=0)
    subspace = LSAR(rank=3).fit(means)
    dense = means[0] + rng.normal(size=(20, 12))
    noise = rng.normal(size=(20, 12))
    damage = (noise @ subspace.basis_) @ subspace.basis_.T if inside else subspace.transform(noise)
    readings = {(DENSE, "en"): reading(dense), ("v", "en"): reading(dense + damage)}
    columns = dict.fromkeys((DENSE, "v"), COLUMNS)
    frame = lsar.analyze(readings, columns, [subspace]).set_index("metric")["value"]
    hurt, spared = ("specific", "agnostic") if inside else ("agnostic", "specific")
    for kind in ("error", "error_centred", "error_per_dimension"):
        assert frame[f"{hurt}_{kind}"] > 1e-3
        assert frame[f"{spared}_{kind}"] < 1e-10
    expected = (damage**2).sum() / ((dense @ subspace.basis_) ** 2).sum()
    if inside:
        assert frame["specific_error"] == pytest.approx(expected, rel=1e-4)
        assert frame["specific_error_per_dimension"] == pytest.approx((damage**2).sum() / 20 / 3, rel=1e-4)
    assert frame[f"{hurt}_snr_db"] == pytest.approx(-10 * np.log10(frame[f"{hurt}_error"]))
    assert frame[f"{spared}_snr_db"] > 100


def several_languages(tell: float, mean: float, segments: int = 60, hidden: int = 24, languages: int = 4):
    """Segments that all languages say alike but for where each language lies, and a subspace that holds just that."""
    rng = np.random.default_rng(1)
    names = [f"l{i}" for i in range(languages)]
    basis = orthonormal(hidden, languages - 1, 7)
    places = tell * rng.normal(size=(languages, languages - 1)) @ basis.T
    said = rng.normal(size=(segments, hidden))
    said -= (said @ basis) @ basis.T
    states = {
        name: mean + places[i] + said + 0.05 * rng.normal(size=(segments, hidden)) for i, name in enumerate(names)
    }
    subspace = LSAR().fit(np.stack([mean + place for place in places]))
    ids = {name: [str(k) for k in range(segments)] for name in names}
    return names, states, subspace, ids


def knowledge(names, states, subspace, ids):
    readings = {(DENSE, name): reading(states[name]) for name in names}
    frame = lsar.analyze(readings, {DENSE: COLUMNS | {"method": DENSE}}, [subspace], ids)
    return frame[frame["metric"] != "explained_share"].groupby("metric", observed=True)["value"].mean()


def test_the_agnostic_part_holds_what_is_said():
    found = knowledge(*several_languages(tell=5, mean=3))
    assert found["agnostic_retrieval"] > 0.99
    assert found["whole_retrieval"] < found["agnostic_retrieval"]


def test_segments_without_translation_are_not_searched_for():
    names, states, subspace, ids = several_languages(tell=5, mean=0, segments=20)
    ids[names[0]] = [f"other {k}" for k in range(20)]
    assert "agnostic_retrieval" not in knowledge(names, states, subspace, ids)


def test_the_order_of_segments_changes_no_retrieval():
    names, states, subspace, ids = several_languages(tell=5, mean=3)
    before = knowledge(names, states, subspace, ids)
    order = np.random.default_rng(0).permutation(60)
    states[names[1]] = states[names[1]][order]
    ids[names[1]] = [ids[names[1]][i] for i in order]
    after = knowledge(names, states, subspace, ids)
    assert after["agnostic_retrieval"] == pytest.approx(before["agnostic_retrieval"])
