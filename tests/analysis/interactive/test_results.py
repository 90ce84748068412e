"""A study opened from its folder, and the same variants looked at in memory: what is asked for is what comes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from checkpoints import saved
from command_line import prunescope
from conftest import tiny_model, tiny_tokenizer
from matplotlib.figure import Figure
from rich.console import Console
from studies import STUDY

from analysis import Study, look, read_frame
from analysis.report import KINDS
from analysis.study import figures
from analysis.study.analyses import NAMES
from analysis.study.diagnosis_request import DiagnosisRequest
from analysis.study.run import diagnose_study
from pruning import CalibrationSet, Corpus, Recipe, load_model, prune
from pruning.errors import LanguageError, StudyError, TextError, VariantError

FEW_ITEMS = "per_category = { fluency = 2, commonsense = 2, knowledge = 0, reasoning = 0 }"
DIAGNOSED = "wanda-0.5-row-pruned-sw-s1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished study with a diagnosis; its figures, which take most of the time, are not drawn."""
    place = tmp_path_factory.mktemp("study")
    saved(tiny_model(max_position_embeddings=1024), place / "model", shard="1GB")
    (place / "study.toml").write_text(STUDY.replace("per_category = 2", FEW_ITEMS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "study_figures", lambda *_: iter(()))
        patched.setattr(figures, "diagnosis_figures", lambda *_, **__: iter(()))
        assert prunescope("run", place / "study.toml", "--out", place / "out").returncode == 0
        request = DiagnosisRequest(variant=DIAGNOSED, language="sw", category="text", confirm=2, sample=1)
        diagnose_study(place / "out", [request], Console(quiet=True))
    return place / "out"


@pytest.fixture
def study(folder):
    return Study.open(folder)


@pytest.fixture(scope="module")
def seen(folder):
    """The same variants of the same model, on the same text."""
    study = Study.open(folder)
    model, tokenizer = study.load_model()
    amounts = {
        "segments": 8,
        "fit_segments": 6,
        "max_length": 40,
        "per_category": {"fluency": 2, "commonsense": 2, "knowledge": 0, "reasoning": 0},
    }
    return look(model, tokenizer, study.variants(), study.languages, name=study.config.model_name, **amounts)


# -- variants -------------------------------------------------------------------------------------------------------


def test_variants_are_those_that_have_all_that_is_asked_for(study):
    assert [v.id for v in study.variants(method="wanda", calibration="sw")] == [
        f"wanda-0.5-row-pruned-sw-s{i}" for i in (0, 1)
    ]
    assert {v.id for v in study.variants(calibration=["en", "all"])} == {
        f"wanda-0.5-row-pruned-{c}-s0" for c in ("en", "all")
    }
    assert [v.id for v in study.variants(sparsity=0.3)] == ["magnitude-0.3-matrix"]
    assert len(study.variants()) == 5


def test_one_variant_is_the_one_that_the_folder_has(study, folder):
    variant = study.variant(method="wanda", calibration="sw", seed=1)
    assert variant.id == DIAGNOSED
    assert f"Variant({DIAGNOSED}" in repr(variant)
    model, _ = study.load_model()
    variant.check_belongs_to(variant.record.model_fingerprint)
    assert (
        variant.masks
        == prune(
            model,
            tiny_tokenizer(),
            Recipe(method="wanda", sparsity=0.5),
            Corpus.of("bundled"),
            CalibrationSet.named("sw", samples=6, length=32, seed=1),
        )[0].masks
    )


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"method": "wanda"}, "4 variants match method='wanda'"),
        ({"method": "wanda", "calibration": "sw"}, "say which: seed=0 or 1"),
        ({}, 'say which: method="magnitude" or "wanda"; sparsity=0.3 or 0.5; pattern="matrix" or "row"'),
        ({"method": "wandas"}, 'no variants have method "wandas"; did you mean "wanda"? known: magnitude, wanda'),
        ({"methods": "wanda"}, 'variants are not chosen by methods; did you mean "method"?'),
        ({"method": "magnitude", "calibration": "en"}, "no variants match"),
        ({"seed": 7}, "no variants have seed 7; known: 0, 1"),
    ],
)
def test_anything_but_one_variant_is_an_error_that_says_what_there_is(study, what, said):
    with pytest.raises(StudyError) as error:
        study.variant(**what)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_models_have_the_columns_of_the_frames(study):
    models = study.models
    assert list(models.index) == ["dense", *(v.id for v in study.variants())]
    for variant in study.variants():
        assert models.loc[variant.id].to_dict() == variant.columns()


def test_models_are_known_before_there_are_frames(tmp_path, folder):
    (tmp_path / "study.toml").write_bytes((folder / "study.toml").read_bytes())
    (tmp_path / "variants").symlink_to(folder / "variants")
    unread = Study.open(tmp_path)
    pd.testing.assert_frame_equal(unread.models, Study.open(folder).models)
    with pytest.raises(StudyError, match='no frame "perplexity" yet; finish the study: prunescope run'):
        _ = unread.perplexity


# -- frames ---------------------------------------------------------------------------------------------------------


def test_a_look_has_the_frames_of_the_study(seen, study):
    for name in NAMES:
        pd.testing.assert_frame_equal(seen.frame(name), study.frame(name), check_categorical=False, obj=name)


def test_frames_are_attributes_and_are_completed(study, folder):
    assert {"perplexity", "signal", "neuron_shift"} <= set(dir(study))
    assert study.perplexity is study.frame("perplexity") is study.frames["perplexity"]
    pd.testing.assert_frame_equal(study.signal, read_frame(folder / "frames" / "signal.parquet"))
    with pytest.raises(AttributeError, match='did you mean "perplexity"'):
        _ = study.perplexities


def test_rows_of_a_frame_are_those_asked_for(study):
    whole = study.perplexity
    some = study.frame("perplexity", language=["sw", "zh"], calibration="sw", metric="perplexity")
    expected = whole[(whole.calibration == "sw") & (whole.metric == "perplexity") & (whole.language != "en")]
    pd.testing.assert_frame_equal(some, expected)
    assert len(some) == 4
    for what, said in (({"language": "de"}, "known: en, sw, zh"), ({"lang": "sw"}, 'did you mean "language"')):
        with pytest.raises(StudyError, match=said):
            study.frame("perplexity", **what)
    with pytest.raises(StudyError, match='unknown frame "perplex"; did you mean "perplexity"'):
        study.frame("perplex")


def test_neurons_are_those_of_the_readings(study):
    frame = study.neurons(layers=[1], languages=["sw"], models=["dense"])
    fired = frame[frame["metric"] == "firing_probability"].set_index("neuron")["value"]
    read = study.readings["dense", "sw"]
    assert fired.to_list() == pytest.approx((read.fired[:, 1].sum(0) / read.tokens[1].sum()).tolist())


# -- figures --------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_report_with_its_captions(study, seen):
    captions = {name: figure.caption for name, figure in study.figures.items() if "diagnosis" not in name}
    assert {"perplexity", "signal-wanda-0.5-row-pruned", "mask-overlap-wanda-0.5-row-pruned"} <= captions.keys()
    assert captions == {name: figure.caption for name, figure in seen.figures.items()}
    assert any("diagnosis" in name for name in study.figures) or not len(study.diagnoses[0].figures)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_figure_is_drawn_in_any_languages(study, kind):
    of_kind = [figure for figure in study.figures.values() if figure.kind == kind]
    if not of_kind:
        with pytest.raises(StudyError, match="nothing to draw"):
            study.figure(kind)
        return
    figure = study.figure(kind, language=["sw", "zh"], width=3.1, **of_kind[0].what)
    assert figure.get_figwidth() == pytest.approx(3.1)


def test_a_figure_shows_the_recipe_and_the_languages_asked_for(study):
    def drawn(figure: Figure) -> bytes:
        with mpl.rc_context({"svg.hashsalt": "same"}):
            figure.savefig(file := io.BytesIO(), format="svg", metadata={"Date": None})
        return file.getvalue()

    by_name, by_what = study.figure("signal-magnitude-0.3-matrix-none"), study.figure("signal", method="magnitude")
    assert drawn(by_name) == drawn(by_what) != drawn(study.figure("signal", method="wanda"))
    titles = {axes.get_title() for axes in study.figure("signal", language="sw", method="wanda").axes if axes.lines}
    assert titles == {"Swahili (sw)"}


@pytest.mark.parametrize(
    ("name", "what", "said"),
    [
        ("signals", {}, 'unknown figure "signals"; did you mean "signal"?'),
        ("signal", {}, '2 figures "signal" match'),
        ("signal", {"method": "sparsegpt"}, 'no figures "signal" have method "sparsegpt"'),
        ("signal", {"language": "de"}, 'unknown language "de"'),
        ("signal", {"metod": "wanda"}, 'did you mean "method"'),
        ("perplexity", {"method": "wanda"}, 'the figure "perplexity" shows all models; leave out method'),
    ],
)
def test_anything_but_one_figure_is_an_error_that_says_what_there_is(study, name, what, said):
    with pytest.raises(StudyError) as error:
        study.figure(name, **what)
    assert said in str(error.value)


def test_figures_of_masks_need_no_reading(make_model, tokenizer):
    model = make_model()
    sets = [CalibrationSet.named(name, samples=3, length=16) for name in ("en", "sw")]
    variants = prune(model, tokenizer, Recipe(method="wanda", sparsity=0.5), Corpus.of("bundled"), sets)
    read: list[float] = []
    only_masks = look(model, tokenizer, variants, progress=read.append)
    assert isinstance(only_masks.figure("mask-overlap"), Figure)
    assert len(only_masks.frame("mask_overlap", metric="iou"))
    assert not read


# -- diagnoses, words -------------------------------------------------------------------------------------------------


def test_a_look_diagnoses_as_a_study_does(seen, study):
    found = seen.diagnose("sw", "text", confirm=2, sample=1, id=DIAGNOSED)
    stored = study.diagnosis(language="sw", category="text")
    pd.testing.assert_frame_equal(found.frame, stored.frame, check_categorical=False)
    assert found.findings == stored.findings
    assert found.remedy == stored.remedy
    assert stored.request.title in repr(stored)
    assert list(found.figures) == list(stored.figures)
    assert seen.diagnose("sw", "text", confirm=2, sample=1, id=DIAGNOSED) is found is seen.diagnosis()
    with pytest.raises(StudyError, match='no diagnoses have language "en"'):
        study.diagnosis(language="en")
    with pytest.raises(StudyError, match="nothing was lost, so this diagnosis has no figures"):
        stored.figure("curves")


def test_findings_are_those_of_the_report(study):
    said = study.findings
    report = study.report.read_text()
    assert {"All models", "Wanda, sparsity 0.5, per row"} <= set(said)
    assert said["All models"][0].split(" (")[0] in report


@pytest.mark.parametrize("shown", ["study", "seen"])
def test_results_show_themselves(shown, request):
    results: Any = request.getfixturevalue(shown)
    html = results._repr_html_()
    assert DIAGNOSED in html
    assert "5 variants in en, sw, zh" in repr(results)
    for part in (results.variants(method="wanda"), results.figures, results.findings, results.diagnoses):
        assert part._repr_html_().startswith("<")
        assert repr(part)
    assert results.variants(method="wanda")[1:]._repr_html_().count("<tr") == 2 + 3
    assert len(results.variants(calibration="sw").table) == 2


# -- mistakes -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_study_says_what_to_type(tmp_path):
    with pytest.raises(StudyError, match="nowhere; run a study first: prunescope run"):
        Study.open(tmp_path / "nowhere")
    with pytest.raises(StudyError, match="there is no study in"):
        Study.open(tmp_path)


def test_questions_are_the_items_and_halves_part_them(seen):
    every = seen.questions("sw")
    fluency = [item for item in every if item.category == "fluency"]
    assert {item.id for item in fluency} == set(seen.frame("items", language="sw", category="fluency")["item"])
    halves = [{item.id for item in seen.questions("sw", half=half)} for half in ("first", "second")]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {item.id for item in every}
    assert seen.questions("sw", "fluency") == fluency
    with pytest.raises(StudyError, match="known: all, commonsense, fluency"):
        seen.questions("sw", "reason")
    with pytest.raises(StudyError, match="no items in de"):
        seen.questions("de")


def test_a_look_refuses_what_it_cannot_compare(make_model, tokenizer):
    model = make_model()
    (variant,) = prune(model, tokenizer, Recipe(method="magnitude", sparsity=0.5))
    with pytest.raises(LanguageError, match="unknown language"):
        look(model, tokenizer, variant, ["en", "swahili"])
    with pytest.raises(StudyError, match="two or more"):
        look(model, tokenizer, variant, "sw")
    with pytest.raises(TextError, match="unknown text source"):
        look(model, tokenizer, variant, text="bundles")
    with pytest.raises(TextError, match="unknown item source"):
        look(model, tokenizer, variant, items="bundles")
    with pytest.raises(VariantError, match="belongs to another model"):
        look(make_model(seed=1), tokenizer, variant)
    with pytest.raises(VariantError, match="two variants are called"):
        look(model, tokenizer, [variant, variant])
    with pytest.raises(StudyError, match="rank 3 must be"):
        look(model, tokenizer, variant, ["en", "sw", "zh"], rank=3)
    with pytest.raises(StudyError, match="segments is 1"):
        look(model, tokenizer, variant, segments=1)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen2_moe", "mt5"])
def test_facts_that_captions_state_are_those_of_the_readings(kind, make_model, tokenizer):
    seen = look(make_model(kind), tokenizer, languages=["en", "sw"], segments=3, fit_segments=3, max_length=24)
    read = {language: seen.measured.readings["dense", language] for language in ("en", "sw")}
    assert seen.facts.heldout_tokens == {language: int(own.tokens[0].sum()) for language, own in read.items()}
    assert seen.facts.neurons == read["en"].n_neurons
    assert seen.facts.blocks == len(read["en"].pooled)


def test_a_model_loaded_from_a_folder_is_called_by_it(folder):
    model, tokenizer = load_model(str(folder.parent / "model"), device="cpu")
    seen = look(model, tokenizer, languages=["en", "sw"], segments=3, fit_segments=3, max_length=24)
    assert set(seen.perplexity["model"]) == {str(folder.parent / "model")}


# -- figures in another size -----------------------------------------------------------------------------------------


def test_figures_are_drawn_again_in_the_size_that_is_asked_for(folder, tmp_path):
    size = ("--width", 3.1, "--font-size", 9, "--format", "svg")
    result = prunescope("figures", folder, "--out", tmp_path / "paper", "--kind", "perplexity", *size)
    assert (result.returncode, result.stdout) == (0, f"1 figure: {tmp_path / 'paper'}\n"), result.stderr
    (path,) = (tmp_path / "paper").iterdir()
    assert path.name == "perplexity.svg"
    assert f'width="{3.1 * 72:g}pt"' in path.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kind", "perplexty"), ('did you mean "perplexity"',)),
        (("--font-size", 0), ("--font-size",)),
        (("--format", "eps"), ("eps", "pdf")),
    ],
)
def test_what_cannot_be_drawn_is_said(folder, tmp_path, words, said):
    result = prunescope("figures", folder, "--out", tmp_path / "paper", *words)
    assert result.returncode == 2
    assert all(word in result.stderr for word in said)
    assert not (tmp_path / "paper").exists()


def test_the_figures_of_the_study_itself_are_not_written_over(folder):
    result = prunescope("figures", folder, "--out", folder / "figures", "--kind", "perplexity")
    assert result.returncode == 2
    assert "choose another folder" in result.stderr
