"""The frame ``lens`` is what plain means over positions give, and its sentences say only what intervals support."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import plots
from analysis.frames import dense_columns, recipes_of, tidy
from analysis.metrics import lens
from analysis.report.lens import lens_of_dense, lens_of_recipe
from probes import DENSE, LensReadings
from probes.lens import SHARED, UNSEEN
from probes.readers.lens import LENS_SUMS

NAMES = ("en", "sw", SHARED, UNSEEN)
COLUMNS = {
    DENSE: dense_columns("m"),
    "v": dense_columns("m") | {"method": "wanda", "sparsity": 0.5, "pattern": "row", "calibration": "en"},
}
LAYERS, SEGMENTS, POSITIONS = 4, 12, 5


def positions(seed, english=None):
    """Values at every position, ``[layers, segments, positions, values]``; `english`: its probability by layer."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(4, 0.25, (LAYERS, SEGMENTS, POSITIONS, len(LENS_SUMS)))
    mass = rng.dirichlet([4, 4, 2, 2], (LAYERS, SEGMENTS, POSITIONS))
    if english is not None:
        rest = mass[..., 1:] / mass[..., 1:].sum(axis=-1, keepdims=True)
        first = np.array(english)[:, None, None, None] * rng.uniform(0.95, 1.05, mass[..., :1].shape)
        mass = np.concatenate([first, (1 - first) * rest], axis=-1)
    return values, mass


def reading(values, mass):
    """Sums over the positions of every segment; the last segment has none."""
    sampled = torch.full((SEGMENTS + 1,), POSITIONS)
    sampled[-1] = 0
    summed = [
        torch.from_numpy(np.concatenate([each.sum(axis=2), np.zeros_like(each[:, :1, 0])], axis=1)[None])
        for each in (values, mass)
    ]
    return LensReadings(NAMES, torch.arange(LAYERS), torch.tensor([30, 10, 20, 40]), torch.zeros(0), sampled, *summed)


def farther(dense, english):
    """Values of a variant whose predictions are as far from the end as before, and farther from block 2 on."""
    values, mass = positions(2, english)
    away = np.random.default_rng(5).normal(
        [[[0]], [[0]], [[1]], [[1]]], [[[0]], [[0]], [[0.2]], [[0.2]]], values[..., 0].shape
    )
    values[..., 0] = dense[0][..., 0] + away
    return values, mass


#: In Swahili text, the dense model predicts English after blocks 1 and 2 only; the variant less so.
READ = {
    (DENSE, "en"): positions(0, [0.5, 0.6, 0.6, 0.7]),
    (DENSE, "sw"): positions(1, [0.1, 0.8, 0.8, 0.02]),
}
READ["v", "en"] = farther(READ[DENSE, "en"], [0.5, 0.6, 0.6, 0.7])
READ["v", "sw"] = farther(READ[DENSE, "sw"], [0.1, 0.5, 0.5, 0.02])


@pytest.fixture(scope="module")
def frame():
    return lens.analyze({key: reading(*own) for key, own in READ.items()}, COLUMNS)


def by_hand(metric, values, before, mass, mass_before, kind, own):
    """A metric after one block, from the values at all positions of this model and of the dense one."""
    if metric in (places := ("kl", "entropy", "next_token_loss", "agreement")):
        return values[..., places.index(metric)].mean()
    if metric == "kl_change":
        return (values - before)[..., 0].mean()
    subtracted = {"token_share": 0, "token_share_change": mass_before[..., kind], "token_share_lead": mass[..., own]}
    return (mass[..., kind] - subtracted[metric]).mean()


def test_values_are_means_over_positions(frame):
    assert len(frame[frame["metric"] == "kl"]) == 4 * LAYERS
    assert set(frame["n"].dropna()) == {SEGMENTS}
    for row in frame[frame["layer"].notna()].to_dict("records"):
        model = DENSE if row["method"] == DENSE else "v"
        (values, mass), (before, mass_before) = READ[model, row["language"]], READ[DENSE, row["language"]]
        layer, kind = int(row["layer"]), row["other_language"]
        at, own = NAMES.index(kind) if isinstance(kind, str) else None, NAMES.index(row["language"])
        expected = by_hand(row["metric"], values[layer], before[layer], mass[layer], mass_before[layer], at, own)
        assert row["value"] == pytest.approx(expected)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["lens"] == "logit"


def test_the_vocabulary_is_described_once(frame):
    rows = frame[frame["metric"] == "vocabulary_share"].set_index("other_language")["value"]
    assert rows.to_dict() == {"en": 0.3, "sw": 0.1, SHARED: 0.2, UNSEEN: 0.4}


def test_changes_are_of_pruned_models_and_leads_of_other_languages(frame):
    changed = frame[frame["metric"].isin(["kl_change", "token_share_change"])]
    assert set(changed["method"]) == {"wanda"}
    lead = frame[frame["metric"] == "token_share_lead"]
    assert set(zip(lead["language"], lead["other_language"], strict=True)) == {("en", "sw"), ("sw", "en")}


def test_sentences_say_where_another_language_leads(frame):
    (said,) = lens_of_dense(frame)
    assert "Swahili text, English tokens after blocks 1-2" in said
    assert "Of text in English this holds after no block" in said


def test_more_tokens_of_a_language_in_the_vocabulary_are_no_lead():
    """English has 0.2 more of the vocabulary than Swahili; a prediction that knows nothing gives it 0.2 more."""
    even = positions(1)
    even[1][:] = np.random.default_rng(0).normal([0.29, 0.1, 0.2, 0.4], 0.01, even[1].shape)
    readings = {(DENSE, "en"): reading(*READ[DENSE, "en"]), (DENSE, "sw"): reading(*even)}
    (said,) = lens_of_dense(lens.analyze(readings, COLUMNS))
    assert "no other language" in said


def test_sentences_count_cases_whose_interval_excludes_zero(frame):
    (recipe,) = recipes_of(frame)
    farther, tokens = lens_of_recipe({"lens": frame}, recipe)
    assert "in 4 of 8 cases" in farther
    assert "nearer in 0" in farther
    assert "tokens of English, in text of other languages, gain probability in 0 of 4 cases and lose it in 2" in tokens


def test_without_a_lens_there_is_nothing_to_say():
    empty = lens.analyze({}, COLUMNS)
    assert not len(empty)
    assert not list(lens_of_dense(tidy("lens", [])))


def test_figures_show_what_is_in_the_frame(frame, tmp_path):
    (recipe,) = recipes_of(frame)
    for width in (plots.COLUMN_WIDTH, plots.PAGE_WIDTH):
        by_layer = plots.lens.layers(frame, recipe, width=width)
        tokens = plots.lens.tokens(frame, recipe, width=width)
        everything = plots.lens.languages(frame, width=width)
        for figure, lines in ((by_layer, 2), (tokens, 4), (everything, 2)):
            panels = [axes for axes in figure.axes if axes.get_visible()]
            assert len(panels) == 2
            assert all(len(axes.lines) == lines for axes in panels)
    dense = frame[(frame["metric"] == "kl") & (frame["method"] == DENSE) & (frame["language"] == "sw")]
    swahili = next(axes for axes in by_layer.axes if axes.get_title() == "Swahili (sw)")
    black = next(line for line in swahili.lines if line.get_color() == plots.style.BLACK)
    assert black.get_ydata() == pytest.approx(dense.sort_values("layer")["value"])
    assert all(path.stat().st_size > 2000 for path in plots.save(tokens, tmp_path, "tokens"))


def test_both_lenses_have_their_rows_and_the_tuned_one_its_share(frame):
    def both(first, second):
        values = {name: torch.cat([getattr(one, name) for one in (first, second)]) for name in ("sums", "mass")}
        return replace(first, explained=torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64), **values)

    readings = {key: both(reading(*own), reading(*READ[DENSE, key[1]])) for key, own in READ.items()}
    found = lens.analyze(readings, COLUMNS)
    shares = found[found["metric"] == "translated_share"]
    assert shares["value"].tolist() == [0.2, 0.5, 0.9, 1.0]
    assert set(shares["lens"]) == {"tuned"}
    logit = found[(found["lens"] == "logit") | (found["metric"] == "vocabulary_share")]
    pd.testing.assert_frame_equal(logit.reset_index(drop=True), frame, check_categorical=False)
    change = found[(found["lens"] == "tuned") & (found["metric"] == "kl_change")]
    assert (change["value"] == 0).all()  # whose second reading is that of the dense model
    (recipe,) = recipes_of(found)
    assert "Through the tuned lens" in next(lens_of_recipe({"lens": found}, recipe))
    titles = [plots.lens.layers(found, recipe, lens=name).get_suptitle() for name in ("logit", "tuned")]
    assert "logit lens" in titles[0]
    assert "tuned lens" in titles[1]
