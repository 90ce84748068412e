"""Studies that have effects in common, and are combined from their folders."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from command_line import expect_one_line, prunescope
from pages import written
from scipy.stats import t

from analysis.frames import dense_columns, tidy, write_frame
from analysis.metrics.combined import COMBINED, KEYS, combine
from analysis.stats.meta import pooled
from pruning.files import PARTIAL

RECIPE = {"method": "wanda", "sparsity": 0.5, "pattern": "row", "allocation": "uniform", "scope": "all"}
RECIPE |= {"propagation": "pruned", "bits": 9.0}
DF = 6.0
STUDY = """
model = "{model}"
languages = ["de", "en", "sw", "zh"]
[calibration]
sets = ["de", "en", "sw", "zh"]
seeds = [0, 1]
[[recipes]]
method = ["wanda", "sparsegpt"]
sparsity = 0.5
"""


def estimate(value, error):
    half = t.ppf(0.975, DF) * error
    p_value = float(2 * t.sf(abs(value) / error, DF)) if error else float("nan")
    return {
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": 20,
        "draws": 2,
        "df": DF,
        "p_value": p_value,
    }


def frames_of(model, own, reasoning, sparsegpt, languages=("de", "en")):
    """Frames of a study with these effects, each with its error."""
    about = dense_columns(model) | RECIPE | {"calibration": None, "seed": None}
    contrasts = [
        {**about, "calibration": "own", "other_calibration": "others", "metric": "log_perplexity", **estimate(*own)},
        {**about, "calibration": "own", "other_calibration": "others", "metric": "snr_db", **estimate(1.0, 0.0)},
    ]
    contrasts += [
        {**about, "calibration": "en", "other_calibration": "sw", "language": language, "metric": "log_perplexity"}
        | estimate(0.1, 0.05)
        for language in languages
    ]
    category = {"task": "bundled", "category": "knowledge", "part": "all", "contrast": "category"}
    category |= {"other_category": "fluency", "metric": "accuracy_drop", "at_chance": False}
    between = {"task": "text", "category": "text", "other_recipe": "Wanda, sparsity 0.5, per row", "at_chance": False}
    between |= {"metric": "log_perplexity", "method": "sparsegpt"}
    return {
        "contrasts": tidy("contrasts", contrasts),
        "task_contrasts": tidy("task_contrasts", [{**about, **category, **estimate(*reasoning)}]),
        "recipe_contrasts": tidy("recipe_contrasts", [{**about, **between, **estimate(*sparsegpt)}]),
    }


EFFECTS = {
    "llama": frames_of("llama", (-0.40, 0.05), (0.10, 0.03), (0.30, 0.1)),
    "aya": frames_of("aya", (-0.30, 0.10), (0.12, 0.03), (0.10, 0.1), languages=("en", "zh")),
    "qwen": frames_of("qwen", (-0.45, 0.05), (0.11, 0.03), (-0.40, 0.1), languages=("sw",)),
}


@pytest.fixture
def studies(tmp_path):
    for model, frames in EFFECTS.items():
        folder = tmp_path / model
        folder.mkdir()
        (folder / "study.toml").write_text(STUDY.format(model=model))
        (folder / "frames").mkdir()
        for name, frame in frames.items():
            write_frame(folder / "frames", name, frame)
    return tmp_path


def test_the_same_effects_are_pooled_and_stand_beside_those_of_each_study():
    rows = combine(EFFECTS)
    own = rows[(rows["metric"] == "log_perplexity") & (rows["calibration"] == "own")]
    assert own["study"].tolist()[:3] == ["llama", "aya", "qwen"]
    assert own["value"].tolist()[:3] == [-0.40, -0.30, -0.45]
    expected = pooled(np.array([-0.40, -0.30, -0.45]), np.array([0.05, 0.10, 0.05]))
    together = own[own["study"].isna()].iloc[0]
    for name, value in expected._asdict().items():
        assert together[name] == pytest.approx(value), name
    assert (own["studies"] == 3).all()
    # what only one study has is left out, and so is what has no error
    assert set(rows["language"].dropna()) == {"en"}
    assert not (rows["metric"] == "snr_db").any()
    assert rows.loc[rows["language"] == "en", "studies"].tolist() == [2, 2, 2]
    assert rows.groupby(KEYS, dropna=False)["study"].apply(lambda of: of.isna().sum() == 1).all()
    assert (rows["p_adjusted"].notna() == rows["study"].isna()).all()


def test_effects_of_other_recipes_or_categories_are_not_mixed_up():
    other = {name: frame.copy() for name, frame in EFFECTS["aya"].items()}
    other["contrasts"] = other["contrasts"].assign(sparsity=0.3)
    other["task_contrasts"] = other["task_contrasts"].assign(
        category=pd.Categorical(["commonsense"]), task=pd.Categorical(["bundled"])
    )
    rows = combine({"llama": EFFECTS["llama"], "aya": other})
    assert set(rows["frame"]) == {"recipe_contrasts"}
    assert len(combine({"llama": EFFECTS["llama"]})) == 0


def test_the_page_has_every_study_and_says_what_they_show_together(studies):
    done = prunescope("combine", *(studies / model for model in EFFECTS), "--out", studies / "both")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"report: {studies / 'both' / 'report.html'}"
    page = written(studies / "both" / "report.html")
    for words in (
        "3 studies together",
        "Wanda, sparsity 0.5, per row: -0.4",
        "] nats over 3 studies (significant",
        "<td>Wanda, sparsity 0.5, per row; SparseGPT, sparsity 0.5, per row</td>",
        "knowledge minus fluency (bundled); Wanda, sparsity 0.5, per row: +11.0 [+3.5, +18.5] points",
        "studies differ (I² 9",
        "not significant",
    ):
        assert words in page, words
    table = pd.read_parquet(studies / "both" / "combined.parquet")
    assert len(table) == len(combine(EFFECTS)) == len(pd.read_csv(studies / "both" / "combined.csv"))
    drawn = {path.stem for path in (studies / "both" / "figures").glob("*.png")}
    assert drawn == {"own-language-perplexity", "categories", "recipes-perplexity"}
    (studies / "both" / "combined.parquet").unlink()  # as if it had been killed before that was there
    (studies / "both" / f"report.html{PARTIAL}").touch()
    again = prunescope("combine", *(studies / model for model in EFFECTS), "--out", studies / "both")
    assert again.returncode == 0, again.stderr


def test_what_cannot_be_combined_is_refused_and_nothing_is_written(studies):
    llama, aya, out = studies / "llama", studies / "aya", studies / "both"
    expect_one_line(prunescope("combine", llama, "--out", out), "two studies or more")
    expect_one_line(prunescope("combine", llama, llama, "--out", out), "each once")
    expect_one_line(prunescope("combine", llama, studies / "none", "--out", out), "none")
    (aya / "frames" / "recipe_contrasts.parquet").unlink()
    expect_one_line(prunescope("combine", llama, aya, "--out", out), "lacks frames", f"prunescope run {aya}/study.toml")
    write_frame(aya / "frames", "recipe_contrasts", EFFECTS["aya"]["recipe_contrasts"])
    expect_one_line(prunescope("combine", llama, aya, "--out", llama), "something else in it")
    for name in COMBINED:
        write_frame(aya / "frames", name, EFFECTS["aya"][name].assign(sparsity=0.3))
    expect_one_line(prunescope("combine", llama, aya, "--out", out), "no effect with an interval in common")
    assert not out.exists()
    shutil.rmtree(aya)
    expect_one_line(prunescope("combine", llama, aya, "--out", out), "aya")
