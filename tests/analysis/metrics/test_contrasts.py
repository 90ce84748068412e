"""Planted differences between calibration sets, and differences that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.metrics import contrasts
from analysis.metrics.contrasts import OTHERS, OWN, SIGNIFICANT
from analysis.metrics.lsar import LSAR
from analysis.report.findings import _errors_by_own_language
from probes import DENSE, Readings
from probes.readers.signal import SIGNAL_SITES
from pruning.text.calibration import Drawn

LANGUAGES = ("ar", "de", "en", "zh")
SEGMENTS = 80
HIDDEN = 10


def columns(calibration: str, seed: int) -> dict[str, object]:
    recipe = {"method": "wanda", "sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all"}
    recipe |= {"propagation": "pruned", "item_share": 0.0}
    return {"model": "m", **recipe, "bits": 9.0, "calibration": calibration, "seed": seed}


def study(effect: float, seeds: int, spread: float = 0.02, seed: int = 0, quality: float = 0.0, text=None):
    """Models calibrated on every language, whose own language costs `effect` nats less.

    Each draw shifts a language by `spread`, and each set all languages by `quality`.
    """
    rng = np.random.default_rng(seed)
    hard = {language: rng.gamma(20, 0.15, SEGMENTS) for language in LANGUAGES}  # what a segment costs in any model
    states = {language: rng.normal(size=(SEGMENTS, 1, HIDDEN)).astype(np.float32) for language in LANGUAGES}
    readings: dict[tuple[str, str], Readings] = {}
    described = {DENSE: columns("none", 0) | {"method": DENSE}}

    def reading(language: str, loss: np.ndarray, error: float) -> Readings:
        predicted = torch.full((SEGMENTS,), 30)
        power = torch.full((SEGMENTS, 1, len(SIGNAL_SITES)), 100.0, dtype=torch.float64)
        noise = rng.normal(size=(SEGMENTS, 1, HIDDEN)) * np.sqrt(error / HIDDEN)
        return Readings(
            pooled=torch.from_numpy((states[language] + noise).transpose(1, 0, 2).astype(np.float32)),
            fired=torch.zeros(8, 1, 4, dtype=torch.int32),
            tokens=predicted[None],
            nll=torch.from_numpy(loss * 30),
            predicted=predicted,
            utf8_bytes=predicted,
            power=power,
            error=power * error if error else power * 0,
        )

    for language in LANGUAGES:
        readings[DENSE, language] = reading(language, hard[language], 0)
    for calibration in LANGUAGES:
        everywhere = quality * rng.normal()
        for draw in range(seeds):
            name = f"{calibration}-{draw}"
            described[name] = columns(calibration, draw)
            for language in LANGUAGES:
                shift = everywhere + spread * rng.normal() - effect * (calibration == language)
                loss = hard[language] + 0.5 + shift + 0.05 * rng.normal(size=SEGMENTS)
                readings[name, language] = reading(language, loss, 0.1)
    subspace = LSAR().fit(rng.normal(size=(len(LANGUAGES), HIDDEN)))
    return contrasts.analyze(readings, described, [subspace], text)


def perplexity(frame):
    return frame[frame["metric"] == "log_perplexity"]


def test_planted_differences_are_found_with_their_size():
    frame = perplexity(study(effect=0.3, seeds=3))
    pairs = frame[frame["other_calibration"] != OTHERS]
    assert len(pairs) == len(LANGUAGES) * 6
    involved = (pairs["calibration"].astype(str) == pairs["language"].astype(str)) | (
        pairs["other_calibration"].astype(str) == pairs["language"].astype(str)
    )
    assert (pairs[involved]["p_adjusted"] < SIGNIFICANT).all()
    assert (pairs[~involved]["p_adjusted"] > SIGNIFICANT).all()
    assert pairs[involved]["value"].abs().mean() == pytest.approx(0.3, abs=0.03)
    assert (pairs["low"] < pairs["value"]).all()
    assert (pairs["value"] < pairs["high"]).all()
    assert (pairs["draws"] == 3).all()
    own = frame[(frame["other_calibration"] == OTHERS) & (frame["calibration"] != OWN)]
    assert (own["high"] < -0.2).all()
    (together,) = frame[frame["calibration"] == OWN].to_dict("records")
    assert together["value"] == pytest.approx(own["value"].mean() * 3 / 4)  # in which each set is compared twice
    assert together["low"] < together["value"] < together["high"] < -0.2
    assert together["p_value"] == pytest.approx(2 / 24)  # 4 sets can be dealt to 4 languages in 24 ways; two-sided


def test_draws_of_one_text_do_not_come_out_as_different():
    """No set differs from any other but for the draw: over ten studies hardly a comparison may say otherwise."""
    p_values = []
    for seed in range(10):
        frame = perplexity(study(effect=0, seeds=2, seed=seed))
        p_values += frame[frame["other_calibration"] != OTHERS]["p_adjusted"].tolist()
    assert len(p_values) == 240
    assert np.mean(np.less(p_values, SIGNIFICANT)) < 0.05


def test_with_one_draw_nothing_is_called_a_difference():
    frame = study(effect=1, seeds=1)
    assert {OTHERS} < set(frame["other_calibration"])
    assert frame["value"].notna().all()
    for column in ("low", "high", "df", "p_value", "p_adjusted"):
        assert frame[column].isna().all()


def test_no_own_language_has_a_p_value_below_one_over_the_sets():
    frame = perplexity(study(effect=1, seeds=2))
    own = frame[(frame["other_calibration"] == OTHERS) & (frame["calibration"] != OWN)]["p_value"]
    assert own.to_numpy() == pytest.approx(np.full(4, 1 / 4))


@pytest.mark.parametrize("quality", [0.0, 0.06])
def test_sets_that_are_better_everywhere_do_not_suit_their_own_language(quality):
    """Intervals of own against others hold whether or not sets differ in what they do to all languages."""
    covered = []
    for seed in range(25):
        frame = perplexity(study(effect=0, seeds=3, spread=0.02, seed=seed, quality=quality))
        own = frame[(frame["other_calibration"] == OTHERS) & (frame["calibration"] != OWN)]
        covered += ((own["low"] <= 0) & (own["high"] >= 0)).tolist()
    assert np.mean(covered) > 0.85


def test_all_metrics_are_compared_and_errors_alike_do_not_differ():
    frame = study(effect=0.3, seeds=2)
    parts = {"specific_error_db", "agnostic_error_db", "specific_minus_agnostic_db"}
    assert set(frame["metric"]) == {"log_perplexity", "snr_db", *parts}
    errors = frame[frame["metric"].isin(["specific_error_db", "agnostic_error_db"])]
    pairs = errors[errors["other_calibration"] != OTHERS]
    assert (pairs["p_adjusted"] > SIGNIFICANT).mean() > 0.9


def test_the_report_says_which_part_gains_more_by_the_evaluated_language():
    for seeds, ending in ((2, "which set belongs to which language)."), (1, "(one draw of each set: not tested).")):
        frame = study(effect=0.3, seeds=seeds)
        (said,) = _errors_by_own_language({"contrasts": frame}, {"method": "wanda"})
        rows = frame[(frame["calibration"] == OWN) & (frame["other_calibration"] == OTHERS)].set_index("metric")
        specific, agnostic = (rows.loc[f"{part}_error_db", "value"] for part in ("specific", "agnostic"))
        assert f"language-specific part by {specific:+.2f} dB" in said
        assert f"language-agnostic part by {agnostic:+.2f} dB" in said
        assert rows.loc["specific_minus_agnostic_db", "value"] == pytest.approx(specific - agnostic)
        assert f"the difference between the two is {specific - agnostic:+.2f} dB" in said
        assert said.endswith(ending)
        assert not list(_errors_by_own_language({"contrasts": frame.iloc[:0]}, {"method": "wanda"}))


def test_rows_say_what_text_the_draws_of_their_sets_share():
    """A quarter of two of three German draws, a half of the English ones; of one Arabic draw nothing is known."""
    tokens = {
        "ar": ((0, 9), (9, 18)),
        "de": ((0, 40), (30, 70), (70, 110)),
        "en": ((0, 40), (20, 60), (100, 140)),
        "zh": ((0, 4), (4, 8), (8, 12)),
    }
    text = {
        f"{name}-{draw}": (Drawn(language=name, pool="p", tokens=(of,)),)
        for name, ranges in tokens.items()
        for draw, of in enumerate(ranges)
    }
    frame = study(effect=0.3, seeds=3, text=text)
    shared = frame.groupby(["calibration", "other_calibration"], observed=True)["shared_text"].agg(["min", "max"])
    assert (shared["min"].dropna() == shared["max"].dropna()).all()
    expected = {("de", "en"): 0.5, ("de", "zh"): 0.25, ("en", "zh"): 0.5}
    assert {pair: share for pair, share in shared["max"].dropna().items() if OTHERS not in pair} == expected
    others = frame[frame["other_calibration"] == OTHERS]["shared_text"]
    assert others.isna().all()
    known = study(effect=0.3, seeds=2, text=text)  # of which the first two Arabic draws
    assert (known[known["other_calibration"] == OTHERS]["shared_text"] == 0.5).all()
    assert study(effect=0.3, seeds=2)["shared_text"].isna().all()
    assert (study(effect=0.3, seeds=1)["shared_text"] == 0).all()
