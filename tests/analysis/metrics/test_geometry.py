"""Damage that is planted in synthetic states is named for what it is."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.frames import dense_columns
from analysis.metrics import geometry, geometry_states
from analysis.report.geometry import geometry_of_recipe
from probes import DENSE, Readings

LANGUAGES, SEGMENTS, HIDDEN = 5, 128, 32
NAMES = [f"l{number}" for number in range(LANGUAGES)]
RNG = np.random.default_rng(0)
FRAME = np.linalg.qr(RNG.normal(size=(HIDDEN, HIDDEN)))[0]
INSIDE, OUTSIDE = FRAME[:, : LANGUAGES - 1], FRAME[:, LANGUAGES - 1 :]
PLACES = np.linalg.qr(RNG.normal(size=(LANGUAGES, LANGUAGES)) - 0.2)[0][:, : LANGUAGES - 1] * 6
PLACES = PLACES - PLACES.mean(axis=0)
SAID = RNG.normal(size=(SEGMENTS, HIDDEN))
COMMON = RNG.normal(size=HIDDEN)
STATES = np.stack([SAID + 0.7 * RNG.normal(size=(SEGMENTS, HIDDEN)) + place @ INSIDE.T for place in PLACES]) + COMMON


def rotation(basis: np.ndarray, seed: int = 3) -> np.ndarray:
    """A random rotation within a subspace, and nothing outside of it."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(basis.shape[1],) * 2))[0]
    return np.eye(HIDDEN) + basis @ (turn - np.eye(basis.shape[1])) @ basis.T


def swapped() -> np.ndarray:
    """An orthogonal matrix that exchanges the specific subspace for one in the agnostic part."""
    other = OUTSIDE[:, : LANGUAGES - 1]
    both = INSIDE @ other.T
    return np.eye(HIDDEN) - INSIDE @ INSIDE.T - other @ other.T + both + both.T


def with_outlier_directions() -> np.ndarray:
    """Noise so large in a few directions that the means of languages differ there most."""
    return STATES + 30 * np.random.default_rng(5).normal(size=(LANGUAGES, SEGMENTS, 4)) @ OUTSIDE[:, :4].T


def without_languages() -> np.ndarray:
    return STATES - (PLACES @ INSIDE.T)[:, None]


PLANTED = {
    geometry.UNCHANGED: lambda: STATES + 0.02 * np.random.default_rng(4).normal(size=STATES.shape),
    geometry.ROTATED_INSIDE: lambda: STATES @ rotation(INSIDE),
    geometry.ROTATED: lambda: STATES @ swapped(),
    geometry.LOST: without_languages,
    geometry.SCATTERED: with_outlier_directions,
}


def reading(states: np.ndarray) -> Readings:
    zero = torch.zeros(1)
    pooled = torch.from_numpy(np.atleast_3d(states)[None] if states.ndim == 2 else states).float()
    return Readings(pooled, *[zero] * 7)


def analyzed(variant: np.ndarray, dense: np.ndarray = STATES, ids: dict | None = None, **settings) -> pd.DataFrame:
    """Analyze two models of one layer."""
    columns = {DENSE: dense_columns("m")}
    columns["v"] = columns[DENSE] | {"method": "wanda", "sparsity": 0.5, "calibration": "en"}
    readings = {(DENSE, name): reading(dense[i][None]) for i, name in enumerate(NAMES)}
    readings |= {("v", name): reading(variant[i][None]) for i, name in enumerate(NAMES)}
    ids = ids or {name: [str(k) for k in range(dense.shape[1])] for name in NAMES}
    return geometry.analyze(readings, columns, ids, **settings)


@cache
def planted(what: str) -> pd.DataFrame:
    return analyzed(PLANTED[what]())


def values(frame: pd.DataFrame, method: str = "wanda") -> pd.Series:
    rows = frame[(frame["method"] == method) & frame["layer"].notna()]
    return rows.groupby("metric", observed=True)["value"].mean()


@pytest.mark.parametrize("what", PLANTED)
def test_planted_damage_is_named_for_what_it_is(what):
    assert set(geometry.verdicts(planted(what))["verdict"]) == {what}


def test_a_rotation_out_of_the_dense_subspace_loses_nothing_in_its_own():
    after = values(planted(geometry.ROTATED))
    before = values(planted(geometry.ROTATED), DENSE)
    assert after["subspace_overlap"] < 0.2 < 0.9 < before["subspace_overlap"]
    assert after["largest_angle"] > 60 > before["largest_angle"]
    assert after["own_specific_decoding"] == before["own_specific_decoding"] > 0.95
    assert after["dense_specific_decoding"] < 0.5
    assert after["dense_agnostic_decoding"] > 0.95 > 0.5 > after["own_agnostic_decoding"]
    assert after["cka"] == pytest.approx(1)


def test_lost_languages_are_found_nowhere():
    found = values(planted(geometry.LOST))
    for part in geometry.PARTS:
        assert found[f"{part}_decoding"] < 0.45, part  # guessing: a fifth
    assert values(planted(geometry.LOST))["cka"] == pytest.approx(1)  # within a language, nothing changed


def test_noisier_means_are_not_taken_for_a_rotation():
    noise = np.random.default_rng(8).normal(size=STATES.shape)
    found = analyzed(STATES + 2 * noise)
    before, after = values(found, DENSE), values(found)
    assert after["subspace_overlap"] < before["subspace_overlap"] - geometry.TOLERANCE
    change = found[(found["metric"] == "subspace_overlap_change") & found["layer"].notna()].iloc[0]
    assert change["low"] < 0 < change["high"]
    assert not {geometry.ROTATED, geometry.ROTATED_INSIDE} & set(geometry.verdicts(found)["verdict"])


def test_noise_that_hides_languages_from_a_probe_is_not_taken_for_a_loss():
    """Few segments of many dimensions: the probe finds less, but the means of the languages are as far apart."""
    rng = np.random.default_rng(0)
    few, wide = 40, 640
    dense = 0.7 * rng.normal(size=(LANGUAGES, few, wide)) + rng.normal(size=(few, wide))
    dense[..., : LANGUAGES - 1] += PLACES[:, None]
    noisy, lost = dense + rng.normal(size=dense.shape), dense + rng.normal(size=dense.shape)
    lost[..., : LANGUAGES - 1] -= 0.8 * PLACES[:, None]
    for variant, verdict in ((noisy, geometry.UNDECIDED), (lost, geometry.LOST)):
        frame = analyzed(variant, dense)
        rows = frame[frame["layer"].notna() & frame["language"].isna()].set_index("metric")
        assert rows.loc["whole_decoding_change", "high"] < -geometry.TOLERANCE
        assert rows.loc["own_specific_decoding_change", "high"] < -geometry.TOLERANCE
        assert set(geometry.verdicts(frame)["verdict"]) == {verdict}
        expected = 0.0 if variant is noisy else 0.2**2 - 1
        assert rows.loc[geometry.BETWEEN, "low"] < expected < rows.loc[geometry.BETWEEN, "high"]


def test_variance_between_languages_without_each_segment_is_that_of_fitting_again():
    variant = PLANTED[geometry.ROTATED]() + np.random.default_rng(6).normal(size=STATES.shape)
    segments = geometry_states.Segments.of([[str(k) for k in range(SEGMENTS)]] * LANGUAGES)
    states = variant.reshape(-1, HIDDEN)
    found = geometry_states.between_languages(geometry_states.States(segments, states, LANGUAGES - 1))
    for left in (None, 0, 127):
        keep = np.arange(len(states)) if left is None else np.flatnonzero(segments.unit != left)
        means = np.array(
            [
                [
                    states[[i for i in keep if segments.language[i] == n and segments.quarter[i] // 2 == half]].mean(
                        axis=0
                    )
                    for n in range(LANGUAGES)
                ]
                for half in (0, 1)
            ]
        )
        first, second = means - means.mean(axis=1, keepdims=True)
        assert found[0 if left is None else 1 + left] == pytest.approx((first * second).sum())


@pytest.mark.parametrize("what", PLANTED)
def test_the_report_says_so_in_words(what):
    said = " ".join(geometry_of_recipe({"geometry": planted(what)}, {"method": "wanda"}))
    word = {geometry.ROTATED: "rotated (", geometry.ROTATED_INSIDE: "rotated within"}.get(what, what)
    others = {"rotated (", "rotated within", *PLANTED} - {geometry.ROTATED, geometry.ROTATED_INSIDE, word}
    assert f"Of 1 cases (each block of each model), what tells languages apart is {word}" in said
    assert not [other for other in others if other in said]


def test_few_segments_leave_the_verdict_open():
    few = np.s_[:, :8]
    frame = analyzed(PLANTED[geometry.ROTATED]()[few], STATES[few])
    assert set(geometry.verdicts(frame)["verdict"]) <= {geometry.UNDECIDED, geometry.ROTATED}
    assert analyzed(STATES[:, :7], STATES[:, :7])["metric"].unique().tolist() == ["cka"]


@pytest.mark.parametrize("change", ["rotated", "scaled", "shifted"])
def test_rotating_scaling_or_shifting_both_models_changes_nothing(change):
    variant = PLANTED[geometry.SCATTERED]() + 0.5 * np.random.default_rng(6).normal(size=STATES.shape)
    turn = rotation(FRAME)
    change_of = {"rotated": lambda x: x @ turn, "scaled": lambda x: 7 * x, "shifted": lambda x: x + 5}[change]
    before, after = analyzed(variant), analyzed(change_of(variant), change_of(STATES))
    pd.testing.assert_frame_equal(
        before.drop(columns=["value", "low", "high"]), after.drop(columns=["value", "low", "high"])
    )
    exact = before["metric"].isin(["subspace_overlap", "largest_angle", "cka", "overlap_chance"])
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(after[column][exact], before[column][exact], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after["value"][~exact], before["value"][~exact], atol=0.02)


def test_intervals_without_each_segment_are_those_of_fitting_again():
    """The jackknife's replicates come from rank-one updates; here the states are really left out."""
    variant = PLANTED[geometry.ROTATED]() + 0.5 * np.random.default_rng(6).normal(size=STATES.shape)
    ids = [[str(k) for k in range(SEGMENTS)]] * LANGUAGES
    segments = geometry_states.Segments.of(ids)
    states = [x.reshape(-1, HIDDEN) for x in (STATES, variant)]
    found = geometry_states.overlaps(*[geometry_states.States(segments, x, LANGUAGES - 1) for x in states])
    for unit in (0, 17, 127):
        keep = segments.unit != unit
        left = geometry_states.Segments(segments.language[keep], segments.unit[keep], segments.quarter[keep])
        again = geometry_states.overlaps(*[geometry_states.States(left, x[keep], LANGUAGES - 1) for x in states])
        np.testing.assert_allclose(found[:, 1 + unit], again[:, 0], rtol=1e-8)


def test_text_that_is_not_parallel_gives_nearly_the_same():
    apart = {name: [f"{name}-{k}" for k in range(SEGMENTS)] for name in NAMES}
    frame = analyzed(PLANTED[geometry.ROTATED](), ids=apart)
    assert set(geometry.verdicts(frame)["verdict"]) == {geometry.ROTATED}
    one = frame[(frame["metric"] == "own_specific_decoding") & frame["language"].isna()]
    of_languages = frame[(frame["metric"] == "own_specific_decoding") & frame["language"].notna()]
    assert one["value"].mean() == pytest.approx(of_languages["value"].mean())


def test_intervals_hold_the_value():
    for what in PLANTED:
        rows = planted(what).dropna(subset=["low"])
        assert (rows["low"] <= rows["value"] + 1e-9).all()
        assert (rows["value"] <= rows["high"] + 1e-9).all()
