"""Every notebook runs from start to end: always with less text and fewer questions, and as it is with ``-m full``."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
#: What is written in a notebook, and what takes its place to make it short.
SHORTER = {
    "01_diagnose_a_pruned_model": {
        "samples=8, length=128": "samples=4, length=64",
        "SEGMENTS, FITTING = 8, 16": "SEGMENTS, FITTING = 4, 8",
    },
    "02_compare_masks_across_calibration_languages": {"samples=8, length=128": "samples=4, length=64"},
    "03_figures_for_the_paper": {
        "samples = 8\nlength = 128": "samples = 4\nlength = 64",
        "segments = 8\nfit_segments = 16": "segments = 4\nfit_segments = 8",
        "per_category = 8": "per_category = 2",
    },
    "04_why_did_it_lose_reasoning": {
        "samples=8, length=128": "samples=4, length=64",
        # more is pruned, so that few items show a drop
        "sparsity=0.5": "sparsity=0.7",
        "ITEMS, SEGMENTS, FITTING, CONFIRM = 40, 8, 16, 8": "ITEMS, SEGMENTS, FITTING, CONFIRM = 40, 2, 8, 3",
    },
}


def run(notebook: nbformat.NotebookNode) -> None:
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert any(output.output_type == "execute_result" for cell in notebook.cells for output in cell.get("outputs", ()))


def test_there_is_a_shorter_version_of_every_notebook():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHORTER)


@pytest.mark.parametrize("name", SHORTER)
@pytest.mark.filterwarnings("default")
def test_notebook_runs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in SHORTER[name].items():
        assert any(old in cell.source for cell in code), old
        for cell in code:
            cell.source = cell.source.replace(old, new)
    run(notebook)


@pytest.mark.full
@pytest.mark.parametrize("name", SHORTER)
@pytest.mark.filterwarnings("default")
def test_notebook_runs_as_it_is(name):
    run(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
