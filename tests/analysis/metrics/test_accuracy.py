from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import plots
from analysis.frames import RECIPE_COLUMNS, dense_columns, joined, labels, tidy
from analysis.metrics import accuracy as tasks
from analysis.report import findings
from probes import DENSE, ChoiceScores
from probes.items import Item

LANGUAGES = ("en", "sw")
PRUNED = dense_columns("m") | {"method": "magnitude", "sparsity": 0.5}
COLUMNS = {DENSE: dense_columns("m"), "pruned": PRUNED}


def planted_items(twins=6, alone=3):
    """Twins in two categories, items without a twin in one of them."""
    items = []
    for number in range(twins):
        category = ("knowledge", "reasoning")[number % 2]
        for answer, letter in enumerate("ab"):
            shared = {"twin": f"t{number}", "category": category, "choices": (" x", " y", " z")}
            items.append(Item(id=f"t{number}{letter}", prompt=letter, answer=answer, **shared))
    items += [
        Item(id=f"alone{i}", prompt="p", choices=(" x", " y"), answer=1, category="reasoning") for i in range(alone)
    ]
    return items


def planted_scores(items, seed):
    values = np.random.default_rng(seed).normal(size=(len(items), 3)).round(6) - 10
    for row, item in zip(values, items, strict=True):
        row[len(item.choices) :] = -np.inf
    return ChoiceScores(values, np.array([item.answer for item in items]))


@pytest.fixture(scope="module")
def asked():
    items = {language: planted_items() for language in LANGUAGES}
    scores = {
        (model, language): planted_scores(items[language], seed=10 * i + j)
        for i, model in enumerate(COLUMNS)
        for j, language in enumerate(LANGUAGES)
    }
    return items, scores


def margins_by_hand(items, scores):
    """Item's id to the margin, choice by choice."""
    found = {}
    for item, values in zip(items, scores.values, strict=True):
        others = [values[i] for i in range(len(item.choices)) if i != item.answer]
        found[item.id] = values[item.answer] - max(others)
    return found


def accuracy_by_hand(items, margins):
    return np.mean([margins[item.id] > 0 for item in items])


def twin_accuracy_by_hand(items, margins):
    sums = {}
    for item in items:
        sums.setdefault(item.twin, []).append(margins[item.id])
    return np.mean([sum(both) > 0 for both in sums.values() if len(both) == 2])


def margin_by_hand(items, margins):
    return np.mean([margins[item.id] for item in items])


BY_HAND = {"accuracy": accuracy_by_hand, "twin_accuracy": twin_accuracy_by_hand, "margin": margin_by_hand}


def value(frame, metric, language, category, method="magnitude", part="all"):
    """The one row that there must be."""
    rows = frame[(frame["metric"] == metric) & (frame["category"] == category) & (frame["method"] == method)]
    rows = rows[rows["language"].isna() if language is None else rows["language"] == language]
    rows = rows[rows["part"] == part]
    (row,) = rows.to_dict("records")
    return row


def test_the_frame_of_items_says_kind_template_grade_and_domain():
    known = {"kind": "order", "template": "queue", "grade": 2, "domain": "law"}
    items = [
        Item(id="1", prompt="p", choices=(" x", " y"), answer=0, **known),
        Item(id="2", prompt="p", choices=(" x", " y"), answer=1),
    ]
    frame = tasks.item_frame({(DENSE, "en"): planted_scores(items, 0)}, {"en": items}, COLUMNS, "mine")
    described = frame[frame["metric"] == "margin"].set_index("item")[list(known)]
    assert described.loc["1"].to_dict() == known
    assert described.loc["2", "template"] == "2"
    assert described.loc["2", ["kind", "grade", "domain"]].isna().all()


def test_the_frame_of_items_has_every_choice_and_every_margin(asked):
    items, scores = asked
    frame = tasks.item_frame(scores, items, COLUMNS, "mine")
    for (model, language), found in scores.items():
        rows = frame[(frame["method"] == COLUMNS[model]["method"]) & (frame["language"] == language)]
        margins = rows[rows["metric"] == "margin"].set_index("item")["value"].to_dict()
        assert margins == pytest.approx(margins_by_hand(items[language], found))
        correct = rows[rows["metric"] == "correct"].set_index("item")["value"].to_dict()
        assert correct == {name: float(margin > 0) for name, margin in margins.items()}
        likely = rows[rows["metric"] == "log_likelihood"].set_index(["item", "choice"])["value"].to_dict()
        assert likely == {
            (item.id, choice): found.values[i, choice]
            for i, item in enumerate(items[language])
            for choice in range(len(item.choices))
        }
    assert set(frame["task"]) == {"mine"}
    assert dict(zip(frame["item"], frame["twin"], strict=True)) == {item.id: item.twin for item in items["en"]}


def test_shares_margins_and_changes_equal_those_by_hand(asked):
    items, scores = asked
    frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
    margins = {key: margins_by_hand(items[key[1]], found) for key, found in scores.items()}
    for language in LANGUAGES:
        for category in ("knowledge", "reasoning"):
            own = [item for item in items[language] if item.category == category]
            for metric, by_hand in BY_HAND.items():
                before, after = (by_hand(own, margins[model, language]) for model in COLUMNS)
                assert value(frame, metric, language, category, DENSE)["value"] == pytest.approx(before)
                row = value(frame, metric, language, category)
                assert row["value"] == pytest.approx(after)
                assert row["n"] == len(own)
                assert row["low"] <= row["value"] <= row["high"]
                assert value(frame, f"{metric}_change", language, category)["value"] == pytest.approx(after - before)
    assert not frame[frame["method"] == DENSE]["metric"].astype(str).str.endswith("_change").any()
    assert len(frame) == 2 * (len(LANGUAGES) + 1) * (3 + 6)


def test_pooled_rows_count_every_language(asked):
    items, scores = asked
    uneven = {"en": items["en"], "sw": items["sw"][:4]}
    cut = {
        (model, language): ChoiceScores(found.values[: len(uneven[language])], found.answers[: len(uneven[language])])
        for (model, language), found in scores.items()
    }
    frame = tasks.analyze(tasks.item_frame(cut, uneven, COLUMNS, "mine"))
    margins = {key: margins_by_hand(uneven[key[1]], found) for key, found in cut.items()}
    for category in ("knowledge", "reasoning"):
        own = {lang: [item for item in uneven[lang] if item.category == category] for lang in LANGUAGES}
        row = value(frame, "margin", None, category)
        assert row["n"] == sum(map(len, own.values()))
        expected = [margins["pruned", lang][item.id] for lang in LANGUAGES for item in own[lang]]
        assert row["value"] == pytest.approx(np.mean(expected))
        right = [margin > 0 for margin in expected]
        assert value(frame, "accuracy", None, category)["value"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("translated", [True, False])
def test_pooled_intervals_draw_a_question_together_with_its_translations(translated):
    """What one language loses the other gains, question by question: over both, nothing is left to chance.

    Unless the questions have nothing in common but their number, and so names of their own.
    """
    items = {language: planted_items(twins=8, alone=0) for language in LANGUAGES}
    if not translated:
        items = {
            language: [
                item.model_copy(
                    update={name: f"{language}-{getattr(item, name)}" for name in ("id", "twin", "template")}
                )
                for item in own
            ]
            for language, own in items.items()
        }
    found = planted_scores(items["en"], 3)
    margin = np.random.default_rng(4).normal(size=len(items["en"]))

    def with_margins(margins):
        values = np.full(found.values.shape, -20.0)
        values[np.arange(len(values)), found.answers] = -20 + margins
        values[:, 2] = -40
        return ChoiceScores(values, found.answers)

    scores = {(DENSE, lang): with_margins(np.zeros(len(margin))) for lang in LANGUAGES}
    scores |= {("pruned", "en"): with_margins(margin), ("pruned", "sw"): with_margins(-margin)}
    frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
    for category in ("knowledge", "reasoning"):
        apart = value(frame, "margin_change", "en", category)
        assert apart["high"] - apart["low"] > 0.1
        pooled = value(frame, "margin_change", None, category)
        assert pooled["value"] == pytest.approx(0, abs=1e-12)
        if translated:
            assert [pooled["low"], pooled["high"]] == pytest.approx([0, 0], abs=1e-12)
        else:
            assert pooled["high"] - pooled["low"] > 0.1


def test_a_model_compared_with_itself_changes_nothing(asked):
    items, scores = asked
    same = {(model, language): scores[DENSE, language] for model in COLUMNS for language in LANGUAGES}
    frame = tasks.analyze(tasks.item_frame(same, items, COLUMNS, "mine"))
    changes = frame[frame["metric"].astype(str).str.endswith("_change")]
    assert len(changes) == 3 * 2 * 3
    assert (changes["value"] == 0).all()
    margins = changes[changes["metric"] == "margin_change"]
    assert (margins[["low", "high"]] == 0).all().all()
    shares = changes[changes["metric"] != "margin_change"]  # so few items do not tell that none can ever change
    assert (shares["low"] < 0).all()
    assert (shares["high"] > 0).all()


def test_intervals_draw_twins_together():
    """Of every pair of twins one is right, whatever else: that says more than as many items alone."""
    items = {"en": planted_items(twins=20, alone=0)}
    values = np.tile([-1.0, -2.0, -3.0], (40, 1))  # always the first choice
    scores = {(model, "en"): ChoiceScores(values, np.array([i.answer for i in items["en"]])) for model in COLUMNS}
    frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
    for category in ("knowledge", "reasoning"):
        row = value(frame, "accuracy", "en", category)
        assert row["value"] == 0.5
        together = row["high"] - row["low"]
        assert value(frame, "twin_accuracy", "en", category)["value"] == 0  # what it prefers anyway cancels
    alone = {"en": [item.model_copy(update={"twin": item.id, "template": item.id}) for item in items["en"]]}
    frame = tasks.analyze(tasks.item_frame(scores, alone, COLUMNS, "mine"))
    row = value(frame, "accuracy", "en", "reasoning")
    assert row["low"] < 0.5 < row["high"]
    assert row["high"] - row["low"] > 1.1 * together
    assert "twin_accuracy" not in set(frame["metric"])


def correct_only(task, languages, seed):
    """Items that are generated and not chosen, as the harness's MGSM."""
    rng = np.random.default_rng(seed)
    names = {"item": list("abcdefgh"), "twin": list("abcdefgh"), "category": ["math"] * 8, "metric": ["correct"] * 8}
    rows = [
        {**columns, "language": language, "task": task, **names, "value": rng.integers(0, 2, 8).astype(float)}
        for columns in COLUMNS.values()
        for language in languages
    ]
    return tidy("items", rows)


def test_items_that_are_only_right_or_wrong_have_an_accuracy_and_nothing_else():
    items = correct_only("mgsm", ["en"], 0)
    frame = tasks.analyze(items)
    assert set(frame["metric"]) == {"accuracy", "accuracy_change"}
    by_hand = items.groupby("method", observed=True)["value"].mean()
    assert value(frame, "accuracy", "en", "math")["value"] == by_hand["magnitude"]
    change = value(frame, "accuracy_change", "en", "math")
    assert change["value"] == pytest.approx(by_hand["magnitude"] - by_hand["dense"])
    assert frame["language"].notna().all()


@pytest.mark.parametrize("languages", [("en",), LANGUAGES])
def test_items_without_margins_lie_beside_others_that_have_them(asked, languages):
    items, scores = asked
    mine = tasks.item_frame(scores, items, COLUMNS, "mine")
    frame = tasks.analyze(joined("items", [mine, correct_only("mgsm", languages, 1)]))
    apart = frame[frame["task"] == "mgsm"]
    assert set(apart["metric"]) == {"accuracy", "accuracy_change"}
    # one language is not pooled with itself
    assert set(apart["language"].astype(object).where(apart["language"].notna(), "")) == (
        {"en"} if len(languages) == 1 else {*LANGUAGES, ""}
    )
    own = frame[frame["task"] == "mine"].reset_index(drop=True)
    alone = tasks.analyze(mine)
    pd.testing.assert_frame_equal(own, alone, check_categorical=False, check_dtype=False)


def described(twins, templates, **fields):
    """Minimal pairs of reasoning, their templates, and what else is said of them, by number."""
    items = []
    for number in range(twins):
        about = {name: values[number % len(values)] for name, values in fields.items()}
        shared = {"twin": f"t{number}", "template": f"p{number % templates}", "choices": (" x", " y")} | about
        items += [Item(id=f"t{number}{k}", prompt="p", answer=k, category="reasoning", **shared) for k in (0, 1)]
    return items


def scored(items, right):
    """Scores in which both items of a pair are right or wrong."""
    values = np.full((len(items), 2), -10.0)
    for row, item in zip(values, items, strict=True):
        row[item.answer] += 1 if right[int(item.twin[1:])] else -1
    return ChoiceScores(values, np.array([item.answer for item in items]))


def test_intervals_are_over_templates():
    """Whole templates fail: sixty pairs of ten templates say as much as ten pairs."""
    right = np.arange(60) % 10 < 7
    widths = {}
    for templates in (10, 60):
        items = {"en": described(60, templates)}
        scores = {(model, "en"): scored(items["en"], right) for model in COLUMNS}
        row = value(tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine")), "twin_accuracy", "en", "reasoning")
        assert row["value"] == 0.7
        widths[templates] = row["high"] - row["low"]
    assert widths[10] > 2 * widths[60]


def test_every_kind_grade_and_domain_has_rows_of_its_own():
    items = {"en": described(60, 60, kind=["order", "quantity"], grade=[1, 1, 2])}
    right = np.arange(60) % 3 < 2  # all of grade 1, none of grade 2
    scores = {(model, "en"): scored(items["en"], right) for model in COLUMNS}
    frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
    assert set(frame["part"]) == {"all", "kind order", "kind quantity", "grade 1", "grade 2"}
    assert value(frame, "twin_accuracy", "en", "reasoning", part="grade 1")["value"] == 1
    assert value(frame, "twin_accuracy", "en", "reasoning", part="grade 2")["value"] == 0
    assert value(frame, "twin_accuracy", "en", "reasoning", part="grade 1")["n"] == 80


def test_cells_in_which_the_dense_model_guesses_are_marked():
    items = {"en": described(60, 60, grade=[1, 2])}
    dense = np.array([number % 2 == 0 or number % 4 == 1 for number in range(60)])  # grade 2: half right
    scores = {(DENSE, "en"): scored(items["en"], dense), ("pruned", "en"): scored(items["en"], ~dense)}
    frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
    marked = frame.groupby("part", observed=True)["at_chance"].agg(["all", "any"])
    assert marked.loc["grade 2"].tolist() == [True, True]
    assert marked.loc["grade 1"].tolist() == marked.loc["all"].tolist() == [False, False]


def test_what_passes_by_luck_is_not_taken_for_able():
    """Thirty cells of a model that guesses: at 95 % about one would pass, and its fall to chance would look a loss."""
    luck = np.random.default_rng(0)
    marked = []
    for _ in range(300):
        items = {"en": described(20, 20)}
        scores = {(model, "en"): scored(items["en"], luck.random(20) < 0.5) for model in COLUMNS}
        marked.append(tasks.at_chance(tasks.by_twin(tasks.item_frame(scores, items, COLUMNS, "mine")).iloc[:20]))
    assert np.mean(marked) > 0.99


def test_the_report_sees_no_loss_where_the_dense_model_guesses():
    items = {"en": described(60, 60), "sw": described(60, 60)}
    able, guesses = np.ones(60, dtype=bool), np.arange(60) % 2 == 0
    scores = {(DENSE, language): scored(items[language], able) for language in LANGUAGES}
    scores |= {("pruned", language): scored(items[language], ~able) for language in LANGUAGES}
    recipe = {name: PRUNED[name] for name in RECIPE_COLUMNS}

    def said() -> str:
        frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
        return " ".join(findings._questions({"accuracy": frame}, recipe))

    assert "reasoning -100.0" in said()
    scores |= {(DENSE, language): scored(items[language], guesses) for language in LANGUAGES}
    assert "changes by" not in said()
    assert "In reasoning the dense model is not clearly above chance" in said()


def test_single_items_are_at_chance_by_their_number_of_choices():
    items = {"en": [Item(id=str(n), prompt="p", choices=(" a", " b", " c", " d"), answer=0) for n in range(100)]}
    for share, marked in ((0.25, True), (0.5, False)):
        values = np.full((100, 4), -10.0)
        values[:, 0] += np.where(np.arange(100) < 100 * share, 1, -1)
        scores = {(model, "en"): ChoiceScores(values, np.zeros(100, dtype=int)) for model in COLUMNS}
        frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
        assert (frame["at_chance"] == marked).all()


def test_nothing_asked_is_an_empty_frame():
    assert len(tasks.analyze(tasks.item_frame({}, {}, COLUMNS, ""))) == 0


def test_categories_are_listed_in_their_own_order():
    frame = pd.DataFrame({"category": ["zoology", "reasoning", "all", "fluency", "reasoning", None]})
    assert labels.categories_of(frame) == ["fluency", "reasoning", "all", "zoology"]


@pytest.mark.parametrize("plot", [plots.accuracy.matrix, plots.accuracy.categories])
def test_figures_show_every_category(asked, tmp_path, plot):
    items, scores = asked
    frame = tasks.analyze(tasks.item_frame(scores, items, COLUMNS, "mine"))
    recipe = {name: PRUNED[name] for name in ("method", "sparsity", "pattern", "allocation", "scope", "propagation")}
    figure = plot(frame, recipe, task="mine")
    titles = [axes.get_title().removesuffix(" (at chance)") for axes in figure.axes]
    assert {"knowledge", "reasoning"} <= set(titles)
    assert min(file.stat().st_size for file in plots.save(figure, tmp_path, "f")) > 2000
