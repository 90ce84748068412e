"""The frame ``routing`` equals what a plain computation makes of the router's own choices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import plots
from analysis.frames import dense_columns, recipes_of
from analysis.metrics import routing
from analysis.report.routing import routing_of_dense, routing_of_recipe
from probes import DENSE, Readings

TOP_K = 2
COLUMNS = {
    DENSE: dense_columns("m"),
    "v": dense_columns("m") | {"method": "wanda", "sparsity": 0.5, "pattern": "row", "calibration": "en"},
}


def chosen(seed, preferred, segments=12, tokens=30, layers=3, experts=4):
    """Each token's experts, drawn with a preference; no two alike."""
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(segments, layers, tokens, experts)) + np.log(preferred)
    return np.argsort(-keys, axis=-1)[..., :TOP_K]


def reading(own, dense):
    """What is read of these choices; the block in the middle has no experts."""
    segments, layers, tokens, _ = own.shape
    routed = torch.zeros(segments, layers, 4, dtype=torch.int32)
    agreed = torch.zeros(segments, layers, dtype=torch.int32)
    for s, layer, t in product(range(segments), (0, 2), range(tokens)):
        for expert in own[s, layer, t]:
            routed[s, layer, expert] += 1
            agreed[s, layer] += int(expert in dense[s, layer, t])
    neurons = torch.tensor([[3, 3, 3, 3, 0], [0, 0, 0, 0, 5], [3, 3, 3, 3, 0]])
    empty = torch.zeros(0)
    counts = torch.full((segments,), tokens)
    return Readings(empty, empty, counts, empty, empty, empty, empty, empty, routed, agreed, neurons)


CHOICES = {
    (DENSE, "en"): chosen(0, [0.4, 0.3, 0.2, 0.1]),
    (DENSE, "sw"): chosen(1, [0.1, 0.2, 0.3, 0.4]),
    ("v", "en"): chosen(2, [0.1, 0.3, 0.2, 0.4]),
    ("v", "sw"): chosen(3, [0.1, 0.2, 0.4, 0.3]),
}


@pytest.fixture
def frame():
    readings = {(model, lang): reading(own, CHOICES[DENSE, lang]) for (model, lang), own in CHOICES.items()}
    return routing.analyze(readings, COLUMNS)


def shares(model, language, layer, part=slice(None)):
    own = CHOICES[model, language][part, layer]
    return np.array([(own == expert).mean() for expert in range(4)])


def value(frame, model, metric, **where):
    rows = frame[(frame["method"] == COLUMNS[model]["method"]) & (frame["metric"] == metric)]
    for name, wanted in where.items():
        rows = rows[rows[name].isna() if wanted is None else rows[name] == wanted]
    (row,) = rows.to_dict("records")
    assert row["low"] <= row["value"] <= row["high"]
    return row["value"]


def apart(one, other, layer):
    """The distance between two ``(model, language)``: who has more is seen on one half, how much on the other."""
    halves = [slice(0, None, 2), slice(1, None, 2)]
    total = 0.0
    for sign, size in (halves, halves[::-1]):
        for expert in range(4):
            more = shares(*one, layer, sign)[expert] > shares(*other, layer, sign)[expert]
            change = shares(*one, layer, size)[expert] - shares(*other, layer, size)[expert]
            total += (1 if more else -1) * change / 2 / 2
    return total


def test_shares_are_those_of_the_routers_own_choices(frame):
    for (model, language), layer, expert in product(CHOICES, (0, 2), range(4)):
        found = value(frame, model, "share", language=language, layer=layer, expert=expert)
        assert found == pytest.approx(shares(model, language, layer)[expert])
    assert set(frame["layer"].dropna()) == {0, 2}


def test_shift_and_moved_compare_with_the_dense_model_on_the_same_tokens(frame):
    for language in ("en", "sw"):
        found: dict[str, list[float]] = {"shift": [], "moved": []}
        for layer in (0, 2):
            before, after = (CHOICES[model, language][:, layer] for model in (DENSE, "v"))
            pairs = zip(before.reshape(-1, 2), after.reshape(-1, 2), strict=True)
            same = np.mean([len(set(one) & set(two)) for one, two in pairs])
            found["moved"].append(1 - same / TOP_K)
            found["shift"].append(apart((DENSE, language), ("v", language), layer))
            for metric, values in found.items():
                assert value(frame, "v", metric, language=language, layer=layer) == pytest.approx(values[-1])
        for metric, values in found.items():
            assert value(frame, "v", metric, language=language, layer=None) == pytest.approx(np.mean(values))
    assert not frame[frame["method"] == DENSE]["metric"].isin(["shift", "moved"]).any()


def test_languages_are_compared_with_each_other(frame):
    for model in COLUMNS:
        expected = [apart((model, "en"), (model, "sw"), layer) for layer in (0, 2)]
        where = {"language": "en", "other_language": "sw"}
        assert value(frame, model, "language_distance", layer=2, **where) == pytest.approx(expected[1])
        assert value(frame, model, "language_distance", layer=None, **where) == pytest.approx(np.mean(expected))
    assert len(frame[frame["metric"] == "language_distance"]) == 2 * 3


def test_translations_are_found_by_their_ids():
    """In whatever order they were read, and if each language lacks one of the other's."""
    order = np.random.default_rng(0).permutation(12)
    names = [str(k) for k in range(12)]
    straight = {(DENSE, lang): CHOICES[DENSE, lang] for lang in ("en", "sw")}
    shuffled = straight | {(DENSE, "sw"): CHOICES[DENSE, "sw"][order]}
    frames = [
        routing.analyze({place: reading(own, own) for place, own in chosen.items()}, COLUMNS, {"en": names, "sw": ids})
        for chosen, ids in ((straight, names), (shuffled, [names[k] for k in order]))
    ]
    first, second = (of[of["metric"] == "language_distance"].reset_index(drop=True) for of in frames)
    pd.testing.assert_frame_equal(first, second)
    lacking = {(DENSE, lang): CHOICES[DENSE, lang][part] for lang, part in (("en", np.s_[:-1]), ("sw", np.s_[1:]))}
    readings = {place: reading(own, own) for place, own in lacking.items()}
    found = routing.analyze(readings, COLUMNS, {"en": names[:-1], "sw": names[1:]})
    found = found[found["metric"] == "language_distance"]
    assert (found["n"] == 12).all()
    assert ((found["low"] < found["value"]) & (found["value"] < found["high"])).all()


def test_a_model_that_routes_alike_has_not_shifted():
    readings = {(model, lang): reading(own, own) for model in COLUMNS for lang, own in (("en", CHOICES[DENSE, "en"]),)}
    frame = routing.analyze(readings, COLUMNS)
    changes = frame[frame["metric"].isin(["shift", "moved"])]
    assert len(changes) == 6
    assert (changes[["value", "low", "high"]] == 0).all(axis=None)


def test_a_model_without_experts_has_no_rows():
    empty = torch.zeros(0)
    assert len(routing.analyze({(DENSE, "en"): Readings(*[empty] * 8)}, COLUMNS)) == 0


def test_the_frame_in_words_and_figures(frame):
    (dense,) = routing_of_dense(frame)
    (recipe,) = recipes_of(frame)
    (pruned,) = routing_of_recipe({"routing": frame}, recipe)
    means = frame[frame["layer"].isna()].astype({"metric": str}).groupby("metric")["value"].mean()
    between = value(frame, DENSE, "language_distance", language="en", other_language="sw", layer=None)
    assert f"shares of the experts in English and Swahili are {between:.2f} apart in total variation (mean" in dense
    third = frame.assign(language=frame["language"].astype(object).replace("en", "de"))
    (dense,) = routing_of_dense(pd.concat([frame, third.assign(value=third["value"] / 2)]))
    assert f"least for German and Swahili ({between / 2:.2f}), most for English and Swahili" in dense
    assert f"sends {means['moved']:.0%} of its top-k slots to experts that the dense model does not choose" in pruned
    assert f"shift by {means['shift']:.2f} in total variation, most in English" in pruned
    assert plots.routing.languages(frame)
    table = plots.routing.matrix(frame, recipe).axes[0]
    assert [text.get_text() for text in table.get_yticklabels()] == ["en"]
    assert len(plots.routing.layers(frame, recipe).axes) == 2
    assert not list(routing_of_dense(frame[frame["metric"] != "language_distance"]))


def test_intervals_widen_as_segments_differ():
    """All tokens of a segment alike: the interval is that of as few segments, not of as many tokens."""
    own = np.repeat(chosen(0, [0.4, 0.3, 0.2, 0.1], tokens=1), 30, axis=2)
    alike, apart_ = (
        routing.analyze({(DENSE, "en"): reading(each, each)}, COLUMNS)
        for each in (own, chosen(0, [0.4, 0.3, 0.2, 0.1]))
    )
    widths = [
        (rows["high"] - rows["low"]).mean() for rows in (frame[frame["metric"] == "share"] for frame in (alike, apart_))
    ]
    assert widths[0] > 3 * widths[1]


def test_layers_are_resampled_in_parts_alike(frame, monkeypatch):
    monkeypatch.setattr(routing, "_AT_ONCE", 4)
    readings = {(model, lang): reading(own, CHOICES[DENSE, lang]) for (model, lang), own in CHOICES.items()}
    pd.testing.assert_frame_equal(routing.analyze(readings, COLUMNS), frame)
