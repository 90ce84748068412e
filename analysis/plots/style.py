"""One look for all figures: sizes, palette, type, and how a figure is saved."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from pruning.files import whole_file
from pruning.recipes import UNCALIBRATED

#: Inches; a column and a page of a two-column paper.
COLUMN_WIDTH, PAGE_WIDTH = 3.1, 6.5
#: Size of labels, in points.
_POINTS = 7
#: Characters of a title that fit into an inch.
_TITLE_CHARACTERS = 14
#: Characters of a panel's title that fit into an inch of the panel and its labels.
_PANEL_CHARACTERS = 18

#: Matplotlib's settings for every figure.
STYLE: dict[str, Any] = {
    "font.size": _POINTS,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "figure.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.4,
    "grid.color": "#e0e0e0",
    "lines.linewidth": 1.0,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "prunescope",
    "figure.dpi": 200,
}
#: Colours for what is no language: two parts of one thing, a third, a reference, the dense model.
TWO_COLOURS = ("#0072B2", "#D55E00")
GREEN, GREY, BLACK = "#009E73", "#888888", "#000000"
# After Okabe and Ito, and Tol: told apart with the common forms of colour blindness, by lightness too.
_OF_LANGUAGES = {
    "ar": "#0072B2",
    "de": "#E69F00",
    "en": "#009E73",
    "es": "#CC79A7",
    "fr": "#D55E00",
    "ru": "#56B4E9",
    "sw": "#B8A900",
    "zh": "#332288",
    "all": "#444444",
}
_OF_OTHERS = ("#117733", "#882255", "#44AA99", "#999933", "#CC6677", "#88CCEE", "#AA4499", "#DDCC77")


def colour(name: str) -> str:
    """Return the colour of a language, or of a calibration set: the same one in every figure of every study."""
    return _OF_LANGUAGES.get(name) or _OF_OTHERS[zlib.crc32(name.encode()) % len(_OF_OTHERS)]


def nth(number: int) -> str:
    """Return the colour of one of several lines that are neither languages nor calibration sets."""
    return _OF_OTHERS[number % len(_OF_OTHERS)]


def set_style(calibration: str, seed: int) -> tuple[str, str]:
    """Return colour and style of a calibration set's line; further seeds are dotted."""
    return GREY if calibration == UNCALIBRATED else colour(calibration), ":" if seed else "-"


def wrapped(title: str, width: float | int) -> str:
    """Return a title in lines that fit a figure so many inches wide."""
    return textwrap.fill(title, max(round(_TITLE_CHARACTERS * width / points(1)), 12))


def panel_title(title: str, width: float | int) -> str:
    """Return the title of one panel, so many inches wide with its labels, in lines that fit."""
    return textwrap.fill(title, max(round(_PANEL_CHARACTERS * width / points(1)), 10))


#: Formats of figures, and what of their metadata is left out so that the same data gives the same bytes.
FORMATS = {"pdf": {"CreationDate": None}, "png": {"Software": None}, "svg": {"Date": None}}


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """Write ``NAME.pdf`` and ``NAME.png``, or other :data:`FORMATS`, each whole or not at all."""
    paths = []
    with mpl.rc_context(STYLE):
        for kind in formats:
            path = folder / f"{name}.{kind}"
            with whole_file(path) as partial:
                figure.savefig(partial, format=kind, metadata=FORMATS[kind], dpi=200)
            paths.append(path)
    return paths


@contextmanager
def font_size(points: float | int | None) -> Iterator[None]:
    """Context manager within which figures are drawn with labels of this size, and all other text in proportion.

    Parameters
    ----------
    points
        Of axis labels and titles of panels; those of :data:`STYLE` by default.
    """
    before = dict(STYLE)
    scale = 1.0 if points is None else points / before["font.size"]
    try:
        STYLE.update({name: scale * value for name, value in before.items() if name.endswith("size")})
        yield
    finally:
        STYLE.update(before)


def points(size: float | int) -> float:
    """Return a size, of text or of a figure's height, in the proportion that it has to labels of 7 points."""
    return float(size * STYLE["font.size"] / _POINTS)
