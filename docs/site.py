"""What the site of the documentation has beside the pages in this folder: the README, the notebooks, and the reference.

MkDocs calls these functions (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGES = ("pruning", "probes", "analysis")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the first page, a page of reference for each package, and the notebooks as they are."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_within_site(readme)))
    for package in PACKAGES:
        page = f"# {package}\n\n::: {package}\n"
        files.append(File.generated(config, f"reference/{package}.md", content=page))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    for name in ("LICENSE", "CITATION.cff"):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links that lead out of the folder of pages into links within the site."""
    return markdown.replace("](../notebooks/", "](notebooks/").replace("](../README.md", "](index.md")


def _within_site(readme: str) -> str:
    return re.sub(r"(\]\(|src=\")docs/", r"\1", readme)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of docstrings, such as ``:func:``, which only Sphinx knows; names are set as code anyway."""
    return re.sub(r":(?:func|class|meth|mod|data|attr|exc):(<code>)~?", r"\1", html)
