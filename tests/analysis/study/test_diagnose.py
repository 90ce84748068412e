"""`prunescope diagnose` on a finished study of a tiny model, with items that its variant is known to lose."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from checkpoints import saved
from command_line import expect_one_line, prunescope
from conftest import tiny_model
from pages import written

from analysis import load_study, read_frame
from analysis.metrics.recovery import importance
from analysis.report import diagnosis_findings
from analysis.study import diagnose as stage
from analysis.study import diagnosis_inputs, figures
from probes import Session, item_questions, score
from probes.items import Item
from pruning import Recipe, Remedy, load_model, prune

VARIANT = "magnitude-0.7-matrix"
STUDY = """
model = "model"
languages = ["en", "sw"]
[calibration]
sets = []
[[recipes]]
method = "magnitude"
sparsity = 0.7
[evaluation]
segments = 8
fit_segments = 4
max_length = 40
[tasks]
items = "file:riddles/{lang}.jsonl"
"""
TITLE = f"Diagnosis: {VARIANT}, reasoning in Swahili"


@pytest.fixture(scope="module", autouse=True)
def _no_other_figures():
    """The figures of the study itself are drawn elsewhere, and take most of the time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "study_figures", lambda *_: iter(()))
        yield


def riddles(folder):
    """Items by language: reasoning, which the variant loses; fluency, which it gains; and two items that are few."""
    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.7))
    session = Session(model, tokenizer)
    rng = np.random.default_rng(3)

    def text(length):
        return "".join(rng.choice(list("abcdefghijklmnop"), length))

    written = {}
    for language in ("en", "sw"):
        items = [
            Item(id=f"{i}", twin=f"{i // 2}", prompt=text(8), choices=(text(2), text(3)), answer=0) for i in range(34)
        ]
        questions = item_questions(session, items)
        dense = score(session, questions).values
        with variant.applied(model):
            lost = dense - score(session, questions).values
        categories = ["reasoning"] * 20 + ["fluency"] * 12 + ["few"] * 2
        written[language] = [
            item.model_copy(
                update={"category": category, "answer": int(own.argmin() if category == "fluency" else own.argmax())}
            )
            for item, category, own in zip(items, categories, lost, strict=True)
        ]
        choices = ("!", "+")
        written[language] += [  # minimal pairs that both languages have
            Item(id=f"p{i}{k}", twin=f"p{i}", category="pairs", prompt=f"{text(6)} {k}?", choices=choices, answer=k)
            for i in range(6)
            for k in (0, 1)
        ]
    return written


def write_riddles(folder, items):
    (folder / "riddles").mkdir(exist_ok=True)
    for language, own in items.items():
        lines = "".join(item.model_dump_json() + "\n" for item in own)
        (folder / "riddles" / f"{language}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    saved(tiny_model(), folder / "model")
    write_riddles(folder, riddles(folder))
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def finished(place):
    result = prunescope("run", place / "study.toml", "--out", place / "out")
    assert result.returncode == 0, result.stderr
    return place / "out"


def diagnose(folder, *words, category="reasoning", variant=VARIANT, language="sw"):
    options = ["--variant", variant, "--language", language, "--category", category, "--confirm", 2, "--sample", 1]
    return prunescope("diagnose", folder, *options, *words)


@pytest.fixture(scope="module")
def diagnosed(finished):
    result = diagnose(finished)
    assert result.returncode == 0, result.stderr
    return finished, result


def page_of(folder):
    return written(folder / "report.html")


def test_a_diagnosis_is_printed_and_kept(diagnosed):
    folder, result = diagnosed
    place = folder / "diagnoses" / f"{VARIANT}-sw-reasoning"
    assert sorted(path.name for path in place.iterdir()) == [
        "diagnosis.json",
        "parts",
        "recovery.parquet",
        "remedy.json",
    ]
    frame = read_frame(place / "recovery.parquet")
    assert set(frame["n"].dropna()) == {20, 10, 5}  # five draws of masks undone together
    assert set(frame["task"]) == {"riddles"}
    *said, last, following = result.stdout.strip().splitlines()
    assert said == [f"- {sentence}" for sentence in diagnosis_findings(frame)]
    assert said[0].startswith("- Pruning lowers ")
    assert last == f"report: {folder / 'report.html'}"
    assert following == f"Next: prunescope export {folder} {VARIANT}-checkpoint --variant {VARIANT}"


def test_the_report_has_a_section_with_sentences_and_figures(diagnosed):
    folder, result = diagnosed
    page = page_of(folder)
    names = [
        f"diagnosis-{kind}-{VARIANT}-sw-reasoning"
        for kind in ("curves", "positions", "map", "heads", "together", "causes")
    ]
    for name in names:
        assert {path.suffix for path in (folder / "figures").glob(f"{name}.*")} == {".pdf", ".png"}
    assert re.search(rf"<h[23][^>]*>\s*{re.escape(TITLE)}", page)
    assert page.count("<img") == page.count('"data:image"') == 6
    for sentence in result.stdout.splitlines()[:2]:
        assert sentence.removeprefix("- ") in page
    captions = re.findall(r"<figcaption>(.*?)<small>", page, re.DOTALL)
    assert len(captions) == 6
    assert all("reasoning in Swahili" in caption and "n = 20" in caption for caption in captions)
    assert not re.search(r"\bnan\b", page)


def test_the_remedy_is_what_a_recipe_follows(diagnosed, tmp_path):
    folder, _ = diagnosed
    place = folder / "diagnoses" / f"{VARIANT}-sw-reasoning"
    remedy = Remedy.open(place / "remedy.json")
    assert (remedy.variant, remedy.language, remedy.category) == (VARIANT, "sw", "reasoning")
    assert remedy.importance == importance(read_frame(place / "recovery.parquet"))
    assert len(remedy.importance) == 3 * 7
    assert remedy.fitted_on.startswith("20 reasoning questions (all templates)")
    follows = STUDY.replace(
        "sparsity = 0.7", f'sparsity = 0.5\nallocation = "diagnosis"\ndiagnosis = "{place}/remedy.json"'
    )
    (tmp_path / "study.toml").write_text(follows.replace('"model"', f'"{folder.parent / "model"}"'))
    (recipe,) = load_study(tmp_path / "study.toml").all_recipes()
    assert dict(recipe.importance) == remedy.importance
    made = prunescope("prune", tmp_path / "study.toml", "--out", tmp_path / "out")
    assert made.returncode == 0, made.stderr


def test_a_second_diagnosis_does_nothing_anew(diagnosed):
    folder, first = diagnosed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = diagnose(folder)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "diagnosing" not in again.stderr
    touched = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched <= {"provenance.json", "study.toml", ".lock"}
    assert prunescope("run", folder.parent / "study.toml", "--out", folder).returncode == 0
    assert TITLE in page_of(folder)


@pytest.fixture
def copied(diagnosed, tmp_path):
    folder, _ = diagnosed
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def patched(monkeypatch):
    """List the components that are patched exactly, unit by unit, and the attributions."""
    seen = []
    real_patch, real_attribute = stage.patch, stage.attribute

    def patch(session, questions, damage, components, *, direction, positions, progress):
        on = repr(questions[0])  # masks are undone together on the half that did not choose them
        seen.append((direction, [f"{one.label} {one.weights} {on}" for one in components]))
        return real_patch(
            session, questions, damage, components, direction=direction, positions=positions, progress=progress
        )

    def attribute(*what, **settings):
        seen.append(("attribution", []))
        return real_attribute(*what, **settings)

    monkeypatch.setattr(stage, "patch", patch)
    monkeypatch.setattr(stage, "attribute", attribute)
    return seen


def without_diagnosis(folder):
    """Remove what a diagnosis left, as if it had never been."""
    for part in ("diagnoses", "records/diagnoses"):
        shutil.rmtree(folder / part)


def results_of(folder):
    files = [*(folder / "diagnoses").rglob("*"), *(folder / "figures").glob("diagnosis-*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_diagnosis_that_is_killed_goes_on_from_there(diagnosed, copied, monkeypatch, patched, done):
    folder, whole = diagnosed
    without_diagnosis(copied)
    monkeypatch.setattr(stage, "_COMPONENTS", 3)
    go_on, units = stage.Diagnose.run, []

    def killed(self, context, unit, advance):
        if len(units) > done:
            raise KeyboardInterrupt
        units.append(unit)
        go_on(self, context, unit, advance)

    with monkeypatch.context() as patching:
        patching.setattr(stage.Diagnose, "run", killed)
        assert diagnose(copied).returncode == 130
    first = list(patched)
    assert len(first) == 1 + done
    kept = {path: path.stat().st_mtime_ns for path in (copied / "records" / "diagnoses").rglob("*.json")}
    again = diagnose(copied)
    assert (again.returncode, again.stdout.splitlines()[:-2]) == (0, whole.stdout.splitlines()[:-2])
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    both = [(direction, label) for direction, labels in patched for label in labels]
    assert len(both) == len(set(both))  # nothing twice
    assert [direction for direction, _ in patched].count("attribution") == 2
    assert results_of(copied) == results_of(folder)


def test_more_causes_can_be_confirmed_later(copied, patched):
    assert diagnose(copied, "--confirm", 4).returncode == 0
    assert {direction for direction, _ in patched} == {"restore", "damage"}  # the gradients are known
    assert all(1 <= len(labels) <= 4 for _, labels in patched)


@pytest.mark.parametrize("category", ["reasoning", "text"])
def test_the_two_halves_share_no_question(copied, monkeypatch, category):
    asked = {}
    real = diagnosis_inputs.Asked

    def watched(*what):
        asked[half] = real(*what)
        return asked[half]

    monkeypatch.setattr(diagnosis_inputs, "Asked", watched)
    for half in ("first", "second"):
        result = diagnose(copied, "--half", half, category=category)
        assert result.returncode == 0, result.stderr
        assert f"{half} half of the questions" in page_of(copied)
    first, second = (asked[half].templates for half in ("first", "second"))
    assert not set(first) & set(second)
    assert len(first) == len(second) == (10 if category == "reasoning" else 4)
    if category == "reasoning":
        assert {*first, *second} == {str(i) for i in range(10)}
        assert sorted(first) == [str(i) for i in (0, 0, 2, 2, 4, 4, 6, 6, 8, 8)]  # twins stay together
    assert TITLE in page_of(copied)


def test_where_nothing_was_lost_nothing_is_blamed(copied):
    result = diagnose(copied, category="fluency")
    assert result.returncode == 0, result.stderr
    assert "no significant drop" in result.stdout
    assert "no causes are named" in result.stdout
    names = [path.name for path in (copied / "diagnoses" / f"{VARIANT}-sw-fluency").iterdir()]
    assert sorted(names) == ["diagnosis.json", "parts", "recovery.parquet"]
    page = page_of(copied)
    assert "fluency in Swahili" in page
    assert "no causes are named" in page
    assert page.count("<img") == 6  # those of the other diagnosis


def test_diagnoses_in_all_languages_are_compared(copied):
    result = diagnose(copied, language="all", category="text")
    assert result.returncode == 0, result.stderr
    headings = [line for line in result.stdout.splitlines() if line.startswith("Diagnosis: ")]
    named = ('English ("en")', 'Swahili ("sw")')
    assert list((copied / "figures").glob("diagnosis-curves-*-text.pdf"))
    assert not list((copied / "figures").glob("diagnosis-positions-*-text.pdf"))  # text has no minimal pairs
    assert headings == [f"Diagnosis: {VARIANT}, text in {language}" for language in named]
    name = f"diagnosis-languages-{VARIANT}-all-text"
    assert {path.suffix for path in (copied / "figures").glob(f"{name}.*")} == {".pdf", ".png"}
    page = page_of(copied)
    assert f"Diagnoses across languages: {VARIANT}, text" in page
    assert "Agreement between the maps of 2 languages" in page
    shutil.rmtree(copied / "diagnoses" / f"{VARIANT}-en-text")
    assert diagnose(copied, language="sw", category="text").returncode == 0
    assert not list((copied / "figures").glob(f"{name}.*"))
    assert "across languages" not in page_of(copied)


def test_states_of_other_languages_are_put_into_items(copied):
    result = diagnose(copied, "--from", "en", "--from", "sw", category="pairs")
    assert result.returncode == 0, result.stderr
    place = copied / "diagnoses" / f"{VARIANT}-sw-pairs"
    frame = read_frame(place / "crossing.parquet")
    assert set(frame["source_language"]) == {"en", "sw"}
    assert set(frame["language"]) == {"sw"}
    assert set(frame["method"]) == {"dense", "magnitude"}
    assert set(frame["n"]) == {12}
    own = frame[(frame["source_language"] == "sw") & (frame["metric"] == "twin_moved")]
    swing = frame[(frame["source_language"] == "sw") & (frame["metric"] == "swing")].set_index("method")["value"]
    for method, rows in own.groupby("method", observed=True):  # after the last block nothing else counts
        assert rows.set_index("layer")["value"][2] == pytest.approx(swing[method], abs=1e-3)
    assert [line for line in result.stdout.splitlines() if " asking an item's twin " in line or "of the way" in line]
    names = {path.name for path in (copied / "figures").glob(f"diagnosis-crossing-{VARIANT}-sw-pairs.*")}
    assert len(names) == 2
    page = page_of(copied)
    assert "the residual stream at the last token of the prompt replaced after one block" in page
    again = diagnose(copied, "--from", "en", "--from", "sw", category="pairs")
    assert (again.returncode, again.stdout) == (0, result.stdout)
    assert "states of" not in again.stderr
    assert diagnose(copied, category="pairs").returncode == 0
    assert not (place / "crossing.parquet").exists()
    assert not list((copied / "figures").glob("diagnosis-crossing-*"))


@pytest.mark.parametrize(
    ("category", "source", "words"),
    [
        ("text", "en", ["states of other languages are put into items", "leave out --from"]),
        ("reasoning", "en", ['no minimal pair of category "reasoning" in Swahili', "--from en"]),
        ("pairs", "ru", ["Russian", "not in this study; it has en, sw"]),
    ],
)
def test_languages_whose_states_cannot_be_put_in_are_refused(finished, category, source, words):
    expect_one_line(diagnose(finished, "--from", source, category=category), *words)


def test_a_changed_study_drops_diagnoses_that_are_stale(place, copied, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    items = riddles(place)
    turned = {"reasoning": "fluency", "fluency": "reasoning", "few": "few", "pairs": "pairs"}
    items["sw"] = [item.model_copy(update={"category": turned[item.category]}) for item in items["sw"]]
    write_riddles(tmp_path, items)
    (tmp_path / "study.toml").write_text(STUDY)
    assert TITLE in page_of(copied)
    result = prunescope("run", tmp_path / "study.toml", "--out", copied)
    assert result.returncode == 0, result.stderr
    assert "Diagnosis:" not in page_of(copied)
    # diagnosed again, what was called reasoning has gained, and the remedy of old is no more
    result = diagnose(copied)
    assert result.returncode == 0, result.stderr
    assert "no causes are named" in result.stdout
    assert TITLE in page_of(copied)
    assert not (copied / "diagnoses" / f"{VARIANT}-sw-reasoning" / "remedy.json").exists()


def test_a_diagnosis_that_was_damaged_by_hand_does_not_stop_the_study(place, copied):
    path = copied / "diagnoses" / f"{VARIANT}-sw-reasoning" / "diagnosis.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"language": "klingonish"}))
    result = prunescope("run", place / "study.toml", "--out", copied)
    assert result.returncode == 0, result.stderr
    assert "Diagnosis:" not in page_of(copied)


def test_a_diagnosis_of_a_model_larger_than_memory_is_refused(copied):
    without_diagnosis(copied)
    result = diagnose(copied, "--memory", "700MiB")
    expect_one_line(result, "a diagnosis needs the whole model and a copy of its weights", "700.0 MiB of memory")


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variant": "magnitude-0.7-row"}, ['no variant "magnitude-0.7-row"', "did you mean", VARIANT]),
        ({"variant": "dense"}, ['no variant "dense"', VARIANT]),
        ({"language": "ru"}, ["Russian", "not in this study; it has en, sw"]),
        ({"language": "swahili"}, ["unknown language tag", "did you mean"]),
        ({"category": "commonsense"}, ['no items of category "commonsense" in Swahili', "reasoning", "text"]),
        ({"category": "few"}, ['too few questions of category "few" in Swahili', "needs two templates"]),
    ],
)
def test_mistakes_are_one_line_and_status_two(finished, change, words):
    before = sorted(finished.rglob("*"))
    expect_one_line(diagnose(finished, **change), *words)
    assert sorted(finished.rglob("*")) == before


def test_half_of_too_little_is_refused(finished):
    result = diagnose(finished, "--half", "second", category="few")
    expect_one_line(result, 'too few questions of category "few"', "in the second half")


def test_a_folder_without_a_study_is_refused(place, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", place / "study.toml"):
        expect_one_line(diagnose(folder), f"there is no study in {folder}", "prunescope run STUDY.toml --out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('items = "file:riddles/{lang}.jsonl"', 'itmes = "none"', ('unknown key "itmes" in [tasks]', '"items"')),
        ('items = "file:riddles/{lang}.jsonl"', 'items = "bundeld"', ("tasks.items", "unknown item source")),
        ("[tasks]", "[tasks]\nper_category = 1", ("tasks.per_category", "greater than or equal to 2")),
        ("[tasks]", "[tasks]\nper_category = { reasonign = 4 }", ("tasks.per_category", 'did you mean "reasoning"?')),
        (
            "[tasks]",
            "[tasks]\nper_category = { reasoning = 0, fluency = 0, few = 0, pairs = 0 }",
            ("tasks.per_category leaves no items in English",),
        ),
        ("[tasks]", '[tasks]\nharness = ["belebele_xyz"]', ("belebele_xyz",)),
        ("riddles/{lang}", "nowhere/{lang}", ("no items for English", "nowhere/en.jsonl")),
        ("riddles/{lang}", "wrong/{lang}", ("wrong/en.jsonl, line 2", "no choice is correct")),
    ],
)
def test_mistakes_in_the_tasks_of_a_study_are_one_line(place, tmp_path, old, new, words):
    (place / "wrong").mkdir(exist_ok=True)
    for language in ("en", "sw"):
        lines = (place / "riddles" / f"{language}.jsonl").read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | {"answer": 2})
        (place / "wrong" / f"{language}.jsonl").write_text("\n".join(lines))
    (place / "wrong.toml").write_text(STUDY.replace(old, new))
    expect_one_line(prunescope("run", place / "wrong.toml", "--out", tmp_path / "out"), *words)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_study_without_items_can_only_have_its_text_diagnosed(place, tmp_path):
    (place / "none.toml").write_text(STUDY.replace("file:riddles/{lang}.jsonl", "none"))
    result = prunescope("run", place / "none.toml", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(read_frame(tmp_path / "out" / "frames" / "items.parquet")) == 0
    assert len(read_frame(tmp_path / "out" / "frames" / "accuracy.parquet")) == 0
    expect_one_line(diagnose(tmp_path / "out"), "no items in Swahili", 'items = "file:', "--category text")
    result = diagnose(tmp_path / "out", category="text")
    assert result.returncode == 0, result.stderr
    assert "the text in Swahili, n = 8" in result.stdout
