"""Draws what imports what: ``make imports`` writes docs/figures/imports.svg from the source as it is.

A box is a room with its files, or a file that stands alone; it stands below all that import it. An arrow that
follows from others is left out: if A imports B and B imports C, none is drawn from A to C.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import fmean
from textwrap import wrap

import grimp
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PACKAGES = {"analysis": "#0072B2", "probes": "#009E73", "pruning": "#D55E00"}
#: In inches.
WIDTH, WIDEST, LINE, GAP, HEAD, BETWEEN, PAD = 10.0, 4.2, 0.135, 0.28, 0.2, 0.4, 0.07
CHARACTER = 0.066
Imports = dict[str, set[str]]


def imports_between(graph: grimp.ImportGraph, parents: set[str]) -> Counter[tuple[str, str]]:
    """Count the imports between children of packages, or between the packages if they are given as children."""

    def place(module: str) -> str | None:
        return next((parent for parent in parents if module == parent or module.startswith(parent + ".")), None)

    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            above, below = place(module), place(imported)
            if above and below and above != below:
                found[above, below] += 1
    return found


def reduced(imports: Imports) -> Imports:
    """Leave out what follows from the rest.

    >>> reduced({"cli": {"study", "plots"}, "study": {"plots"}, "plots": set()})
    {'cli': {'study'}, 'study': {'plots'}, 'plots': set()}
    """
    reached: Imports = {}
    for room in TopologicalSorter(imports).static_order():
        reached[room] = imports[room].union(*(reached[below] for below in imports[room]))
    return {
        room: {below for below in direct if not any(below in reached[other] for other in direct)}
        for room, direct in imports.items()
    }


def levels(imports: Imports) -> list[list[str]]:
    """Return the rooms in rows, each below all that import it and as near to them as it can be, few arrows crossing.

    >>> levels({"files": set(), "study": {"records", "plots"}, "plots": {"files"}, "records": set()})
    [['study'], ['plots', 'records'], ['files']]
    """
    importers: Imports = {room: {above for above in imports if room in imports[above]} for room in imports}
    depth: dict[str, int] = {}
    for room in TopologicalSorter(importers).static_order():
        depth[room] = 1 + max((depth[above] for above in importers[room]), default=-1)
    rows = [sorted(room for room in depth if depth[room] == row) for row in range(max(depth.values()) + 1)]
    place = {room: (index + 1) / (len(row) + 1) for row in rows for index, room in enumerate(row)}
    for near in (importers, imports, importers):
        for row in rows if near is importers else rows[::-1]:
            centre = {room: fmean([place[other] for other in near[room]] or [place[room]]) for room in row}
            row.sort(key=centre.__getitem__)
            place |= {room: (index + 1) / (len(row) + 1) for index, room in enumerate(row)}
    return rows


@dataclass(frozen=True)
class Box:
    """A room with the names of its files, in lines."""

    name: str
    lines: list[str]

    @classmethod
    def of(cls, graph: grimp.ImportGraph, room: str, widest: float) -> Box:
        name = room.rpartition(".")[2]
        files = sorted(child.rpartition(".")[2] for child in graph.find_children(room))
        return cls(f"{name}/" if files else name, wrap("  ".join(files), int(widest / CHARACTER)))

    @property
    def width(self) -> float:
        return max(CHARACTER * max(map(len, self.lines), default=0), 0.095 * len(self.name)) + 2 * PAD

    @property
    def height(self) -> float:
        return LINE * (1.1 + len(self.lines)) + 2 * PAD


@dataclass(frozen=True)
class Band:
    """A package: its rooms in rows, and the arrows between them."""

    package: str
    rows: list[dict[str, Box]]
    arrows: Imports

    @classmethod
    def of(cls, graph: grimp.ImportGraph, package: str) -> Band:
        rooms = graph.find_children(package)
        imports: Imports = {room: set() for room in rooms}
        for above, below in imports_between(graph, rooms):
            imports[above].add(below)
        arrows = reduced(imports)
        rows = [
            {room: Box.of(graph, room, min(WIDEST, (WIDTH - 1) / len(row) - 0.2)) for room in row}
            for row in levels(arrows)
        ]
        return cls(package, rows, arrows)

    @property
    def height(self) -> float:
        return HEAD + sum(max(box.height for box in row.values()) + GAP for row in self.rows)

    def draw(self, axes: Axes, top: float) -> None:
        colour = PACKAGES[self.package]
        _box(axes, 0.1, top - self.height, WIDTH - 0.2, self.height, colour, mpl.colors.to_rgba(colour, 0.06), 1)
        axes.text(0.25, top - 0.12, f"{self.package}/", va="top", fontsize=12, weight="bold", color=colour)
        placed: dict[str, tuple[float, float, float]] = {}
        upper = top - HEAD
        for row in self.rows:
            tallest = max(box.height for box in row.values())
            space = (WIDTH - 0.4 - sum(box.width for box in row.values())) / (len(row) + 1)
            left = 0.2 + space
            for room, box in row.items():
                high = upper - (tallest - box.height) / 2
                middle = left + box.width / 2
                _box(axes, left, high - box.height, box.width, box.height, colour, "white", 3)
                axes.text(middle, high - PAD, box.name, va="top", ha="center", fontsize=9, weight="bold", zorder=4)
                for number, line in enumerate(box.lines):
                    place = high - PAD - LINE * (number + 1.2)
                    axes.text(middle, place, line, va="top", ha="center", fontsize=7, zorder=4)
                placed[room] = middle, high, high - box.height
                left += box.width + space
            upper -= tallest + GAP
        for room, below in sorted(self.arrows.items()):
            for other in sorted(below):
                _arrow(axes, (placed[room][0], placed[room][2]), placed[other][:2], colour, 0.9)


def draw(graph: grimp.ImportGraph) -> Figure:
    """Draw the packages one above the other, and the rooms of each."""
    bands = [Band.of(graph, package) for package in PACKAGES]
    total = sum(band.height for band in bands) + BETWEEN * (len(bands) - 1) + 0.1
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, total))
    axes.set_axis_off()
    counts = imports_between(graph, set(PACKAGES))
    top = total - 0.05
    for number, band in enumerate(bands):
        band.draw(axes, top)
        if number:
            above, *others = [bands[n].package for n in range(number - 1, -1, -1)]
            words = f"{counts[above, band.package]} imports"
            words += "".join(f", and {counts[other, band.package]} from {other}" for other in others)
            _arrow(axes, (WIDTH / 2, top + BETWEEN), (WIDTH / 2, top), "0.3", 1.6)
            axes.text(WIDTH / 2 + 0.15, top + BETWEEN / 2, words, va="center", fontsize=8, color="0.3")
        top -= band.height + BETWEEN
    return figure


def _box(
    axes: Axes, left: float, bottom: float, width: float, height: float, edge: str, face: object, order: int
) -> None:
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, shape, facecolor=face, edgecolor=edge, zorder=order))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "zorder": 2}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, **look))


def main() -> None:
    """Draw the packages into the file that is named."""
    path = Path(sys.argv[1])
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    same_bytes = {"svg.fonttype": "none", "svg.hashsalt": "imports", "font.family": ["DejaVu Sans", "sans-serif"]}
    with mpl.rc_context(same_bytes):
        draw(graph).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
