"""Studies that calibrate on items: on one half of the templates, and only the other half is asked."""

from __future__ import annotations

import json

import pytest
from studies import STUDY

from analysis.frames import VARIANT_COLUMNS, labels, read_frame, recipes_of
from analysis.study.context import Context
from analysis.study.diagnosis_request import DiagnosisRequest, asked_items, check
from analysis.study.frames import MakeFrames
from analysis.study.provenance import provenance
from analysis.study.prune import Prune
from analysis.study.read import Read
from analysis.study.study_file import load_study
from analysis.study.texts import StudyTexts
from probes import ItemSource
from pruning.errors import PrunescopeError, StudyError, TextError
from pruning.text.calibration import CalibrationText

EN_SW = 'model = "demo"\nlanguages = ["en", "sw"]\n'
ITEMS = 'items = "reasoning"\nitem_share = [0, 0.5, 1]\n'


def load(folder, calibration, more="", head=EN_SW):
    (folder / "study.toml").write_text(f"{head}[calibration]\n{calibration}{more}", encoding="utf-8")
    return load_study(folder / "study.toml")


def written_items(folder, languages=("en", "sw"), templates=4, category="logic"):
    """Files of items: four a template, in two minimal pairs; the templates come in another order in each language."""
    folder.mkdir()
    for number, language in enumerate(languages):
        lines = []
        for template in (f"t{(i + number) % templates}" for i in range(templates)):
            for item in range(4):
                lines.append(
                    {
                        "id": f"{template}-{item}",
                        "twin": f"{template}-{item // 2}",
                        "template": template,
                        "category": category,
                        "prompt": f"{language} {template} {item} is",
                        "choices": [" right", " wrong"] if item % 2 else [" wrong", " right"],
                        "answer": 0 if item % 2 else 1,
                    }
                )
        (folder / f"{language}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f'[tasks]\nitems = "file:{folder}/{{lang}}.jsonl"\n'


def test_every_set_and_seed_is_drawn_with_every_share(tmp_path):
    study = load(tmp_path, 'sets = ["en", "sw"]\nseeds = [0, 1]\n' + ITEMS)
    sets = study.calibration_sets()
    assert {(s.name, s.seed, s.item_share) for s in sets} == {
        (name, seed, share) for name in ("en", "sw") for seed in (0, 1) for share in (0.0, 0.5, 1.0)
    }
    assert len({job.id for job in study.jobs()}) == 12
    assert "wanda-0.5-row-pruned-sw-items=0.5-s1" in {job.id for job in study.jobs()}
    assert "wanda-0.5-row-pruned-sw-s1" in {job.id for job in study.jobs()}  # named as in a study without items
    (tmp_path / "again.toml").write_text(study.to_toml())
    assert load_study(tmp_path / "again.toml") == study


def test_no_template_that_is_calibrated_on_is_asked_in_any_language(tmp_path):
    study = load(tmp_path, 'sets = ["en", "fr"]\n' + ITEMS)  # French is calibrated on, and not evaluated
    texts = StudyTexts(study)
    everything = {language: ItemSource().items(language) for language in ("en", "sw", "fr")}
    calibrated = {language: {s.id for s in texts.corpus.pool(language, "reasoning")} for language in ("en", "fr")}
    used = {item.template for lang, ids in calibrated.items() for item in everything[lang] if item.id in ids}
    asked = {item.template for items in texts.items.values() for item in items if item.category == "reasoning"}
    every = {item.template for item in everything["en"] if item.category == "reasoning"}
    assert used | asked == every
    assert not used & asked
    assert len(used) == len(asked) == 9
    for language, items in texts.items.items():
        others = [item for item in everything[language] if item.category != "reasoning"]
        assert [item for item in items if item.category != "reasoning"] == others


@pytest.mark.parametrize("language", ["ar", "de", "en", "es", "fr", "ru", "sw", "zh"])
def test_the_half_is_that_of_a_diagnosis_of_the_first_half(tmp_path, language):
    other = "sw" if language == "en" else "en"
    study = load(tmp_path, 'sets = ["en"]\n' + ITEMS, head=f'model = "demo"\nlanguages = ["{language}", "{other}"]\n')
    request = DiagnosisRequest(variant="v", language=language, category="reasoning", half="first")
    first = {item.template for item in asked_items(ItemSource().items(language), request)}
    asked = {item.template for item in study.items(language) if item.category == "reasoning"}
    assert asked
    assert not first & asked


def test_a_diagnosis_of_such_a_study_asks_only_what_was_not_calibrated_on(tmp_path):
    study = load(tmp_path, 'sets = ["en"]\n' + ITEMS)
    used = study.calibration_items().used
    for half in ("all", "first", "second"):
        request = DiagnosisRequest(variant="wanda-0.5-row-pruned-en-s0", language="sw", half=half)
        asked = asked_items(study.items("sw"), check(study, request))
        assert asked
        assert not used & {item.template for item in asked}


def test_items_are_text_with_the_right_answer_and_cut_into_the_sequences(tmp_path, tokenizer):
    tasks = written_items(tmp_path / "items")
    study = load(tmp_path, 'sets = ["en+sw"]\nsamples = 2\nlength = 40\nitems = "logic"\nitem_share = 1\n', tasks)
    texts = StudyTexts(study)
    used = study.calibration_items().used
    assert len(used) == 2
    for language in ("en", "sw"):
        expected = {f"{language} {t} {item} is right" for t in used for item in range(4)}
        assert {segment.text for segment in texts.corpus.pool(language, "logic")} == expected
        assert {item.template for item in texts.items[language]} == {"t0", "t1", "t2", "t3"} - used
    (calibration,) = study.calibration_sets()
    text = CalibrationText.draw(tokenizer, texts.corpus, [calibration])
    english, swahili = text.pieces[calibration]
    written = "".join(segment.text + "\n" for segment in texts.corpus.pool("en", "logic"))
    expected = tokenizer(written, add_special_tokens=False)["input_ids"][:39]
    assert text.tokens[english].tolist() == [[tokenizer.bos_token_id, *expected]]
    assert (swahili.language, swahili.items) == ("sw", "logic")


def test_a_pair_of_two_templates_is_asked_only_if_neither_is_calibrated_on(tmp_path):
    folder = tmp_path / "items"
    tasks = written_items(folder)
    for language in ("en", "sw"):  # the pairs of the last template have one item of the first
        path = folder / f"{language}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if line["id"] in ("t3-0", "t3-2"):
                line["template"] = "t0"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = load(tmp_path, 'sets = ["en"]\nsamples = 2\nlength = 8\nitems = "logic"\nitem_share = 1\n', tasks)
    used = study.calibration_items().used
    asked = study.items("sw")
    assert asked
    twins = {item.twin for item in ItemSource(study.tasks.items).items("sw") if item.template in used}
    assert not twins & {item.twin for item in asked}


@pytest.mark.parametrize(
    ("calibration", "tasks", "message"),
    [
        ('items = "resoning"\nitem_share = 1', "", 'unknown category "resoning"; did you mean "reasoning"?'),
        ('items = "reasoning"\nitem_share = [0, 1.5]', "", "item_share 1.5 is not between 0 and 1"),
        ('items = "reasoning"\nitem_share = -0.5', "", "item_share -0.5 is not between 0 and 1"),
        ('items = "reasoning"\nitem_share = 0.001', "", "item_share 0.001 of 32 samples is none of them"),
        ('items = "reasoning"', "", "items are calibrated on by a share of the samples; add item_share"),
        ('items = "reasoning"\nitem_share = []', "", "item_share is an empty list"),
        ("item_share = 0.5", "", "item_share needs items, the category to calibrate on"),
        ('items = "reasoning"\nitem_share = 1', '[tasks]\nitems = "none"', "needs items, and this study has none"),
        ('items = "reasoning"\nitem_share = "all"', "", "calibration.item_share"),
    ],
)
def test_mistakes_are_one_clear_line_at_the_door(tmp_path, calibration, tasks, message):
    with pytest.raises(PrunescopeError) as caught:
        StudyTexts(load(tmp_path, calibration + "\n", tasks)).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_items_are_one_clear_line_before_anything_is_pruned(place, tmp_path):
    head = f'model = "{place / "model"}"\nlanguages = ["en", "sw"]\n'
    settings = 'sets = ["sw"]\nsamples = 40\nlength = 32\nitems = "logic"\nitem_share = 1\n'
    study = load(tmp_path, settings, written_items(tmp_path / "items"), head)
    context = Context(study, tmp_path / "out")
    with pytest.raises(
        TextError, match=r"40 samples .* its logic items have \d+ tokens, enough for \d+; lower samples, "
    ):
        Prune().units(context)
    alone = written_items(tmp_path / "alone", templates=1)
    with pytest.raises(StudyError, match="has a single template, which cannot be both calibrated on and asked"):
        StudyTexts(load(tmp_path, settings, alone, head)).check()


def test_what_was_calibrated_on_items_is_told_apart_everywhere(place, tmp_path):
    settings = 'sets = ["en", "sw"]\nsamples = 4\nlength = 32\nitems = "logic"\nitem_share = [0, 1]\n'
    more = "[evaluation]\nsegments = 6\nfit_segments = 4\nmax_length = 40\n"
    tasks = written_items(tmp_path / "items", templates=6)
    head = f'model = "{place / "model"}"\nlanguages = ["en", "sw"]\n'
    study = load(tmp_path, settings, more + tasks, head)
    context = Context(study, tmp_path / "out")
    for stage in (Prune(), Read(), MakeFrames()):
        while units := stage.units(context):
            for unit in units:
                stage.run(context, unit, lambda work: None)
    frames = {name: read_frame(tmp_path / "out" / "frames" / f"{name}.parquet") for name in ("perplexity", "items")}
    models = frames["perplexity"][list(VARIANT_COLUMNS)].drop_duplicates()
    pruned = models[models["method"] == "wanda"]
    assert sorted(zip(pruned["calibration"], pruned["item_share"], strict=True)) == [
        ("en", 0.0), ("en", 1.0), ("sw", 0.0), ("sw", 1.0),
    ]  # fmt: skip
    used = study.calibration_items().used
    for model, asked in frames["items"].groupby(["method", "calibration", "item_share"], observed=True):
        assert set(asked["template"]) == {f"t{i}" for i in range(6)} - used, model
    overlap = read_frame(tmp_path / "out" / "frames" / "mask_overlap.parquet")
    assert set(overlap["item_share"]) == {0.0, 1.0}  # sets are compared at one share
    assert (overlap["calibration"].astype(str) != overlap["other_calibration"].astype(str)).all()
    first, second = recipes_of(frames["perplexity"])
    assert labels.recipe_label(first) == "Wanda, sparsity 0.5, per row"
    assert labels.recipe_label(second) == "Wanda, sparsity 0.5, per row, calibrated on 100% items"
    assert labels.recipe_slug(first) != labels.recipe_slug(second)
    assert len(set(labels.variant_labels(models))) == 5
    record = context.variants.open("wanda-0.5-row-pruned-en-items=1-s0").record
    assert [(part.language, part.items) for part in record.text] == [("en", "logic")]
    assert (record.calibration.items, record.calibration.item_share) == ("logic", 1.0)
    told = provenance(context, 0.0, [])
    assert told["text"]["calibration_items"].keys() == told["text"]["calibration"].keys() == {"en", "sw"}


def test_studies_without_items_ask_what_they_always_did(tmp_path):
    assert StudyTexts(load(tmp_path, 'sets = ["en"]\n')).items["sw"] == ItemSource().items("sw")
    assert STUDY.count("items") == 0
