"""What the documentation shows can be typed: links lead somewhere, study files are valid, commands and names exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import typer.main
import yaml

from analysis.cli import app
from analysis.study.study_file import parse_study
from pruning import Subspaces
from pruning.remedy import Remedy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(language: str) -> list[tuple[str, str]]:
    """Return every fenced block in a language, with the page and number that tell it apart."""
    found = []
    for page in PAGES:
        for n, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        ):
            found.append((f"{page.stem}-{n}", block))
    return found


def cases(language: str) -> list[object]:
    return [pytest.param(block, id=name) for name, block in blocks(language)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that headings of a page have, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            assert path.startswith("https://"), link
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached_from_the_readme():
    linked = {ROOT / link for link in LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert set(PAGES[1:]) <= linked


@pytest.mark.parametrize("block", cases("toml"))
def test_study_files_are_valid(block, tmp_path, monkeypatch):
    if block.startswith("# pyproject.toml"):
        assert set(tomllib.loads(block)) == {"project"}
        return
    if "languages =" not in block:  # a part of one
        block = 'model = "demo"\nlanguages = ["en", "sw"]\n' + block
    if 'diagnosis = "remedy.json"' in block:
        monkeypatch.chdir(tmp_path)
        Remedy(
            model_fingerprint="4f",
            variant="wanda-0.5-row-pruned-en-s0",
            language="sw",
            category="text",
            fitted_on="half of the text",
            importance={"0.q": 0.1},
        ).save(tmp_path / "remedy.json")
    if 'subspaces = "subspaces.safetensors"' in block.replace("# subspaces", ""):
        monkeypatch.chdir(tmp_path)
        basis = torch.eye(8, 1)
        Subspaces.save(
            tmp_path / "subspaces.safetensors", [basis, basis], model_fingerprint="4f", languages=("en", "sw")
        )
    parse_study(tomllib.loads(block), "the page")


@pytest.mark.parametrize("block", cases("sh"))
def test_commands_and_their_options_exist(block):
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "prunescope":
            continue
        known = {option for parameter in commands[words[1]].params for option in parameter.opts}
        assert {word for word in words[2:] if word.startswith("--")} <= known, line


@pytest.mark.parametrize("block", cases("python"))
def test_names_that_are_imported_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name), name.name


def test_every_page_is_in_the_menu_of_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in site["nav"] for below in entry.values() for page in pages_of(below)]
    made = {"index.md", *(f"reference/{package}.md" for package in ("pruning", "probes", "analysis"))}
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.name for page in (ROOT / "docs").glob("*.md")} | made


def pages_of(entry):
    return [entry] if isinstance(entry, str) else [page for one in entry for page in one.values()]
