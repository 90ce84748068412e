"""The paragraph that says what was done, and the works that it cites."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from analysis.frames import STUDY_FRAMES, tidy
from analysis.report import ReportFacts, methods_latex, methods_paragraph, references
from analysis.report.paragraph import _WORKS, _entries, methods_plain
from pruning import CalibrationSet, Recipe
from pruning.allocation import UNIFORM
from pruning.methods import known_methods

FACTS = ReportFacts(
    model="owner/a_model",
    languages=["en", "sw"],
    sets=[CalibrationSet.named("en"), CalibrationSet.named("sw")],
    recipes=[Recipe(method="wanda", sparsity=0.5)],
    imported={},
    set_aside={},
    segments=8,
    fit_segments=16,
    rank=1,
    skip_first=True,
    heldout_tokens={"en": 300, "sw": 410},
    blocks=4,
    neurons=10,
    versions={"prunescope": "1.0"},
)
NOTHING = {name: tidy(name, []) for name in STUDY_FRAMES}


def said(**changes) -> str:
    return methods_paragraph(replace(FACTS, **changes), NOTHING, diagnosed=False)


def test_it_says_what_was_done():
    assert methods_plain(said()).startswith(
        "owner/a_model (4 blocks) was pruned with Wanda (sparsity 0.5, per row). Each calibration set (en and sw) has 32 "
        "sequences of 256 tokens and was drawn once. All models were evaluated in English and Swahili on 8 held-out "
        "segments per language (300 to 410 tokens) that share no text with calibration or fitting; the first token of a "
        "segment is left out, and so are special tokens."
    )


def test_what_follows_a_mask_is_said_and_cited():
    recipe = Recipe(method="wanda", sparsity=0.5, allocation="owl", correction="admm", recover="lora")
    (sentence,) = re.findall(r"was pruned with (.*?)\. ", said(recipes=[recipe]))
    assert sentence == (
        "Wanda [wanda] (sparsity 0.5, per row, owl allocation [owl], correction: ADMM [admm], fine-tuning: LoRA [lora])"
        .replace("LoRA", "lora")
    )  # fmt: skip
    quantized = said(recipes=[Recipe(method="gptq", bits=4, group=128)])
    assert "was quantized with GPTQ [gptq] (4 bits, groups of 128)." in quantized


def test_draws_are_counted():
    sets = [CalibrationSet.named(name, seed=seed) for name in ("en", "sw") for seed in range(3)]
    assert "(en and sw) has 32 sequences of 256 tokens and was drawn 3 times." in said(sets=sets)


def test_every_work_that_is_cited_has_an_entry_and_no_other_is_given():
    paragraph = said()
    cited = {"wanda", "nnsight", "lsar", "lape"}
    assert set(re.findall(r"\\cite\{(.*?)\}", methods_latex(paragraph, ""))) == cited
    assert set(re.findall(r"^@\w+\{([\w-]+),", references(paragraph), re.MULTILINE)) == cited


@pytest.mark.parametrize("name", [name for name in known_methods() if name != "random"])
def test_every_method_can_be_cited(name):
    assert _WORKS.get(name, name) in _entries()


def test_names_of_models_do_not_break_latex():
    assert r"owner/a\_model" in methods_latex(said(), "")
    assert UNIFORM not in said()


@pytest.mark.skipif(
    not (shutil.which("pdflatex") and shutil.which("bibtex")), reason="there is no LaTeX on this machine"
)
def test_it_compiles_with_its_references(tmp_path):
    paragraph = said(recipes=[Recipe(method=name, sparsity=0.5) for name in ("wanda", "sparsegpt", "ria")])
    (tmp_path / "references.bib").write_text(references(paragraph), encoding="utf-8")
    (tmp_path / "methods.tex").write_text(methods_latex(paragraph, "Made here."), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\begin{document}\\input{methods}\\bibliographystyle{plain}\\bibliography{references}"
        "\\end{document}"
    )
    for words in (["pdflatex", "-interaction=nonstopmode", "paper"], ["bibtex", "paper"]):
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout.lower()
