"""The report as a reader sees it."""

from __future__ import annotations

import re
from pathlib import Path


def written(page: Path) -> str:
    """Return a page without its scripts and the data of its pictures."""
    text = re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r'"data:image/[^"]*"', '"data:image"', text)
