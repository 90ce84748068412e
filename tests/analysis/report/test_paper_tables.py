"""Tables for papers, from small frames with planted numbers."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import statistics
import subprocess

import numpy as np
import pandas as pd
import pytest

from analysis.frames import STUDY_FRAMES, dense_columns, tidy
from analysis.report import ReportFacts, document, latex, study_tables
from analysis.report.latex import escaped
from analysis.report.paper_tables import benchmarks
from pruning import CalibrationSet

LANGUAGES = ("ar", "en", "sw", "zh")
#: Draws of every calibration set.
DRAWS = {"ar": 3, "en": 3, "sw": 3, "zh": 1, "en+sw": 1, "all": 2}
NASTY = r"a_b%c&d#e$f\g{h}i~j^k <l> |m| `n' --o -- é Müller ß 知識 مرحبا"
PLACE = {"sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all", "bits": 9.0}
WANDA = {"model": "m", "method": "wanda", "propagation": "pruned"} | PLACE
PLAIN = {"model": "m", "method": "magnitude", "propagation": "none", "calibration": "none", "seed": 0} | PLACE
VARIANTS = [WANDA | {"calibration": name, "seed": seed} for name, number in DRAWS.items() for seed in range(number)]
MODELS = [dense_columns("m"), *VARIANTS, PLAIN]


#: Categories that differ only in signs that names of files do not have.
ALIKE = ("law & order", "law / order")


def planted(model, language, what) -> float:
    """A number that depends on everything, from a generator of its own."""
    words = (model["method"], model["calibration"], model["seed"], language, what)
    return float(np.random.default_rng(list(repr(words).encode())).uniform(10, 90))


def perplexity_of(model, language) -> float:
    value = planted(model, language, "perplexity")
    return value * 1e5 if model["calibration"] == "zh" else value  # a set that breaks the model


def perplexity() -> pd.DataFrame:
    return tidy(
        "perplexity",
        [
            {
                **model,
                "language": language,
                "metric": metric,
                "value": value,
                "low": value / 2,
                "high": 2 * value,
                "n": 8,
            }
            for model, language in itertools.product(MODELS, LANGUAGES)
            for metric, value in (
                ("perplexity", perplexity_of(model, language)),
                ("bits_per_byte", planted(model, language, "bits")),
            )
        ],
    )


def accuracy() -> pd.DataFrame:
    """Two categories of one task, of which one has minimal pairs, and a benchmark that is two tasks in one language."""
    tasks = [("bundled", NASTY, language, 40, "twin_accuracy") for language in LANGUAGES]
    tasks += [("bundled", "reasoning", language, 40, "accuracy") for language in LANGUAGES]
    tasks += [("bundled", name, language, 40, "accuracy") for name in ALIKE for language in LANGUAGES]
    tasks += [("xnli_en", "xnli", "en", 10, "accuracy"), ("xnli_sw", "xnli", "sw", 10, "accuracy")]
    tasks += [("xnli_more_sw", "xnli", "sw", 30, "accuracy")]
    rows = [
        {**model, "language": language, "task": task, "category": category, "part": part, "metric": metric}
        | {"value": planted(model, language, task + category) / 100, "n": n, "at_chance": language == "sw"}
        for model in MODELS
        for task, category, language, n, metric in tasks
        for part in ("all", "kind x")
    ]
    return tidy("accuracy", [row | {"low": 0.0, "high": 1.0} for row in rows])


def overlap() -> pd.DataFrame:
    return tidy(
        "mask_overlap",
        [
            {**one, "other_calibration": other["calibration"], "other_seed": other["seed"], "shared_text": 0.0}
            | {"layer": layer, "role": role, "metric": metric, "value": value}
            for one, other in itertools.combinations(VARIANTS, 2)
            for layer, role in itertools.product(range(2), ("q", "up"))
            for metric, value in (
                ("iou", planted(one, repr(other), (layer, role)) / 100),
                ("iou_chance", 1 / 3),
            )
        ],
    )


def contrast(value, p=0.01):
    return {"value": value, "low": value - 0.1, "high": value + 0.2, "n": 8, "draws": 1, "df": 4.0, "p_value": p} | {
        "p_adjusted": 2 * p,
        "shared_text": 0.0,
    }


def contrasts() -> pd.DataFrame:
    pairs = [
        {**WANDA, "language": language, "calibration": one, "other_calibration": other, "metric": "log_perplexity"}
        | contrast(planted(WANDA | {"calibration": one, "seed": 0}, language, other), 0.01 if other == "zh" else 0.4)
        for language in LANGUAGES
        for one, other in itertools.combinations(["ar", "en", "sw", "zh", "all"], 2)
    ]
    own = [
        {**WANDA, "language": language, "calibration": language, "other_calibration": "others"}
        | {"metric": "log_perplexity", **contrast(-0.3, 0.0004)}
        for language in LANGUAGES
    ]
    over_all = {**WANDA, "calibration": "own", "other_calibration": "others", "metric": "log_perplexity"}
    return tidy("contrasts", [*pairs, *own, over_all | contrast(-0.25)])


def task_contrasts() -> pd.DataFrame:
    return tidy(
        "task_contrasts",
        [
            {**WANDA, "language": language, "task": "bundled", "category": category, "part": "all", "contrast": "own"}
            | {"calibration": language or "own", "other_calibration": "others", "at_chance": False}
            | {"metric": metric, **contrast(-0.05)}
            for category in ("reasoning", "knowledge")
            for language in (*LANGUAGES, None)
            for metric in ("accuracy_drop", "margin_drop")
        ],
    )


@pytest.fixture(scope="module")
def tables():
    frames = {name: tidy(name, []) for name in STUDY_FRAMES}
    frames |= {"perplexity": perplexity(), "accuracy": accuracy(), "mask_overlap": overlap(), "contrasts": contrasts()}
    frames["task_contrasts"] = task_contrasts()
    facts = ReportFacts(
        model=f"owner/{NASTY}",
        languages=LANGUAGES,
        sets=[CalibrationSet.named("en")],
        recipes=[],
        imported={},
        set_aside={},
        segments=8,
        fit_segments=8,
        rank=3,
        skip_first=True,
        heldout_tokens=dict.fromkeys(LANGUAGES, 100),
        blocks=2,
        neurons=10,
        versions={},
    )
    return {table.name: table for table in study_tables(frames, facts)}


RECIPE = "wanda-0.5-row-pruned"


def row(table, name):
    (found,) = [row for group in table.groups for row in group if row[0].text == name]
    return dict(zip(table.head, found, strict=True))


def csv(table):
    return pd.read_csv(io.StringIO(table.numbers.to_csv(index=False))).set_index("calibration")


def test_cells_are_means_and_sample_standard_deviations_over_draws(tables):
    table = tables[f"perplexity-{RECIPE}"].make()
    read = csv(table)
    for name, number in DRAWS.items():
        assert read.loc[name, "draws"] == number
        for language in LANGUAGES:
            drawn = [perplexity_of(WANDA | {"calibration": name, "seed": seed}, language) for seed in range(number)]
            cell = row(table, name)[language]
            assert read.loc[name, language] == pytest.approx(statistics.mean(drawn), rel=1e-12)
            if number == 1:
                assert np.isnan(read.loc[name, f"{language}_sd"])
                assert cell.sub == ""
            else:
                spread = statistics.stdev(drawn)
                assert read.loc[name, f"{language}_sd"] == pytest.approx(spread, rel=1e-9)
                assert cell.sub == f"{spread:.2f}"
            if name == "zh":
                mantissa, power = f"{drawn[0]:.2e}".split("e")
                assert (cell.text, cell.power) == (mantissa, int(power))
            else:
                assert cell.text == f"{statistics.mean(drawn):.2f}"


def test_dense_model_comes_first_and_has_no_deviation(tables):
    for name in (f"perplexity-{RECIPE}", f"accuracy-bundled-reasoning-{RECIPE}", "perplexity-magnitude-0.5-row-none"):
        table = tables[name].make()
        (first,) = table.groups[0]
        assert first[0].text == "dense"
        assert all(cell.sub == "" and not cell.own and not cell.best for cell in first)
        assert csv(table).index[0] == "dense"
    cells = row(tables[f"perplexity-{RECIPE}"].make(), "dense")
    assert [cells[language].text for language in LANGUAGES] == [
        f"{perplexity_of(MODELS[0], language):.2f}" for language in LANGUAGES
    ]


def test_own_language_and_nothing_else_is_marked(tables):
    for name in (f"perplexity-{RECIPE}", f"bits-per-byte-{RECIPE}", f"accuracy-bundled-reasoning-{RECIPE}"):
        table = tables[name].make()
        marked = {
            (r[0].text, column)
            for g in table.groups
            for r in g
            for column, c in zip(table.head, r, strict=True)
            if c.own
        }
        assert marked == {(language, language) for language in LANGUAGES}
        own = csv(table)["own"]
        assert dict(own.dropna()) == {language: language for language in LANGUAGES}


@pytest.mark.parametrize(
    ("name", "best"), [(f"perplexity-{RECIPE}", min), (f"accuracy-bundled-reasoning-{RECIPE}", max)]
)
def test_best_set_of_every_column_is_underlined(tables, name, best):
    table = tables[name].make()
    read = csv(table).drop(index="dense")
    for language in LANGUAGES:
        marked = [set_ for set_ in read.index if row(table, set_)[language].best]
        at_chance = name.startswith("accuracy") and language == "sw"
        assert marked == ([] if at_chance else [best(read.index, key=lambda s: read.loc[s, language])])


def test_mean_over_languages_varies_over_draws_as_a_whole(tables):
    read = csv(tables[f"bits-per-byte-{RECIPE}"].make())
    drawn = [
        statistics.mean(
            planted(WANDA | {"calibration": "en", "seed": seed}, language, "bits") for language in LANGUAGES
        )
        for seed in range(DRAWS["en"])
    ]
    assert read.loc["en", "mean"] == pytest.approx(statistics.mean(drawn))
    assert read.loc["en", "mean_sd"] == pytest.approx(statistics.stdev(drawn))
    assert "mean" not in csv(tables[f"perplexity-{RECIPE}"].make())


def test_tasks_of_one_benchmark_are_one_table_and_count_by_their_items(tables):
    model = WANDA | {"calibration": "zh", "seed": 0}
    read = csv(tables[f"accuracy-xnli-{RECIPE}"].make())
    few, many = (planted(model, "sw", f"{task}xnli") for task in ("xnli_sw", "xnli_more_sw"))
    assert read.loc["zh", "sw"] == pytest.approx((10 * few + 30 * many) / 40)
    assert read.loc["zh", "en"] == pytest.approx(planted(model, "en", "xnli_enxnli"))
    assert "ar" not in read
    names = [name for name, _ in benchmarks(accuracy())]
    assert names[0] == ("bundled", "reasoning")  # a known category comes first
    assert set(names[1:-1]) == {("bundled", name) for name in (NASTY, *ALIKE)}
    assert names[-1] == ("xnli",)


def test_categories_of_one_file_name_have_a_file_each(tables):
    one, other = (tables[f"accuracy-bundled-law_order-{RECIPE}{ending}"] for ending in ("", "-2"))
    assert (one.title, other.title) == tuple(f"Accuracy, bundled: {name}" for name in ALIKE)
    assert not csv(one.make()).equals(csv(other.make()))


def test_languages_in_which_the_dense_model_guesses_are_marked(tables):
    table = tables[f"accuracy-bundled-reasoning-{RECIPE}"]
    made = table.make()
    assert {name: cell.mark for name, cell in row(made, "dense").items() if cell.mark} == {"sw": "†"}
    assert csv(made).loc["dense", "at_chance"] == "sw"
    assert "†" in table.caption
    assert "10 to 40 items per language" in tables[f"accuracy-xnli-{RECIPE}"].caption


def test_overlap_of_two_sets_is_the_mean_over_pairs_of_draws(tables):
    table = tables[f"mask-overlap-{RECIPE}"].make()
    read = csv(table)
    places = [*itertools.product(range(2), ("q", "up"))]

    def pairs(first, second):
        return [
            statistics.mean(planted(one, repr(other), place) / 100 for place in places)
            for one, other in itertools.combinations(VARIANTS, 2)
            if sorted((one["calibration"], other["calibration"])) == sorted((first, second))
        ]

    for first, second in (("ar", "en"), ("en", "ar"), ("ar", "ar"), ("zh", "sw"), ("all", "all"), ("zh", "all")):
        expected = pairs(first, second)
        assert len(expected) == (
            DRAWS[first] * (DRAWS[first] - 1) / 2 if first == second else DRAWS[first] * DRAWS[second]
        )
        assert read.loc[first, second] == pytest.approx(statistics.mean(expected))
        spread = read.loc[first, f"{second}_sd"]
        assert np.isnan(spread) if len(expected) == 1 else spread == pytest.approx(statistics.stdev(expected))
    assert np.isnan(read.loc["zh", "zh"])
    assert row(table, "zh")["zh"].text == "–"
    assert "Chance: 0.333" in tables[f"mask-overlap-{RECIPE}"].caption


def test_own_language_effect_has_interval_and_p(tables):
    table = tables[f"own-language-{RECIPE}"].make()
    assert [cell.text for cell in table.groups[0][1]] == ["en", "−0.300", "[−0.400, −0.100]", "<0.001", "<0.001", "1"]
    assert [cell.text for cell in table.groups[1][0]] == ["all", "−0.250", "[−0.350, −0.050]", "0.010", "0.020", "1"]
    assert list(table.numbers["language"]) == [*LANGUAGES, "all"]
    tasks = tables[f"own-language-bundled-{RECIPE}"].make()
    assert [[r[0].text for r in group] for group in tasks.groups] == [["knowledge"] * 5, ["reasoning"] * 5]
    assert [cell.text for cell in tasks.groups[0][-1][1:4]] == ["all", "−5.0", "[−15.0, +15.0]"]
    assert len(tasks.numbers) == 2 * 5


def test_each_set_is_compared_with_the_own_one_whichever_comes_first_in_the_frame(tables):
    table = tables[f"contrasts-{RECIPE}"].make()
    numbers = table.numbers.set_index(["language", "calibration"])
    given = planted(WANDA | {"calibration": "ar", "seed": 0}, "sw", "sw")
    assert numbers.loc[("sw", "ar"), "value"] == pytest.approx(given)
    turned = planted(WANDA | {"calibration": "sw", "seed": 0}, "sw", "zh")
    assert numbers.loc[("sw", "zh"), ["value", "low", "high"]].to_list() == pytest.approx(
        [-turned, -turned - 0.2, -turned + 0.1]
    )
    assert len(numbers) == 4 * 4
    assert row(table, "sw")["sw"].text == "–"
    assert row(table, "zh")["sw"].text == f"−{turned:.3f}"
    assert row(table, "zh")["sw"].sub == "0.150"
    assert [row(table, name)["sw"].mark for name in ("ar", "en", "zh", "all")] == ["", "", "*", ""]


def test_a_power_of_ten_follows_its_number_without_room_for_a_subscript(tables):
    tex = latex(tables[f"perplexity-{RECIPE}"].make(), name="x", caption="", source="")
    (line,) = [line for line in tex.splitlines() if line.startswith("zh &")]
    assert re.fullmatch(
        r"zh & (\d\.\d\d\$\{\\cdot\}10\^\{6\}\$ & ){3}\\textbf\{\d\.\d\d\}\$\{\\cdot\}10\^\{6\}\$ \\\\", line
    )


def test_captions_say_how_many_draws(tables):
    caption = tables[f"perplexity-{RECIPE}"].caption
    assert "(zh, en+sw: 1; all: 2; ar, en, sw: 3)" in caption
    assert "calibration" not in tables["perplexity-magnitude-0.5-row-none"].caption.replace(
        "disjoint from the cali", ""
    )


def test_a_single_draw_has_no_deviation_and_an_infinite_perplexity_is_shown():
    rows = [
        {**model, "language": "en", "metric": metric, "value": np.inf if model["seed"] else 20.0, "n": 8}
        for model in (dense_columns("m"), *(WANDA | {"calibration": "en", "seed": seed} for seed in range(2)))
        for metric in ("perplexity", "bits_per_byte")
    ]
    frames = {name: tidy(name, []) for name in STUDY_FRAMES} | {"perplexity": tidy("perplexity", rows)}
    facts = ReportFacts("m", ["en"], [], [], {}, {}, 8, 8, 3, True, {"en": 100}, 2, 10, {})
    (table,) = [table for table in study_tables(frames, facts) if table.name.startswith("perplexity-wanda")]
    made = table.make()
    assert (row(made, "en")["en"].text, row(made, "en")["en"].sub) == ("∞", "")
    assert r"$\infty$" in latex(made, name="x", caption="", source="")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_%&#${}", r"\_\%\&\#\$\{\}"),
        ("\\", r"\textbackslash{}"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("a\nb", "a b"),
        ("--", "-{}-"),
        ("−0.5", "$-$0.5"),
        ("知", r"\texttt{U+77E5}"),
        ("é", r"\'{e}"),
        ("a<b", "a$<$b"),
    ],
)
def test_signs_of_latex_are_escaped(text, expected):
    assert escaped(text) == expected


def test_tex_is_ascii_and_names_its_package(tables):
    for name, table in tables.items():
        tex = latex(table.make(), name=name, caption=table.caption, source="test")
        assert tex.isascii()
        assert [line for line in tex.splitlines() if line.startswith("%")] == [
            "% test",
            r"% Needs \usepackage{booktabs} and no other package.",
        ]
        assert r"\textbf{" in tex or not any(c.own for g in table.make().groups for r in g for c in r)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_tables_compile_and_print_what_they_hold(tables, tmp_path):
    for name, table in tables.items():
        tex = latex(table.make(), name=name, caption=table.caption, source="test")
        (tmp_path / f"{name}.tex").write_text(tex, encoding="utf-8")
    (tmp_path / "preview.tex").write_text(document(list(tables)), encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "preview.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    log = (tmp_path / "preview.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-2000:]
    assert not re.search(r"^(LaTeX Font )?Warning: .*undefined", log, re.MULTILINE)
    assert "in alignment" not in log  # no row is wider than the page
    assert f"({len(tables)} page" in log.replace("\n", "")
