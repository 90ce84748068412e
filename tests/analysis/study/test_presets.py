"""The studies that come with prunescope: each is valid, and is what its file and the docs say. No network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import expect_one_line, prunescope

import analysis
from analysis.study import study_file
from analysis.study.presets import preset_names, preset_summary, preset_text
from analysis.study.study_file import preset_study, resolved_study
from pruning.text.hub import HUB_PRESETS
from pruning.text.languages import alpha3_script

KURZ = ("ar", "de", "en", "es", "ru", "sw", "zh")
DOCS = Path(analysis.__file__).parent.parent / "docs" / "replication.md"
#: Codes of FLORES+ by language.
FLORES = """
am amh_Ethi, ar arb_Arab, bn ben_Beng, de deu_Latn, en eng_Latn, es spa_Latn, fr fra_Latn, ha hau_Latn, hi hin_Deva, id ind_Latn,
ig ibo_Latn, ja jpn_Jpan, km khm_Khmr, ko kor_Hang, my mya_Mymr, ru rus_Cyrl, so som_Latn, sw swh_Latn, ta tam_Taml, tr tur_Latn,
vi vie_Latn, yo yor_Latn, zh cmn_Hans, zu zul_Latn
"""


@pytest.mark.parametrize("name", preset_names())
def test_every_study_is_valid_and_planned_without_a_network(name):
    study = preset_study(name)
    jobs, checkpoints = study.jobs(), study.checkpoints()
    assert len({job.id for job in jobs} | checkpoints.keys()) == len(jobs) + len(checkpoints) > 0
    for calibration in study.calibration_sets():
        assert set(calibration.languages) <= set(study.languages)
    for source in (study.text.calibration, study.text.parallel, study.text.heldout):
        assert source == "bundled" or str(source).removeprefix("hub:") in HUB_PRESETS
    said = re.search(r"(\d+) (?:variants|checkpoints)", preset_text(name))
    assert said is None or int(said[1]) == len(jobs) + len(checkpoints)
    assert len(preset_summary(name)) < 130
    (row,) = (line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}`"))
    assert name == "demo" or f"{len(jobs) + len(checkpoints)} " in row


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("kurz-2026-llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("kurz-2026-aya-23-8b", "CohereForAI/aya-23-8B"),
    ],
)
def test_the_published_design_is_there_as_a_whole(name, model):
    study = preset_study(name)
    assert (study.model, study.languages, study.text.calibration) == (model, KURZ, "hub:mc4")
    recipes = {(r.method, r.sparsity, r.pattern) for r in study.all_recipes()}
    assert recipes == {
        ("wanda", 0.1, "row"),
        ("wanda", 0.2, "row"),
        ("wanda", 0.3, "row"),
        ("wanda", 0.5, "row"),
        ("wanda", 0.5, "2:4"),
        ("sparsegpt", 0.5, "matrix"),
        ("sparsegpt", 0.5, "2:4"),
    }
    draws = {(c.name, c.seed, c.samples) for c in study.calibration_sets()}
    assert {(tag, seed, 128) for tag in KURZ for seed in (0, 42, 1234)} < draws


def test_published_checkpoints_have_the_names_that_the_hub_lists():
    study = preset_study("kurz-2026-checkpoints")
    found = {own.source: own.stated for own in study.checkpoints().values()}
    assert study.jobs() == []
    assert {(own.calibration, own.seed) for own in found.values()} == {(t, s) for t in KURZ for s in (0, 42, 1234)}
    for name in ("wanda-0.5-unstructured-mc4-es-0", "sparsegpt-0.5-unstructured-mc4-zh-0"):  # as listed on the hub
        assert f"multilingual-pruning/pruned-pruned-llama3-8b-instruct-{name}" in found


def test_the_languages_of_a_broad_study_are_in_flores():
    study = preset_study("flores-24")
    codes = dict(pair.split() for pair in FLORES.split(","))
    own = HUB_PRESETS["flores"].codes
    assert len(study.languages) == 24
    assert {tag: own.get(tag, alpha3_script(tag)) for tag in study.languages} == codes


def test_studies_are_listed_and_printed_to_be_edited(tmp_path):
    *listed, following = prunescope("studies").stdout.splitlines()
    assert following.startswith("Next: prunescope run NAME")
    assert [line for line in listed if not line.startswith(" ")] == preset_names()
    printed = prunescope("studies", "kurz-2026-checkpoints").stdout
    path = tmp_path / "mine.toml"
    path.write_text(printed, encoding="utf-8")
    assert study_file.load_study(path) == preset_study("kurz-2026-checkpoints")
    expect_one_line(prunescope("studies", "kurz"), 'unknown study "kurz"; known: demo, flores-24, kurz-2026-')


def test_a_file_comes_before_a_study_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolved_study("flores-24") == preset_study("flores-24")
    Path("flores-24").write_text(preset_text("demo"), encoding="utf-8")
    assert resolved_study("flores-24") == preset_study("demo")
    expect_one_line(
        prunescope("run", "kurz-2026-lama3-8b"),
        "there is no study file kurz-2026-lama3-8b",
        'did you mean "kurz-2026-llama3-8b"',
    )
    expect_one_line(prunescope("run", "nothing.toml"), "prunescope run demo")
