"""The report in a real browser, at the width of a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_run import finished, place  # noqa: F401  (fixtures: a finished study)

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
#: Looks at the page from outside and leaves what it finds in the title.
LOOK = """
const page = document.querySelector("iframe").contentDocument;
const table = [...page.querySelectorAll("table.sortable")].find(t => t.textContent.includes("× dense"));
const column = () => [...table.rows].slice(1).map(row => Number(row.cells[2].dataset.value));
const before = column();
table.rows[0].cells[2].click();
const rising = column();
table.rows[0].cells[2].click();
const falling = column();
document.title = "found" + JSON.stringify({
  before, rising, falling,
  sorted: table.rows[0].cells[2].getAttribute("aria-sort"),
  images: page.images.length,
  whole: [...page.images].filter(image => image.complete && image.naturalWidth > 0).length,
  missing: [...page.querySelectorAll("nav a")].filter(a => !page.querySelector(a.getAttribute("href"))).length,
  wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
});
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome on this machine")
def test_report_works_in_a_browser_at_the_width_of_a_phone(finished, tmp_path):  # noqa: F811
    page = (finished / "report.html").read_text(encoding="utf-8")
    frame = f'<iframe style="width: 375px; height: 800px" srcdoc="{html.escape(page)}"></iframe>'
    outside = tmp_path / "outside.html"
    script = f"<script>addEventListener('load', () => {{ {LOOK} }})</script>"
    outside.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frame}{script}", encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            outside.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said
    found = json.loads(html.unescape(re.search(r"<title>found(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert found["images"] == found["whole"] == len(list((finished / "figures").glob("*.png")))
    assert found["missing"] == 0
    assert found["wide"] <= 0
    assert found["rising"] == sorted(found["before"])
    assert found["falling"] == found["rising"][::-1]
    assert found["sorted"] == "descending"


def test_every_figure_has_a_caption_that_says_what_was_measured(finished: Path):  # noqa: F811
    page = (finished / "report.html").read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>(.*?)<small>", page, re.DOTALL)
    assert len(captions) == page.count("<img")
    assert min(map(len, captions)) > 60
