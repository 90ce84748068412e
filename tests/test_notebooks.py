"""Every notebook runs from start to end: always with a part of the model and of the text, and as it is with ``-m full``."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pruning import load_model

FOLDER = Path(__file__).parent.parent / "notebooks"
#: What is written in a notebook, and what takes its place to make it short.
SHORTER = {
    "01_diagnose_a_pruned_model": {
        "samples=8, length=128": "samples=2, length=32",
        "SEGMENTS, FITTING = 8, 16": "SEGMENTS, FITTING = 4, 4",
    },
    "02_compare_masks_across_calibration_languages": {"samples=8, length=128": "samples=2, length=32"},
    "03_figures_for_the_paper": {
        "samples = 8\nlength = 128": "samples = 2\nlength = 32",
        "segments = 8\nfit_segments = 16": "segments = 4\nfit_segments = 4",
        "per_category = 8": 'items = "none"',
    },
    "04_why_did_it_lose_reasoning": {
        "samples=8, length=128": "samples=2, length=64",
        # more is pruned, so that few items show a drop
        "sparsity=0.5": "sparsity=0.7",
        "ITEMS, SEGMENTS, FITTING, CONFIRM = 40, 8, 16, 8": "ITEMS, SEGMENTS, FITTING, CONFIRM = 20, 2, 4, 1",
    },
}
#: Blocks of the embedded model's 18 that are enough, but to answer questions.
BLOCKS = 3
WHOLE = ("04_why_did_it_lose_reasoning",)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A checkpoint of the embedded model's first blocks, with its tokenizer."""
    model, tokenizer = load_model("demo", device="cpu")
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.config.layer_types = model.config.layer_types[:BLOCKS]
    folder = tmp_path_factory.mktemp("shallow")
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(notebook: nbformat.NotebookNode) -> None:
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(output.output_type == "execute_result" for cell in code for output in cell.outputs)
    for cell in code:
        if ".figure(" in cell.source.splitlines()[-1]:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


def test_there_is_a_shorter_version_of_every_notebook():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHORTER)


@pytest.mark.parametrize("name", SHORTER)
@pytest.mark.filterwarnings("default")
def test_notebook_runs(name, shallow):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    replaced = {} if name in WHOLE else {'"demo"': f'"{shallow}"'}
    for old, new in {**replaced, **SHORTER[name]}.items():
        assert any(old in cell.source for cell in code), old
        for cell in code:
            cell.source = cell.source.replace(old, new)
    run(notebook)


@pytest.mark.full
@pytest.mark.parametrize("name", SHORTER)
@pytest.mark.filterwarnings("default")
def test_notebook_runs_as_it_is(name):
    run(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
