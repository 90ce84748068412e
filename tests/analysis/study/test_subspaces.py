"""From a study's subspaces to a file, and from the file to the variants of another study."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from command_line import prunescope
from typer.testing import CliRunner

from analysis.cli import app
from analysis.frames import labels
from analysis.study.context import Context
from analysis.study.planning.plan import plan_study
from analysis.study.provenance import provenance
from analysis.study.prune import Prune
from analysis.study.read import Read, subspaces
from analysis.study.study_file import load_study
from analysis.study.subspaces import write_subspaces
from pruning import Subspaces, load_model
from pruning.errors import PrunescopeError, RecipeError, StudyError
from pruning.files import write_json

WEIGHTED = (
    '[[recipes]]\nmethod = ["wanda", "ria"]\nsubspaces = "found.safetensors"\nparameters = { specific = [1, 0] }\n'
)


def head(place, languages='["en", "sw", "zh"]'):
    settings = '[calibration]\nsets = ["en"]\nsamples = 3\nlength = 32\n[tasks]\nitems = "none"\n'
    evaluation = "[evaluation]\nsegments = 4\nfit_segments = 6\nmax_length = 40\n"
    return f'model = "{place / "model"}"\nlanguages = {languages}\n{settings}{evaluation}'


@pytest.fixture(scope="module")
def measured(place, tmp_path_factory):
    """A study that has read its text, in its folder."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "study.toml").write_text(head(place))
    context = Context(load_study(folder / "study.toml"), folder)
    for stage in (Prune(), Read()):
        for unit in stage.units(context):
            stage.run(context, unit, lambda work: None)
    write_json(folder / "provenance.json", provenance(context, 0.0, []))
    return context


def test_the_file_has_the_subspaces_of_the_study_and_says_of_what(measured, tmp_path):
    result = CliRunner().invoke(app, ["subspaces", str(measured.folder), "--out", str(tmp_path / "s.safetensors")])
    assert result.exit_code == 0, result.output
    assert "rank 2, 3 blocks, en, sw, zh" in result.output
    found = Subspaces.open(tmp_path / "s.safetensors")
    assert found.model_fingerprint == measured.model.facts.fingerprint
    assert found.languages == ("en", "sw", "zh")
    for layer, lsar in enumerate(subspaces(measured)[:-1], start=1):
        np.testing.assert_allclose(found.before(layer).numpy(), lsar.basis_, atol=1e-6)
    one = write_subspaces(measured.folder, tmp_path / "one", rank=1)
    assert one.ranks == (1, 1, 1)


def test_random_subspaces_have_the_same_rank_and_nothing_in_common(measured, tmp_path):
    real = write_subspaces(measured.folder, tmp_path / "real")
    first, second = (write_subspaces(measured.folder, tmp_path / str(seed), random=seed) for seed in (1, 2))
    assert real.ranks == first.ranks == second.ranks
    assert len({real.sha256, first.sha256, second.sha256}) == 3
    assert "random subspaces (seed 1)" in first.fitted_on
    assert write_subspaces(measured.folder, tmp_path / "again", random=1).sha256 == first.sha256
    overlap = torch.linalg.matrix_norm(first.before(1).T @ real.before(1)) ** 2 / 2
    assert float(overlap) < 0.5


def test_a_study_prunes_with_such_a_file_and_names_it_everywhere(measured, place, tmp_path):
    found = write_subspaces(measured.folder, tmp_path / "found.safetensors")
    (tmp_path / "study.toml").write_text(head(place) + WEIGHTED)
    study = load_study(tmp_path / "study.toml")
    start = found.sha256[:6]
    weighted = f"wanda-0.5-row-specific=0-subspaces={start}-pruned-en-s0"
    names = {job.id for job in study.jobs()}
    assert len(names) == 4
    assert {weighted, "wanda-0.5-row-pruned-en-s0"} <= names
    assert plan_study(study, tmp_path / "planned") is not None
    context = Context(study, tmp_path / "out")
    for unit in Prune().units(context):
        Prune().run(context, unit, lambda work: None)
    variant, plain = context.variants.open(weighted), context.variants.open("wanda-0.5-row-pruned-en-s0")
    assert plain.masks == measured.variants.open("wanda-0.5-row-pruned-en-s0").masks
    same = {key: torch.equal(variant.masks[key], plain.masks[key]) for key in plain.masks}
    assert all(alike for (layer, _), alike in same.items() if layer == 0)  # nothing is fitted before the first block
    assert not any(alike for (layer, role), alike in same.items() if layer and role in ("gate", "up"))
    assert variant.record.recipe.subspaces.languages == ("en", "sw", "zh")
    assert str(tmp_path) not in variant.record.model_dump_json()
    assert variant.columns()["method"] == f"wanda(specific=0, subspaces={start})"
    assert labels.recipe_label(variant.columns()) == f"Wanda(specific=0, subspaces={start}), sparsity 0.5, per row"
    (tmp_path / "again.toml").write_text(study.to_toml())
    assert {job.id for job in load_study(tmp_path / "again.toml").jobs()} == names
    variant.export(*load_model(str(place / "model"), dtype="float32"), tmp_path / "checkpoint")
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert f"specific=0, subspaces={start}" in card
    assert f"`{found.sha256}`: of en, sw, zh" in card


def test_subspaces_of_another_model_are_refused_before_anything_is_pruned(measured, place, tmp_path):
    found = write_subspaces(measured.folder, tmp_path / "real")
    bases = [found.before(1)] * 3
    Subspaces.save(tmp_path / "found.safetensors", bases, model_fingerprint="4f", languages=("en", "sw"))
    (tmp_path / "study.toml").write_text(head(place) + WEIGHTED)
    context = Context(load_study(tmp_path / "study.toml"), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"found\.safetensors has the subspaces of a model other than"):
        Prune().units(context)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (WEIGHTED.replace("specific = [1, 0]", "power = 0.5"), "subspaces are for parameters = { specific = 0 }"),
        (WEIGHTED.replace("[1, 0]", "1"), "subspaces are for parameters = { specific = 0 }"),
        (WEIGHTED.replace("subspaces = ", "# "), "specific = 0 needs subspaces, the file that prunescope subspaces"),
        (WEIGHTED.replace('"ria"', '"magnitude"'), '"magnitude" with uniform allocation has no parameter "specific"'),
        (WEIGHTED.replace("found", "lost"), "lost.safetensors with subspaces; write it with: prunescope subspaces DIR"),
        (WEIGHTED.replace("found.safetensors", "study.toml"), "study.toml is damaged"),
    ],
)
def test_mistakes_are_one_clear_line(measured, place, tmp_path, recipe, message):
    write_subspaces(measured.folder, tmp_path / "found.safetensors")
    (tmp_path / "study.toml").write_text(head(place) + recipe)
    with pytest.raises(PrunescopeError, match=re.escape(message)) as caught:
        load_study(tmp_path / "study.toml")
    assert "\n" not in str(caught.value)


def test_a_study_that_has_not_read_its_text_has_no_subspaces(measured, place, tmp_path):
    (tmp_path / "study.toml").write_text(head(place))
    with pytest.raises(StudyError, match="has not read its fitting text in en yet; finish the study: prunescope run"):
        write_subspaces(tmp_path)
    with pytest.raises(StudyError, match="--rank 3 must be less than the number of languages, 3"):
        write_subspaces(measured.folder, tmp_path / "s", rank=3)
    result = prunescope("subspaces", tmp_path / "nothing")
    assert result.returncode == 2
    assert "there is no study in" in result.stderr
