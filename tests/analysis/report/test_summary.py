"""The findings that the report begins with, from small frames with planted effects."""

from __future__ import annotations

import pytest

from analysis.frames import STUDY_FRAMES, tidy
from analysis.report.summary import MOST, MOST_OF_A_KIND, summary

PLACE = {"model": "m", "pattern": "row", "allocation": "uniform", "scope": "all", "propagation": "pruned", "bits": 9.0}
FIGURE = "contrasts-wanda-0.5-row-pruned"


def wanda(sparsity=0.5, **more):
    return PLACE | {"method": "wanda", "sparsity": sparsity} | more


def effect(value, half):
    return {"value": value, "low": value - half, "high": value + half, "n": 8}


def with_test(value, half, p=0.001):
    return effect(value, half) | {"draws": 3, "df": 4.0, "p_value": p, "p_adjusted": p}


def own(metric, value, half, sparsity=0.5):
    names = {"calibration": "own", "other_calibration": "others", "metric": metric, "shared_text": 0.0}
    return wanda(sparsity) | names | with_test(value, half)


def found(drawn=(), **rows):
    sparsities = sorted({row["sparsity"] for some in rows.values() for row in some}) or [0.5]
    perplexity = [
        wanda(sparsity, calibration="en", seed=0, language="en", metric="perplexity", **effect(9.0, 1.0))
        for sparsity in sparsities
    ]
    frames = {name: tidy(name, {"perplexity": perplexity, **rows}.get(name, [])) for name in STUDY_FRAMES}
    return summary(frames, {}, drawn)


def test_an_effect_is_said_with_its_interval_its_frame_and_its_figure():
    (finding,) = found([FIGURE], contrasts=[own("log_perplexity", -0.5, 0.1)])
    assert finding.sentence == (
        "Wanda, sparsity 0.5, per row: calibrating on the evaluated language multiplies its perplexity by 0.61 "
        "[0.55, 0.67] relative to other languages."
    )
    assert (finding.frame, finding.figure) == ("contrasts", FIGURE)
    assert finding.strength == pytest.approx(5)


def test_a_finding_is_not_linked_to_a_figure_that_is_not_there():
    (finding,) = found(contrasts=[own("log_perplexity", -0.5, 0.1)])
    assert finding.figure == ""


def test_what_may_be_nothing_is_no_finding():
    assert found(contrasts=[own("log_perplexity", -0.5, 0.6)]) == []
    without = own("log_perplexity", -0.5, 0.1) | {"low": float("nan"), "high": float("nan")}
    assert found(contrasts=[without]) == []


def test_the_surest_comes_first_whatever_its_unit():
    rows = [own("log_perplexity", -0.5, 0.2), own("specific_minus_agnostic_db", -3.0, 0.5)]
    first, second = found(contrasts=rows)
    assert first.sentence.endswith("more than the language-agnostic part, by 3.00 dB [2.50, 3.50].")
    assert first.strength > second.strength


def test_one_kind_does_not_crowd_out_the_others():
    sparsities = [0.1, 0.2, 0.3, 0.4]
    rows = [own("log_perplexity", -0.5, 0.01, s) for s in sparsities]
    rows += [own("specific_minus_agnostic_db", 1.0, 0.5)]
    shown = found(contrasts=rows)
    assert [finding.kind for finding in shown].count("own language, perplexity") == MOST_OF_A_KIND
    assert "own language, parts of the stream" in [finding.kind for finding in shown]
    assert len(shown) <= MOST


def test_of_pairs_of_sets_only_what_stays_significant_counts():
    pair = {"language": "sw", "metric": "log_perplexity", "shared_text": 0.0}
    rows = [
        wanda(calibration="en", other_calibration="sw", **pair, **with_test(0.6931, 0.1)),
        wanda(calibration="en", other_calibration="ru", **pair, **with_test(0.9, 0.1, p=0.2)),
    ]
    (finding,) = found(contrasts=rows)
    assert finding.sentence == (
        "Wanda, sparsity 0.5, per row: in Swahili, calibrating on en gives 2.00 times [1.81, 2.21] the perplexity of "
        "calibrating on sw, the only significant difference between two sets."
    )


def test_of_answers_the_median_model_is_reported_and_guesses_are_not():
    asked = {"task": "bundled", "part": "all", "metric": "twin_accuracy_change"}
    rows = [
        wanda(calibration=name, seed=0, category="knowledge", at_chance=False, **asked, **effect(value, 0.05))
        for name, value in (("ar", -0.3), ("en", -0.2), ("sw", -0.1))
    ]
    rows += [wanda(calibration="en", seed=0, category="reasoning", at_chance=True, **asked, **effect(-0.4, 0.05))]
    (finding,) = found(accuracy=rows)
    assert finding.sentence == (
        "Wanda, sparsity 0.5, per row: accuracy of the median of 3 models in knowledge (bundled) changes by -20.0 "
        "points [-25.0, -15.0]."
    )
