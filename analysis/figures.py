"""One look for all figures: sizes, palette, order of languages, and the few kinds of plot that the analyzers share.

A figure is a function of a frame; everything here takes data that is already reduced and returns a matplotlib
``Figure`` that belongs to no window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes import DENSE
from pruning import ROLES
from pruning.allocation import UNIFORM
from pruning.files import whole_file
from pruning.languages import language_name
from pruning.recipes import EVERYWHERE, UNCALIBRATED
from pruning.variants import UNKNOWN

#: Inches; a column and a page of a two-column paper.
COLUMN_WIDTH, PAGE_WIDTH = 3.1, 6.5

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
# Okabe and Ito's palette, safe for the common forms of colour blindness, and three more told apart by dashes.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A900", "#000000")
_MIX_COLOUR = {"all": "#444444"}


def in_order(languages: Iterable[str]) -> list[str]:
    """Return languages in the order that all figures use: alphabetical by tag."""
    return sorted(map(str, languages))


def calibration_rank(name: str) -> tuple[int, str]:
    """Sort key of calibration sets: uncalibrated, single languages, mixes, all."""
    bare = name.split(" ")[0]
    if bare in (UNCALIBRATED, "no"):
        return 0, name
    if bare == "all":
        return 3, name
    return (2, name) if "+" in bare else (1, name)


def set_label(calibration: str, seed: int) -> str:
    """Return how figures call a calibration set; the first seed goes without saying."""
    if calibration == UNCALIBRATED:
        return "no text"
    return str(calibration) if seed == 0 else f"{calibration} (seed {seed})"


def variant_rank(row: pd.Series) -> tuple[Any, ...]:
    """Sort key of models: the dense one, then by recipe, calibration set and seed."""
    recipe = [
        str(row["method"]),
        float(row["sparsity"]),
        *(str(row[name]) for name in ("pattern", "allocation", "scope", "propagation")),
    ]
    return row["method"] != DENSE, *recipe, calibration_rank(str(row["calibration"])), int(row["seed"])


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
        words = [f"{row['method']} {row['sparsity']:g}"]
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
    words = [str(recipe["method"]), f"sparsity {recipe['sparsity']:g}", _pattern_words(recipe["pattern"])]
    words += [f"{recipe['allocation']} allocation"] if recipe["allocation"] not in (UNIFORM, UNKNOWN) else []
    words += [f"in {recipe['scope']}"] if recipe["scope"] != EVERYWHERE else []
    words += ["dense propagation"] if recipe["propagation"] == "dense" else []
    return ", ".join(words)


def recipe_slug(recipe: Mapping[str, Any]) -> str:
    """Return a recipe's part of a figure's file name."""
    words = [str(recipe["method"]), f"{recipe['sparsity']:g}", str(recipe["pattern"]).replace(":", "of")]
    words += [str(recipe["allocation"])] if recipe["allocation"] not in (UNIFORM, UNKNOWN) else []
    words += [str(recipe["scope"])] if recipe["scope"] != EVERYWHERE else []
    return re.sub(r"[^\w.=+-]+", "_", "-".join([*words, str(recipe["propagation"])]))


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


def heatmap(
    values: pd.DataFrame,
    *,
    labels: pd.DataFrame,
    title: str,
    colour_label: str,
    x_label: str,
    y_label: str,
) -> Figure:
    """Draw a table coloured by `values` and written over with `labels`, at page width."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(PAGE_WIDTH, 0.9 + 0.24 * len(values)), layout="constrained")
        axes = figure.subplots()
        sns.heatmap(
            values,
            ax=axes,
            annot=labels.to_numpy(),
            fmt="",
            cmap="cividis_r",
            vmin=0,
            annot_kws={"size": 6},
            linewidths=0.5,
            linecolor="white",
            cbar_kws={"label": colour_label, "fraction": 0.04, "pad": 0.02},
        )
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        axes.tick_params(length=0)
        axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return figure


def curves(
    frame: pd.DataFrame,
    *,
    panels: str,
    lines: str,
    y_label: str,
    title: str,
    log: bool = False,
) -> Figure:
    """Draw ``value`` by layer: small multiples by one column, lines by another, intervals as bands.

    Lines of another seed than the first are drawn dotted in the colour of their set.
    """
    order = [role for role in (*ROLES, "residual") if role in set(frame[panels])] if panels == "role" else []
    names = order or in_order(frame[panels].unique())
    groups = _line_groups(frame, lines)
    colours = _colours([name for name, _ in groups], lines)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(PAGE_WIDTH, 0.7 + 1.35 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            panel = frame[frame[panels] == name]
            for group, seed in groups:
                line = panel[panel[lines] == group]
                if seed is not None:
                    line = line[line["seed"] == seed]
                line = line.sort_values("layer")
                style = ":" if seed else "-"
                axes.plot(line["layer"], line["value"], style, color=colours[group])
                axes.fill_between(
                    line["layer"], line["low"], line["high"], color=colours[group], alpha=0.15, linewidth=0
                )
            axes.set_title(name if panels == "role" else f"{language_name(name)} ({name})")
            axes.grid(axis="y")
            if log:
                axes.set_yscale("log")
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        figure.suptitle(title)
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        figure.supylabel(y_label, fontsize=7)
        handles = [
            mpl.lines.Line2D([], [], color=colours[group], linestyle=":" if seed else "-") for group, seed in groups
        ]
        labels = [group if seed is None else set_label(group, seed) for group, seed in groups]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8))
    return figure


def overlap(matrix: pd.DataFrame, *, languages: pd.DataFrame, seeds: pd.DataFrame, chance: float, title: str) -> Figure:
    """Draw mask overlap: every pair of calibration sets, and by layer and role with chance level and ceiling.

    Parameters
    ----------
    matrix
        Symmetric, mean IoU of two calibration sets.
    languages, seeds
        Rows ``layer, role, value`` of the pairs that differ in language, and in seed only.
    chance
        IoU of independent masks.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(PAGE_WIDTH, 4.6), layout="constrained")
        halves = figure.add_gridspec(2, 1, height_ratios=[1.25, 1])
        top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        heat = top.subplots()
        text = matrix.map(lambda v: "" if pd.isna(v) else f"{v:.3f}")
        sns.heatmap(
            matrix,
            ax=heat,
            annot=text.to_numpy(),
            fmt="",
            cmap="cividis",
            annot_kws={"size": 6},
            linewidths=0.5,
            linecolor="white",
            cbar_kws={"label": "mean IoU", "fraction": 0.04, "pad": 0.02},
        )
        heat.set(xlabel="", ylabel="", title=f"every pair, mean over layers and roles (chance {chance:.3f})")
        heat.tick_params(length=0)
        heat.tick_params(axis="x", rotation=30)
        heat.tick_params(axis="y", rotation=0)
        roles = [role for role in ROLES if role in {*languages["role"], *seeds["role"]}]
        grid = bottom.subplots(1, len(roles), sharex=True, sharey=True, squeeze=False)[0]
        for axes, role in zip(grid, roles, strict=True):
            _by_layer(axes, languages[languages["role"] == role], _COLOURS[0])
            _by_layer(axes, seeds[seeds["role"] == role], _COLOURS[4])
            axes.axhline(chance, color="#888888", linestyle="--", linewidth=0.8)
            axes.set(title=role, xlabel="layer")
            axes.grid(axis="y")
        figure.suptitle(title)
        bottom.supylabel("IoU", fontsize=7)
        line = mpl.lines.Line2D
        keys = [(line([], [], color=_COLOURS[0]), "other calibration set (band: all pairs)")]
        if len(seeds):
            keys.append((line([], [], color=_COLOURS[4]), "same language, other seed (ceiling)"))
        keys.append((line([], [], color="#888888", linestyle="--"), "independent masks (chance)"))
        bottom.legend(*zip(*keys, strict=True), loc="outside lower center", ncols=3)
    return figure


def neurons(where: pd.DataFrame, kept: pd.DataFrame, *, title: str) -> Figure:
    """Draw language neurons: their number by language and layer, and the share that each calibration set keeps."""
    with mpl.rc_context(_STYLE):
        height = 1.0 + 0.17 * max(len(where), len(kept))
        figure = Figure(figsize=(PAGE_WIDTH, height), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
        common: dict[str, Any] = {"cmap": "cividis", "linewidths": 0.4, "linecolor": "white", "vmin": 0}
        sns.heatmap(where, ax=left, cbar_kws={"label": "neurons", "pad": 0.02}, **common)
        left.set(xlabel="layer", ylabel="language", title="dense model: language-specific neurons")
        sns.heatmap(
            100 * kept,
            ax=right,
            annot=True,
            fmt=".0f",
            annot_kws={"size": 6},
            vmax=100,
            cbar_kws={"label": "kept (%)", "pad": 0.02},
            **common,
        )
        right.set(xlabel="language", ylabel="calibrated with", title="of these, still specific after pruning")
        for axes in (left, right):
            axes.tick_params(length=0)
            axes.tick_params(axis="y", rotation=0)
        figure.suptitle(title)
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


def _by_layer(axes: Axes, rows: pd.DataFrame, colour: str) -> None:
    if rows.empty:
        return
    spread = rows.groupby("layer", observed=True)["value"].agg(["mean", "min", "max"])
    axes.plot(spread.index, spread["mean"], color=colour)
    axes.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.2, linewidth=0)


def _line_groups(frame: pd.DataFrame, lines: str) -> list[tuple[str, int | None]]:
    """List what to draw a line for: ``(value of the column, seed)``; no seeds where lines are not calibration sets."""
    if lines != "calibration":
        return [(str(name), None) for name in frame[lines].unique()]
    pairs = frame[["calibration", "seed"]].drop_duplicates().to_records(index=False)
    return sorted(((str(c), int(s)) for c, s in pairs), key=lambda p: (calibration_rank(p[0]), p[1]))


def _colours(names: Sequence[str], lines: str) -> dict[str, str]:
    """Give each name a colour; a language has the same one in every figure of a study with the same languages."""
    unique = list(dict.fromkeys(names))
    return {
        name: _MIX_COLOUR.get(name, _COLOURS[i % len(_COLOURS)]) if lines == "calibration" else _COLOURS[i]
        for i, name in enumerate(unique)
    }
