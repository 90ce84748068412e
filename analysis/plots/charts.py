"""The kinds of chart that all plots share: heatmaps, small multiples of lines, small multiples of effects.

What is drawn is data (:class:`Panel`, :class:`Line`, :class:`Effect`, or a table); each function returns a matplotlib
``Figure`` that belongs to no window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..frames.labels import in_order, layer_label, set_label, sets_of
from .style import GREY, PAGE_WIDTH, STYLE, panel_title, points, set_style, wrapped

#: Characters of a legend that fit into an inch.
_CHARACTERS = 17
#: Characters of a line of a row's name.
_ROW_LABEL = 30
#: Colour of cells without a value.
_EMPTY = "0.9"


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
    """Draw tables side by side on one colour scale; cells show their value or label, and are grey where they have none.

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
        colours = "RdBu"
        high = max((abs(end) for side in ends for end in side if not pd.isna(end)), default=0.0) or 1.0
        low = -high
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, points(max(0.95 + height * rows, 1.9))), layout="constrained")
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
                annot_kws={"size": points(6 if width >= PAGE_WIDTH and len(tables) == 1 else 5)},
                linewidths=0.5,
                linecolor="white",
                cbar=last,
                cbar_kws={"label": colour_label, "fraction": 0.04, "pad": 0.02} if last else None,
            )
            axes.set(
                xlabel=x_label,
                ylabel=y_label if axes is grid[0] else "",
                title=panel_title(name, width / len(tables)),
                facecolor=_EMPTY,
            )
            axes.tick_params(length=0)
            axes.tick_params(axis="y", rotation=0)
        figure.suptitle(wrapped(title, width))
    return figure


@dataclass(frozen=True)
class Line:
    """One line of a panel, with a band around it where `low` and `high` are given; or separate points, with bars."""

    label: str
    x: Sequence[float | int]
    y: Sequence[float | int]
    colour: str
    style: str = "-"
    low: Sequence[float | int] | None = None
    high: Sequence[float | int] | None = None
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """One of several small plots: its lines, and levels (name to value) drawn across.

    `log_x` is the base of a logarithmic axis, 0 of a linear one.
    """

    title: str
    lines: Sequence[Line]
    levels: Mapping[str, float | int] = field(default_factory=dict)
    x_label: str | None = None
    log_x: int = 0
    whole_x: bool = True
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def range_line(rows: pd.DataFrame, x: str, label: str, colour: str, style: str = "-") -> Line:
    """Return a line of the mean of ``value`` at every `x`, in a band from the lowest to the highest."""
    spread = rows.groupby(x, observed=True)["value"].agg(["mean", "min", "max"])
    low, high = spread["min"].tolist(), spread["max"].tolist()
    return Line(label, spread.index.tolist(), spread["mean"].tolist(), colour, style, low, high)


def broken(line: Line, encoder: int) -> Line:
    """Return a line by block with a gap between the encoder's blocks and the decoder's."""
    first = [i for i, x in enumerate(line.x) if x >= encoder]
    if not first or first[0] == 0:
        return line

    def parted(values: Sequence[float | int], between: float) -> list[float | int]:
        return [*values[: first[0]], between, *values[first[0] :]]

    low, high = (None if band is None else parted(band, math.nan) for band in (line.low, line.high))
    return replace(line, x=parted(line.x, encoder - 0.5), y=parted(line.y, math.nan), low=low, high=high)


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
    encoder: int = 0,
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
    encoder
        If the x axis is the blocks of an encoder-decoder: how many are the encoder's. A vertical line separates the
        stacks, and lines break there. Panels with an x axis of their own are drawn as usual.
    width
        Inches: :data:`PAGE_WIDTH` or :data:`COLUMN_WIDTH`.
    """
    columns = min(max(round(width / points(1.6)), 1), len(panels))
    rows = math.ceil(len(panels) / columns)
    x_label = layer_label(x_label, encoder)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, points(0.7 + 1.35 * rows)), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            if encoder and panel.x_label is None:
                panel = replace(panel, lines=[broken(line, encoder) for line in panel.lines])
                axes.axvline(encoder - 0.5, color=GREY, linewidth=0.6)
            for line in panel.lines:
                if not len(line.x):
                    continue
                if line.points and line.low is not None and line.high is not None:
                    y = np.asarray(line.y, dtype=float)
                    bars = np.clip([y - np.asarray(line.low), np.asarray(line.high) - y], 0, None)
                    handle = axes.errorbar(line.x, y, bars, fmt="o", color=line.colour, markersize=2.5, linewidth=0.8)
                    handles.setdefault(line.label, handle)
                    continue
                marker = "o" if len(line.x) == 1 else None
                (handle,) = axes.plot(line.x, line.y, line.style, color=line.colour, marker=marker, markersize=2)
                handles.setdefault(line.label, handle)
                if line.low is not None and line.high is not None:
                    axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.15, linewidth=0)
            for name, level in panel.levels.items():
                handles.setdefault(name, axes.axhline(level, color=GREY, linestyle="--", linewidth=0.8))
            axes.set_title(panel_title(panel.title, width / columns))
            axes.grid(axis="y")
            if panel.log_x:
                axes.set_xscale("log", base=panel.log_x)
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_locator(NullLocator())
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
        figure.suptitle(wrapped(title, width))
        figure.supylabel(y_label, fontsize=points(7))
        if handles:
            fitting = int(_CHARACTERS * width / points(1) / (max(map(len, handles)) + 6))
            ncols = min(len(handles), max(fitting, 1))
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)
    return figure


@dataclass(frozen=True)
class Effect:
    """One difference with its interval, which is left out where it is nan."""

    label: str
    value: float
    low: float
    high: float
    colour: str
    significant: bool


def effect_panels(
    panels: Mapping[str, Sequence[Effect]],
    *,
    title: str,
    x_label: str,
    legend: tuple[str, str] = ("significant (p < 0.05, corrected)", "not significant, or not tested"),
    x_range: tuple[float, float] | None = None,
    width: float = PAGE_WIDTH,
) -> Figure:
    """Draw differences from zero with intervals in small multiples.

    Parameters
    ----------
    panels
        Title of each panel to its differences.
    title, x_label
        What to write.
    legend
        What a filled and what an open marker means.
    x_range
        Of the axis; that of the intervals by default.
    width
        Inches.
    """
    rows = math.ceil(len(panels) / max(round(width / points(1.6)), 1))
    columns = math.ceil(len(panels) / rows)  # as few as fill these rows
    longest = max(len(effects) for effects in panels.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, points(0.8 + rows * (0.35 + 0.14 * longest))), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, (name, effects) in zip(grid.flat, panels.items(), strict=False):
            for y, effect in enumerate(reversed(effects)):
                axes.plot([effect.low, effect.high], [y, y], color=effect.colour)
                face = effect.colour if effect.significant else "white"
                axes.plot([effect.value], [y], "o", color=effect.colour, markerfacecolor=face, markersize=3.5)
            axes.axvline(0, color=GREY, linewidth=0.6)
            if x_range:
                axes.set_xlim(*x_range)
            axes.set_yticks(range(len(effects)), [effect.label for effect in reversed(effects)])
            axes.set_ylim(-0.5, max(len(effects), 1) - 0.5)
            axes.set_title(panel_title(name, width / columns))
            axes.tick_params(axis="y", length=0)
            axes.tick_params(labelbottom=True)
        _finish_effects(figure, grid, len(panels), wrapped(title, width), x_label, legend, columns=3, width=width)
    return figure


def grouped_effects(
    panels: Mapping[str, Mapping[str, Sequence[Effect]]],
    *,
    title: str,
    x_label: str,
    legend: tuple[str, str] = ("significant (p < 0.05, corrected)", "not significant, or not tested"),
    width: float = PAGE_WIDTH,
) -> Figure:
    """Draw differences from zero with intervals in rows that hold several, beside each other, in small multiples.

    Parameters
    ----------
    panels
        Title of each panel to its rows, and of each row to its differences; the rows of all panels are the same. The
        differences of a row are told apart by colour, with their labels in the legend.
    title, x_label, legend, width
        As for :func:`effect_panels`.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    most = max(len(effects) for rows in panels.values() for effects in rows.values())
    labels = {name: fill(name, _ROW_LABEL) for name in names}
    high = sum(max(0.14 * (label.count("\n") + 1), 0.09 * most + 0.05) for label in labels.values())
    grid_rows = math.ceil(len(panels) / max(round((width - points(1.6)) / points(1.1)), 1))
    columns = math.ceil(len(panels) / grid_rows)
    colours: dict[str, str] = {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, points(0.9 + grid_rows * (0.4 + high))), layout="constrained")
        grid = figure.subplots(grid_rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (panel, rows) in zip(grid.flat, panels.items(), strict=False):
            for y, name in enumerate(names):
                effects = rows.get(name, ())
                for k, effect in enumerate(effects):
                    at = y + 0.7 * ((k + 0.5) / len(effects) - 0.5)
                    axes.plot([effect.low, effect.high], [at, at], color=effect.colour, linewidth=1)
                    face = effect.colour if effect.significant else "white"
                    axes.plot([effect.value], [at], "o", color=effect.colour, markerfacecolor=face, markersize=3)
                    colours.setdefault(effect.label, effect.colour)
            axes.axvline(0, color=GREY, linewidth=0.6)
            axes.set_yticks(range(len(names)), [labels[name] for name in names])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(panel_title(panel, width / columns))
            axes.tick_params(axis="y", length=0)
            axes.tick_params(labelbottom=True)
        named = colours if len(colours) > 1 else {}
        _finish_effects(
            figure, grid, len(panels), wrapped(title, width), x_label, legend, named, columns=4, width=width
        )
    return figure


def _finish_effects(
    figure: Figure,
    grid: np.ndarray,
    panels: int,
    title: str,
    x_label: str,
    legend: tuple[str, str],
    colours: Mapping[str, str] | None = None,
    *,
    columns: int,
    width: float,
) -> None:
    """Hide what is left of a grid of panels of differences, and write title, label and legend.

    `legend` says what a filled and what an open marker means, `colours` what each colour is of; the legend has as many
    columns at the width of a page.
    """
    for axes in grid.flat[panels:]:
        axes.set_visible(False)
    in_last_row = panels - grid.shape[1] * (grid.shape[0] - 1)
    grid[-1][(in_last_row - 1) // 2].set_xlabel(x_label)
    figure.suptitle(title)
    line = mpl.lines.Line2D
    keys: list[tuple[Any, str]] = [(line([], [], color=colour), label) for label, colour in (colours or {}).items()]
    for face, meaning in zip((GREY, "white"), legend, strict=True):
        keys.append((line([], [], color=GREY, marker="o", markersize=3.5, markerfacecolor=face), meaning))
    figure.legend(*zip(*keys, strict=True), loc="outside lower center", ncols=columns if width >= PAGE_WIDTH else 1)
