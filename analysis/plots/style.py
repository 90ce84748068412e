"""One look for all figures: sizes, palette, order of languages, and the few kinds of plot that the analyzers share.

A figure is a function of a frame; everything here takes data that is already reduced and returns a matplotlib
``Figure`` that belongs to no window.
"""

from __future__ import annotations

import math
import re
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, leaves_list

from probes import DENSE
from pruning.allocation import UNIFORM
from pruning.files import whole_file
from pruning.recipes import EVERYWHERE, UNCALIBRATED
from pruning.text.languages import language_name
from pruning.variants.variant import UNKNOWN

#: Inches; a column and a page of a two-column paper.
COLUMN_WIDTH, PAGE_WIDTH = 3.1, 6.5

#: Characters of a title, and of a legend, that fit into an inch.
_TITLE_CHARACTERS, _CHARACTERS = 14, 17

_STYLE: dict[str, Any] = {
    "font.size": 7,
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


def language_title(tag: str) -> str:
    """Return what figures write above the panel of a language."""
    return f"{language_name(tag)} ({tag})"


def in_order(languages: Iterable[str]) -> list[str]:
    """Return languages in the order that all figures use: alphabetical by tag."""
    return sorted(map(str, languages))


def calibration_rank(name: str) -> tuple[int, str]:
    """Sort key of calibration sets: uncalibrated, single languages, mixes, all."""
    if name == UNCALIBRATED:
        return 0, name
    if name == "all":
        return 3, name
    return (2, name) if "+" in name else (1, name)


def sets_of(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the calibration sets of some rows with their seeds, in the order that all figures use."""
    pairs = {(str(c), int(s)) for c, s in zip(rows["calibration"], rows["seed"], strict=True)}
    return sorted(pairs, key=lambda pair: (calibration_rank(pair[0]), pair[1]))


def set_label(calibration: str, seed: int) -> str:
    """Return how figures call a calibration set; the first seed goes without saying."""
    if calibration == UNCALIBRATED:
        return "no text"
    return str(calibration) if seed == 0 else f"{calibration} (seed {seed})"


def set_style(calibration: str, seed: int) -> tuple[str, str]:
    """Return colour and style of a calibration set's line; further seeds are dotted."""
    return GREY if calibration == UNCALIBRATED else colour(calibration), ":" if seed else "-"


def variant_rank(row: pd.Series) -> tuple[Any, ...]:
    """Sort key of models: the dense one, then by recipe, calibration set and seed."""
    recipe = [
        str(row["method"]),
        float(row["sparsity"]),
        *(str(row[name]) for name in ("pattern", "allocation", "scope", "propagation")),
    ]
    return row["method"] != DENSE, *recipe, calibration_rank(str(row["calibration"])), int(row["seed"])


#: How papers write the names of methods.
_METHOD_NAMES = {
    "grasp": "GraSP",
    "m-wanda": "M-Wanda",
    "ria": "RIA",
    "snip": "SNIP",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
}


def method_name(label: object) -> str:
    """Return how figures call a method; `label` is that of a frame, with parameters that are not the default.

    >>> method_name("ria power=1"), method_name("mine")
    ('RIA power=1', 'mine')
    """
    first, blank, rest = str(label).partition(" ")
    return _METHOD_NAMES.get(first, first) + blank + rest


def variant_labels(frame: pd.DataFrame) -> list[str]:
    """Return how figures call the model of every row: as short as tells them apart."""
    calibrated = frame[frame["method"] != DENSE]
    several = {
        column: (calibrated.groupby("method", observed=True)[column].nunique() > 1).any()
        for column in ("pattern", "allocation", "scope", "propagation")
    }
    labels = []
    for row in frame.to_dict("records"):
        if row["method"] == DENSE:
            labels.append(DENSE)
            continue
        words = [f"{method_name(row['method'])} {row['sparsity']:g}"]
        words += [_pattern_words(row["pattern"])] if several["pattern"] else []
        words += [f"{row['allocation']} allocation"] if several["allocation"] else []
        words += [f"in {row['scope']}"] if several["scope"] and row["scope"] != EVERYWHERE else []
        words += [f"{row['propagation']} propagation"] if several["propagation"] else []
        if row["calibration"] != UNCALIBRATED:
            words += ["·", set_label(row["calibration"], row["seed"])]
        labels.append(" ".join(words))
    return labels


def recipe_label(recipe: Mapping[str, Any]) -> str:
    """Return a recipe in a few words."""
    words = [method_name(recipe["method"]), f"sparsity {recipe['sparsity']:g}", _pattern_words(recipe["pattern"])]
    words += [f"{recipe['allocation']} allocation"] if recipe["allocation"] not in (UNIFORM, UNKNOWN) else []
    words += [f"in {recipe['scope']}"] if recipe["scope"] != EVERYWHERE else []
    words += ["dense propagation"] if recipe["propagation"] == "dense" else []
    return ", ".join(words)


def recipe_slug(recipe: Mapping[str, Any]) -> str:
    """Return a recipe's part of a figure's file name."""
    words = [str(recipe["method"]), f"{recipe['sparsity']:g}", str(recipe["pattern"]).replace(":", "of")]
    words += [str(recipe["allocation"])] if recipe["allocation"] not in (UNIFORM, UNKNOWN) else []
    words += [str(recipe["scope"])] if recipe["scope"] != EVERYWHERE else []
    return slug("-".join([*words, str(recipe["propagation"])]))


def slug(text: str) -> str:
    """Return text as part of a file's name."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def _pattern_words(pattern: object) -> str:
    if str(pattern) == UNKNOWN:
        return "pruned elsewhere"
    return str(pattern) if ":" in str(pattern) else f"per {pattern}"


def three_digits(value: float) -> str:
    """Return a number as short as it can be read.

    >>> three_digits(23.456), three_digits(1234.5), three_digits(98765.0)
    ('23.5', '1234', '99k')
    """
    if value < 100:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k"


def short(value: float) -> str:
    """Return a factor with as many digits as can be read at a glance.

    >>> short(1.234), short(123.4), short(1.2e29)
    ('1.23', '123', '1.2e+29')
    """
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.2g}"


def by_calibration(rows: pd.DataFrame, reduce: str = "mean") -> pd.DataFrame:
    """Return a table of ``value``, a row a calibration set and a column an evaluation language."""
    labels = [set_label(*pair) for pair in sets_of(rows)]
    rows = rows.assign(set=[set_label(c, s) for c, s in zip(rows["calibration"], rows["seed"], strict=True)])
    table = rows.pivot_table(index="set", columns="language", values="value", aggfunc=reduce, observed=True)
    return table.loc[labels, in_order(table.columns)]


def heatmaps(
    tables: Mapping[str, pd.DataFrame],
    *,
    title: str,
    colour_label: str,
    labels: Mapping[str, pd.DataFrame] | None = None,
    digits: str = "{:.2f}",
    low: float | int | None = None,
    high: float | int | None = None,
    height: float = 0.24,
    x_label: str = "evaluated in",
    y_label: str = "calibrated on",
    dark_is_high: bool = True,
    diverging: bool = False,
    width: float = PAGE_WIDTH,
) -> Figure:
    """Draw tables side by side on one colour scale, each cell written over with its value or its label.

    Parameters
    ----------
    tables
        Title of each panel to its values.
    title, colour_label, x_label, y_label
        What to write.
    labels
        Likewise, what to write into the cells; the values, formatted by `digits`, by default.
    digits
        Format of the values.
    low, high
        Ends of the colour scale; those of the values by default.
    height
        Inches of a row.
    dark_is_high
        Which end of the scale is dark.
    diverging
        Whether values lie on both sides of zero, which is then white.
    width
        Inches.
    """
    rows = max(len(table) for table in tables.values())
    ends = [table.min().min() for table in tables.values()], [table.max().max() for table in tables.values()]
    colours = "cividis_r" if dark_is_high else "cividis"
    if diverging:
        colours, high = "RdBu", max(abs(end) for side in ends for end in side) or 1.0
        low = -high
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, max(0.95 + height * rows, 1.9)), layout="constrained")
        grid = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        for axes, (name, table) in zip(grid, tables.items(), strict=True):
            last = axes is grid[-1]
            written = labels[name] if labels else table.map(lambda v: "" if pd.isna(v) else digits.format(v))
            sns.heatmap(
                table,
                ax=axes,
                annot=written.to_numpy(),
                fmt="",
                cmap=colours,
                vmin=min(ends[0]) if low is None else low,
                vmax=max(ends[1]) if high is None else high,
                annot_kws={"size": 6 if width >= PAGE_WIDTH and len(tables) == 1 else 5},
                linewidths=0.5,
                linecolor="white",
                cbar=last,
                cbar_kws={"label": colour_label, "fraction": 0.04, "pad": 0.02} if last else None,
            )
            axes.set(xlabel=x_label, ylabel=y_label if axes is grid[0] else "", title=name)
            axes.tick_params(length=0)
            axes.tick_params(axis="y", rotation=0)
        figure.suptitle(textwrap.fill(title, round(_TITLE_CHARACTERS * width)))
    return figure


@dataclass(frozen=True)
class Line:
    """One line of a panel, with a band around it where `low` and `high` are given."""

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    colour: str
    style: str = "-"
    low: Sequence[float | int] | None = None
    high: Sequence[float | int] | None = None


@dataclass(frozen=True)
class Panel:
    """One of several small plots: its lines, and levels (name to value) drawn across."""

    title: str
    lines: Sequence[Line]
    levels: Mapping[str, float | int] = field(default_factory=dict)
    x_label: str | None = None
    log_x: bool = False
    whole_x: bool = True
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def range_line(rows: pd.DataFrame, x: str, label: str, colour: str, style: str = "-") -> Line:
    """Return a line of the mean of ``value`` at every `x`, in a band from the lowest to the highest."""
    spread = rows.groupby(x, observed=True)["value"].agg(["mean", "min", "max"])
    low, high = spread["min"].tolist(), spread["max"].tolist()
    return Line(label, spread.index.tolist(), spread["mean"].tolist(), colour, style, low, high)


def set_lines(rows: pd.DataFrame) -> list[Line]:
    """Return a line by layer for each calibration set, with its interval where there is one."""
    lines = []
    for calibration, seed in sets_of(rows):
        own = rows[(rows["calibration"] == calibration) & (rows["seed"] == seed)].sort_values("layer")
        interval = {}
        if {"low", "high"} <= set(own.columns) and not own["low"].isna().all():
            interval = {"low": own["low"].tolist(), "high": own["high"].tolist()}
        label, style = set_label(calibration, seed), set_style(calibration, seed)
        lines.append(Line(label, own["layer"].tolist(), own["value"].tolist(), *style, **interval))
    return lines


def line_panels(
    panels: Sequence[Panel],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    share: bool = True,
    width: float = PAGE_WIDTH,
) -> Figure:
    """Draw small multiples of lines with one legend for all.

    Parameters
    ----------
    panels
        What to draw.
    title, x_label, y_label
        What to write; a panel's own label of the x axis goes before this one.
    log_y
        Whether values are on a logarithmic scale.
    share
        Whether all panels have the same axes.
    width
        Inches: :data:`PAGE_WIDTH` or :data:`COLUMN_WIDTH`.
    """
    columns = min(max(round(width / 1.6), 1), len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, 0.7 + 1.35 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            for line in panel.lines:
                if not len(line.x):
                    continue
                marker = "o" if len(line.x) == 1 else None
                (handle,) = axes.plot(line.x, line.y, line.style, color=line.colour, marker=marker, markersize=2)
                handles.setdefault(line.label, handle)
                if line.low is not None and line.high is not None:
                    axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.15, linewidth=0)
            for name, level in panel.levels.items():
                handles.setdefault(name, axes.axhline(level, color=GREY, linestyle="--", linewidth=0.8))
            axes.set_title(panel.title)
            axes.grid(axis="y")
            if panel.log_x:
                axes.set_xscale("log")
            elif panel.whole_x:
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if panel.x_range:
                axes.set_xlim(*panel.x_range)
            if panel.y_range:
                axes.set_ylim(*panel.y_range)
            if log_y:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            if panel.x_label or not share:
                axes.set_xlabel(panel.x_label or x_label)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        if share:
            for i in range(columns):
                lowest = max(row for row in range(rows) if row * columns + i < len(panels))
                grid[lowest][i].set_xlabel(x_label)
                grid[lowest][i].tick_params(labelbottom=True)
        figure.suptitle(textwrap.fill(title, round(_TITLE_CHARACTERS * width)))
        figure.supylabel(y_label, fontsize=7)
        if handles:
            fitting = int(_CHARACTERS * width / (max(map(len, handles)) + 6))
            ncols = min(len(handles), max(fitting, 1))
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)
    return figure


@dataclass(frozen=True)
class Effect:
    """One difference with its interval; `margin` is what differences of no meaning reach."""

    label: str
    value: float
    low: float
    high: float
    colour: str
    found: bool
    margin: float = 0.0


def effect_panels(
    panels: Mapping[str, Sequence[Effect]],
    *,
    title: str,
    x_label: str,
    found: str = "beyond the margin, p < 0.05 (corrected)",
    x_range: tuple[float, float] | None = None,
    width: float = PAGE_WIDTH,
) -> Figure:
    """Draw effects from zero with intervals in small multiples, filled where they are found; `found` says when."""
    columns = min(max(round(width / 1.6), 1), len(panels))
    rows = math.ceil(len(panels) / columns)
    longest = max(len(effects) for effects in panels.values())
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, 0.8 + rows * (0.35 + 0.14 * longest)), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, (name, effects) in zip(grid.flat, panels.items(), strict=False):
            for y, effect in enumerate(reversed(effects)):
                axes.barh(y, 2 * effect.margin, left=-effect.margin, height=0.9, color="#e8e8e8", linewidth=0)
                axes.plot([effect.low, effect.high], [y, y], color=effect.colour)
                face = effect.colour if effect.found else "white"
                axes.plot([effect.value], [y], "o", color=effect.colour, markerfacecolor=face, markersize=3.5)
            axes.axvline(0, color=GREY, linewidth=0.6)
            if x_range:
                axes.set_xlim(*x_range)
            axes.set_yticks(range(len(effects)), [effect.label for effect in reversed(effects)])
            axes.set_title(name)
            axes.tick_params(axis="y", length=0)
            axes.tick_params(labelbottom=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for i in range(columns):
            lowest = max(row for row in range(rows) if row * columns + i < len(panels))
            grid[lowest][i].set_xlabel(x_label if columns <= 2 or i == (columns - 1) // 2 else "")
        figure.suptitle(textwrap.fill(title, round(_TITLE_CHARACTERS * width)))
        line, patch = mpl.lines.Line2D, mpl.patches.Patch
        keys: list[tuple[Any, str]] = [
            (line([], [], color=GREY, marker="o", markersize=3.5), found),
            (line([], [], color=GREY, marker="o", markersize=3.5, markerfacecolor="white"), "not so"),
        ]
        if any(effect.margin for effects in panels.values() for effect in effects):
            keys.append((patch(color="#e8e8e8"), "margin: what another draw of the same text changes"))
        figure.legend(*zip(*keys, strict=True), loc="outside lower center", ncols=3 if width >= PAGE_WIDTH else 1)
    return figure


def clusters(matrix: pd.DataFrame, tree: NDArray[np.float64], *, title: str, width: float = PAGE_WIDTH) -> Figure:
    """Draw how alike things are, pair by pair, and the tree that clusters them, in the tree's order.

    Parameters
    ----------
    matrix
        Symmetric, likeness of two things; the diagonal is left empty.
    tree
        As :func:`scipy.cluster.hierarchy.linkage` returns it.
    title, width
        What to write above; inches.
    """
    order = leaves_list(tree)
    matrix = matrix.iloc[order, order]
    text = matrix.map(lambda v: "" if pd.isna(v) else f"{v:.3f}")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, 0.9 + 0.26 * len(matrix)), layout="constrained")
        heat, branches = figure.subplots(1, 2, width_ratios=[2.6, 1])
        sns.heatmap(
            matrix,
            ax=heat,
            annot=text.to_numpy(),
            fmt="",
            cmap="cividis",
            annot_kws={"size": 6 if width >= PAGE_WIDTH and len(matrix) <= 10 else 4.5},
            linewidths=0.5,
            linecolor="white",
            cbar_kws={"label": "mean IoU", "fraction": 0.04, "pad": 0.02},
        )
        heat.set(xlabel="", ylabel="", title="every pair, mean over layers and roles")
        heat.tick_params(length=0)
        heat.tick_params(axis="x", rotation=30)
        heat.tick_params(axis="y", rotation=0)
        dendrogram(
            tree,
            ax=branches,
            orientation="right",
            labels=list(matrix.index[np.argsort(order)]),
            link_color_func=lambda node: "#444444",
            leaf_font_size=6,
        )
        branches.invert_yaxis()  # in the order of the table's rows
        branches.set(xlabel="mask distance\n(1 − IoU)", title="average linkage")
        branches.tick_params(axis="y", length=0)
        branches.spines["left"].set_visible(False)
        figure.suptitle(textwrap.fill(title, round(_TITLE_CHARACTERS * width)))
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.pdf`` and ``NAME.png``, each whole or not at all, without a date inside: same data, same bytes."""
    paths = []
    with mpl.rc_context(_STYLE):
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            path = folder / f"{name}.{kind}"
            with whole_file(path) as partial:
                figure.savefig(partial, format=kind, metadata=metadata, dpi=200)
            paths.append(path)
    return paths
