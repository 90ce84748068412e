"""Planted differences between what categories lose, and differences that are none."""

from __future__ import annotations

import re

import numpy as np
import pytest

from analysis import plots
from analysis.frames import dense_columns, tidy
from analysis.metrics import task_contrasts
from analysis.metrics.contrasts import OTHERS, OWN
from analysis.report import findings

LANGUAGES = ("ar", "de", "en", "zh")
CATEGORIES = ("fluency", "reasoning")
TEMPLATES, PAIRS = 24, 2
RECIPE = {"method": "wanda", "sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all"}
RECIPE |= {"propagation": "pruned"}


def study(loses, *, draws=3, seed=0, spread=0.05, guesses=(), recipes=1, perplexity=None, kinds=None, paired=True):
    """Frames of models that lose ``loses(category, calibration, language)`` nats of margin.

    Parameters
    ----------
    spread
        Of what each draw adds to a language.
    guesses
        Categories in which the dense model is at chance.
    perplexity
        Log perplexity that a nat of margin costs; no perplexity by default.
    kinds
        Kinds that the templates of a category have in turn.
    paired
        Whether both categories have the same templates.
    """
    rng = np.random.default_rng(seed)
    names = np.repeat([f"t{t}-{p}" for t in range(TEMPLATES) for p in range(PAIRS)], 2)
    template = np.repeat([f"t{t}" for t in range(TEMPLATES)], 2 * PAIRS)
    hard = {
        (category, language): np.repeat(rng.normal(0 if category in guesses else 3, 1, TEMPLATES), 2 * PAIRS)
        for category in CATEGORIES
        for language in LANGUAGES
    }
    dense = dense_columns("m")
    models = [(dense, None)]
    for recipe in range(recipes):
        described = dense | RECIPE | {"sparsity": 0.5 + recipe / 10}
        models += [(described | {"calibration": name, "seed": k}, recipe) for name in LANGUAGES for k in range(draws)]
    rows, lost_text = [], []
    for columns, recipe in models:
        for language in LANGUAGES:
            shift = 0.0 if recipe is None else spread * rng.normal()
            worse = 0.0
            for category in CATEGORIES:
                margin = hard[category, language]
                if recipe is not None:
                    lost = loses(category, columns["calibration"], language) + recipe
                    worse += lost / len(CATEGORIES)
                    noise = np.repeat(rng.normal(size=TEMPLATES), 2 * PAIRS) * 0.1
                    margin = margin - lost + shift + noise
                of = template if paired else np.char.add(f"{category}-", template)
                about = {"category": category, "template": of, "twin": names, "item": item_names(names)}
                about |= {} if kinds is None else {"kind": np.resize(np.repeat(kinds, 2 * PAIRS), len(names))}
                place = {**columns, "language": language, "task": "mine"}
                about = {name: np.array(of) if not isinstance(of, str) else of for name, of in about.items()}
                rows.append({**place, **about, "metric": np.full(len(names), "margin"), "value": margin})
                correct = (margin > 0).astype(float)
                rows.append({**place, **about, "metric": np.full(len(names), "correct"), "value": correct})
            if perplexity is not None:
                value = float(np.exp(3 + perplexity * (worse - shift)))
                lost_text.append({**columns, "language": language, "metric": "perplexity", "value": value, "n": 1})
    return task_contrasts.analyze(tidy("items", rows), tidy("perplexity", lost_text))


def item_names(names):
    return np.array([f"{name}{'ab'[k % 2]}" for k, name in enumerate(names)])


def shown(frame, metric="margin_drop", **where):
    rows = frame[frame["metric"] == metric]
    for column, value in where.items():
        rows = rows[rows[column].isna() if value is None else rows[column] == value]
    return rows


def test_a_category_that_loses_more_is_found_with_what_it_loses():
    frame = study(lambda category, calibration, language: 0.5 + 0.4 * (category == "reasoning"))
    (everywhere,) = shown(frame, contrast="category", language=None).to_dict("records")
    assert everywhere["category"] == "reasoning"
    assert everywhere["other_category"] == "fluency"
    assert everywhere["value"] == pytest.approx(0.4, abs=0.05)
    assert everywhere["low"] < everywhere["value"] < everywhere["high"]
    assert everywhere["p_adjusted"] < 1e-3
    single = shown(frame, contrast="category")
    single = single[single["calibration"].notna()]
    assert len(single) == len(LANGUAGES) ** 2
    assert (single["p_adjusted"] < 0.05).mean() > 0.9
    assert (single["draws"] == 3).all()
    assert (single["n"] == TEMPLATES).all()


def test_a_set_that_is_better_at_one_category_is_told_from_one_that_is_better():
    def loses(category, calibration, language):
        return 0.5 - 0.3 * (calibration == "en") - 0.4 * (calibration == "de" and category == "reasoning")

    frame = shown(study(loses, spread=0.02), contrast="calibration_by_category")
    of_german = (frame["calibration"] == "de") | (frame["other_calibration"] == "de")
    assert len(frame) == len(LANGUAGES) * 6
    assert frame[of_german]["value"].abs().mean() == pytest.approx(0.4, abs=0.05)
    assert (frame[of_german]["p_adjusted"] < 0.05).all()
    assert (frame[~of_german]["p_adjusted"] > 0.05).all()


def test_an_own_language_that_counts_for_reasoning_only():
    def loses(category, calibration, language):
        quality = {"ar": 0.0, "de": 0.3, "en": 0.1, "zh": 0.6}[calibration]
        return 0.5 + quality - 0.4 * (calibration == language and category == "reasoning")

    frame = study(loses, spread=0.02)
    for contrast, category, expected in (
        ("own", "fluency", 0.0),
        ("own", "reasoning", -0.4),
        ("own_by_category", "reasoning", -0.4),
    ):
        rows = shown(frame, contrast=contrast, category=category, other_calibration=OTHERS)
        (together,) = rows[rows["calibration"] == OWN].to_dict("records")
        assert together["value"] == pytest.approx(expected, abs=0.03)
        assert together["p_value"] == pytest.approx(2 / 24) or expected == 0
        alone = rows[rows["calibration"] != OWN]
        assert len(alone) == len(LANGUAGES)
        assert ((alone["high"] < 0) == bool(expected)).mean() > 0.7


def test_draws_and_templates_alone_make_no_difference():
    p_values, covered = [], []
    for seed in range(4):
        frame = study(lambda *cell: 0.5, draws=2, seed=seed, spread=0.1)
        tested = frame[frame["metric"].isin(["margin_drop", "accuracy_drop"])]
        p_values += tested[~tested["contrast"].astype(str).str.startswith("own")]["p_value"].tolist()
        covered += ((tested["low"] <= 0) & (tested["high"] >= 0)).tolist()
    assert len(p_values) > 500
    assert np.mean(np.less(p_values, 0.05)) < 0.08
    assert 0.92 < np.mean(covered) < 0.99


def test_with_one_draw_nothing_is_called_a_difference():
    frame = study(lambda category, calibration, language: 2.0 * (category == "reasoning"), draws=1)
    assert len(frame)
    assert {"category", "calibration", "own"} <= set(frame["contrast"])
    for column in ("low", "high", "df", "p_value", "p_adjusted"):
        assert frame[column].isna().all()


def test_where_the_dense_model_guesses_there_is_no_drop():
    frame = study(lambda category, *_: 0.5, guesses=("reasoning",))
    for contrast in ("category", "calibration_by_category"):
        rows = shown(frame, contrast=contrast)
        assert rows["at_chance"].all()
        assert rows[["low", "high", "p_value", "p_adjusted"]].isna().all().all()
        assert rows["language"].notna().all()  # nothing is left to take the mean of
    sets = shown(frame, contrast="calibration")
    assert not sets[sets["category"] == "fluency"]["at_chance"].any()
    assert sets[sets["category"] == "fluency"]["p_value"].notna().all()
    assert set(shown(frame, contrast="own")["category"]) == {"fluency"}


def test_what_perplexity_predicts_is_taken_out():
    """Sets that lose more of everything are no worse at equal perplexity; one that loses more of reasoning is."""

    def loses(category, calibration, language):
        return {"ar": 0.2, "de": 0.5, "en": 0.8, "zh": 1.1}[calibration] + 0.3 * (
            calibration == "en" and category == "reasoning"
        )

    frame = study(loses, spread=0.02, recipes=2, perplexity=1.0)
    assert set(frame["metric"]) == {"margin_drop", "accuracy_drop", "margin_drop_matched", "accuracy_drop_matched"}
    raw = shown(frame, contrast="calibration", category="fluency")
    assert (raw["p_adjusted"] < 0.05).all()
    matched = shown(frame, "margin_drop_matched", contrast="calibration", category="fluency")
    others = (matched["calibration"] != "en") & (matched["other_calibration"] != "en")
    assert matched[others]["value"].abs().max() < 0.1
    by_category = shown(frame, "margin_drop_matched", contrast="calibration_by_category")
    english = (by_category["calibration"] == "en") | (by_category["other_calibration"] == "en")
    assert by_category[english]["value"].abs().mean() == pytest.approx(0.3, abs=0.06)
    assert "category" not in set(shown(frame, "margin_drop_matched")["contrast"])


def test_a_category_in_which_no_model_loses_anything_makes_nothing_certain():
    """Its slope over perplexity has no error, and the other category's is not lost beside it."""
    loses = lambda category, calibration, language: 2.0 + (calibration == "en") if category == "reasoning" else 0.0  # noqa: E731
    frame = study(loses, perplexity=1.0, paired=False)
    never = shown(frame, "accuracy_drop", contrast="calibration", category="fluency")
    assert (never["value"] == 0).all()
    rows = shown(frame, "accuracy_drop_matched", contrast="calibration_by_category")
    assert rows["low"].notna().all()
    assert (rows["high"] - rows["low"] > 0.01).all()
    assert (rows["p_value"] > 0).all()


def test_few_variants_are_not_matched():
    frame = study(lambda *_: 0.5, draws=1, perplexity=1.0)
    assert "margin_drop_matched" in set(frame["metric"])  # four variants
    assert "margin_drop_matched" not in set(study(lambda *_: 0.5, draws=1)["metric"])


def test_kinds_are_compared_with_the_rest_of_their_category(monkeypatch):
    monkeypatch.setitem(globals(), "TEMPLATES", 40)  # so that each kind has enough to be shown above chance
    frame = study(lambda *_: 0.5, kinds=["order", "quantity"])
    rows = shown(frame, contrast="category", language=None, other_category="rest")
    assert set(rows["part"]) == {"kind order", "kind quantity"}
    reasoning = rows[rows["category"] == "reasoning"]["value"]
    assert reasoning.iloc[0] == pytest.approx(-reasoning.iloc[1])


@pytest.mark.parametrize("contrast", ["category", "own"])
def test_figures_say_where_the_dense_model_guesses(contrast, tmp_path):
    frame = study(lambda category, *_: 0.5 * (category == "reasoning"), guesses=("reasoning",))
    figure = plots.task_contrasts.effects(frame, RECIPE, contrast=contrast, task="mine")
    (axes,) = (axes for axes in figure.axes if axes.get_title())
    written = [label.get_text() for label in axes.get_yticklabels()]
    if contrast == "category":
        assert axes.get_title() == "reasoning minus fluency"
        assert written == [f"{language} (chance)" for language in reversed(LANGUAGES)]
    else:
        assert axes.get_title() == "fluency"
        assert written == ["all languages", *reversed(LANGUAGES)]
    assert min(file.stat().st_size for file in plots.save(figure, tmp_path, "f")) > 2000


def test_words_say_what_is_significant_and_what_cannot_be_tested():
    def words(draws):
        frame = study(lambda category, *_: 0.5 + 1.5 * (category == "reasoning"), draws=draws)
        return " ".join(findings._between_categories({"task_contrasts": frame}, RECIPE))

    assert re.search(r"Pruning costs reasoning \+\d+\.\d points \[\+.*\] more than fluency .*; significant", words(3))
    assert "cannot be tested" in words(1)
    assert "; significant" not in words(1)


def test_nothing_asked_is_an_empty_frame():
    assert len(task_contrasts.analyze(tidy("items", []), tidy("perplexity", []))) == 0
