"""Figures of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.patching import DAMAGE, RESTORE
from pruning.models.anatomy import EXPERTS, ROLES, role_kind
from pruning.text.languages import language_name

from ..frames import labels
from ..metrics.halves import BOTH, EVERY
from ..metrics.maps import likeness
from ..metrics.recovery_frame import main_metric, named_causes
from ..metrics.together import RANDOM_TOGETHER, TOGETHER
from . import charts, style

#: Most heads of a block whose values are written into the cells of a heatmap.
_WRITTEN_HEADS = 16


def shares_known(frame: pd.DataFrame) -> bool:
    """Return whether shares of the drop are given, which they are only if it is significant on all questions."""
    return bool(((frame["metric"] == "attributed_recovery") & (frame["estimated_on"].astype(str) == EVERY)).any())


def heatmap(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw what restoring the weights and the output of each role and block recovers, as gradients estimate it.

    In per cent of the drop, or in nats if the drop is not significant.
    """
    shares = shares_known(frame)
    shown = frame[(frame["metric"] == _attributed(shares)) & frame["role"].notna()].copy()
    shown = shown[shown["estimated_on"].astype(str) == EVERY]
    shown["role"] = shown["role"].astype(str).map(role_kind)
    names = {"weights": "weights restored", "output": "output restored"}
    tables = {}
    for kind, name in names.items():
        rows = shown[shown["component"] == kind]
        rows = rows.assign(layer=rows["layer"].astype(int))
        table = rows.pivot_table(index="layer", columns="role", values="value", aggfunc="sum", observed=True)
        table = table[[role for role in (*ROLES, "expert", EXPERTS) if role in table.columns]]
        tables[name] = ((100 * table).round() if shares else table) + 0.0
    return charts.heatmaps(
        {name: table for name, table in tables.items() if table.size},
        title=f"Estimated recovery by role and block ({_title(frame)})",
        colour_label="share of the drop (%)" if shares else "nats",
        digits="{:.0f}" if shares else "{:.2f}",
        diverging=True,
        x_label="role",
        y_label=labels.layer_label("block", labels.encoder_blocks(frame)),
        height=0.17,
        width=width,
    )


def heads(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw what restoring each attention head recovers, as gradients estimate it; in the units of :func:`heatmap`."""
    shares = shares_known(frame)
    shown = frame[(frame["metric"] == _attributed(shares)) & (frame["component"] == "head")]
    shown = shown[shown["estimated_on"].astype(str) == EVERY]
    names = shown["role"].astype(str).str.rpartition(".")
    shown = shown.assign(layer=shown["layer"].astype(int), kind=names[0], head=names[2].astype(int))
    titles = {"head": "self-attention", "cross_head": "cross-attention"}
    tables = {}
    for kind, rows in shown.groupby("kind", sort=False):
        table = rows.pivot_table(index="layer", columns="head", values="value", aggfunc="sum")
        tables[titles[str(kind)]] = ((100 * table).round(1) if shares else table) + 0.0
    crowded = max(len(table.columns) for table in tables.values()) > _WRITTEN_HEADS
    return charts.heatmaps(
        tables,
        title=f"Estimated recovery by attention head and block ({_title(frame)})",
        colour_label="share of the drop (%)" if shares else "nats",
        labels={name: table.astype(object).map(lambda _: "") for name, table in tables.items()} if crowded else None,
        digits="{:.1f}" if shares else "{:.2f}",
        diverging=True,
        x_label="head",
        y_label=labels.layer_label("block", labels.encoder_blocks(frame)),
        height=0.17,
        width=width,
    )


def across(frames: Mapping[str, pd.DataFrame], *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw how alike the maps of several languages are.

    Parameters
    ----------
    frames
        Language to the frame ``recovery`` of one diagnosis in it.
    width
        In inches.
    """
    names = {"weights": "weights", "output": "outputs", "head": "heads"}
    first = next(iter(frames.values())).iloc[0]
    return charts.heatmaps(
        {names[kind]: table for kind, table in likeness(frames).items()},
        title=f"Agreement between the maps of languages ({labels.category_label(str(first['category']))})",
        colour_label="Spearman's ρ",
        low=0.0,
        high=1.0,
        x_label="language",
        y_label="language",
        width=width,
    )


def together(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw what undoing 1, 2, 4, … masks together recovers: those that gradients rank highest, and random ones.

    On the half of the questions that did not rank them, averaged over both halves; as shares of the drop, or in nats
    (of accuracy: as it is) if the drop is not significant on both.
    """
    rows = frame[frame["estimated_on"].astype(str) == BOTH].astype({"component": object, "metric": object})
    shares = bool((rows["component"].eq(TOGETHER) & rows["metric"].eq(main_metric(frame))).any())
    what = "recovery" if shares else "restored"
    units = ("margin", "accuracy", "loss") if shares else ("margin (nats)", "accuracy", "loss (nats)")
    shown = {
        TOGETHER: ("ranked highest by gradients on the other half", style.TWO_COLOURS[0], "-"),
        RANDOM_TOGETHER: ("the same roles in random blocks, range of draws", style.GREY, "--"),
    }
    panels = []
    for name in units:
        lines = []
        for kind, (label, colour, dash) in shown.items():
            own = rows[(rows["component"] == kind) & (rows["metric"] == f"{name.split()[0]}_{what}")]
            x, y, low, high = (
                own.sort_values("masks")[column].tolist() for column in ("masks", "value", "low", "high")
            )
            lines.append(charts.Line(label, x, y, colour, dash, low, high))
        if any(len(line.x) for line in lines):
            levels = {"half of the drop": 0.5} if shares else {}
            panels.append(charts.Panel(name, lines, levels, log_x=2))
    return charts.line_panels(
        panels,
        title=f"Masks undone together ({_title(frame)})",
        x_label="masks undone",
        y_label="share of the drop" if shares else "restored",
        share=shares,
        width=width,
    )


def curves(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the recovery from restoring the residual stream, or a part of it, after each block.

    As shares of the drop, or in nats (of accuracy: as it is) if the drop is not significant. Bands of controls are the
    range of their draws: as gradients estimate it after every block, and exactly, as points with bars, where they were
    patched.
    """
    shares = shares_known(frame)
    names = {
        "residual": ("whole residual stream", style.GREY, "-"),
        "agnostic": ("language-agnostic part", style.TWO_COLOURS[1], "-"),
        "specific": ("language-specific part", style.TWO_COLOURS[0], "-"),
        "random": ("matched random subspaces, range of draws", style.BLACK, ""),
    }
    exact, titles, shown_range = _restored(frame, names)
    panels = []
    for metric, title in titles.items():
        lines = [
            _line(exact, metric, kind, *look, band=kind != "residual", points=kind == "random")
            for kind, look in names.items()
        ]
        if metric == main_metric(frame, "recovery" if shares else "restored"):
            rows = exact[(exact["metric"] == _attributed(shares)) & (exact["component"] == "random")]
            x, y, low, high = (rows.sort_values("layer")[name].tolist() for name in ("layer", "value", "low", "high"))
            lines.append(charts.Line("the same, estimated from gradients", x, y, style.GREY, ":", low, high))
        if any(len(line.x) for line in lines):
            panels.append(charts.Panel(title, lines, {"full recovery": 1.0} if shares else {}, y_range=shown_range))
    return charts.line_panels(
        panels,
        title=f"Recovery from restoring the residual stream ({_title(frame)})",
        x_label="after block",
        encoder=labels.encoder_blocks(frame),
        y_label="share of the drop" if shares else "restored",
        share=shares,
        width=width,
    )


def positions(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the recovery from restoring the stream after each block at one class of the tokens of minimal pairs alone.

    In the units of :func:`curves`, beside the whole stream.
    """
    names = {
        "residual": ("all tokens", style.GREY, "-"),
        "residual_differing": ("words in which the pair differs", style.TWO_COLOURS[0], "-"),
        "residual_last": ("last token, and those of the choice", style.TWO_COLOURS[1], "-"),
        "residual_elsewhere": ("other tokens", style.GREEN, "-"),
    }
    shares = shares_known(frame)
    exact, titles, shown_range = _restored(frame, names)
    panels = []
    for metric, title in titles.items():
        lines = [_line(exact, metric, kind, *look, band=kind != "residual") for kind, look in names.items()]
        if any(len(line.x) for line in lines[1:]):
            panels.append(charts.Panel(title, lines, {"full recovery": 1.0} if shares else {}, y_range=shown_range))
    return charts.line_panels(
        panels,
        title=f"Recovery from restoring the residual stream at some tokens ({_title(frame)})",
        x_label="after block",
        encoder=labels.encoder_blocks(frame),
        y_label="share of the drop" if shares else "restored",
        share=shares,
        width=width,
    )


def _restored(
    frame: pd.DataFrame, kinds: Iterable[str]
) -> tuple[pd.DataFrame, dict[str, str], tuple[float, float] | None]:
    """Return the exact rows on all questions, the title of each metric, and the range of the shares of some kinds."""
    shares = shares_known(frame)
    what = "recovery" if shares else "restored"
    exact = frame[(frame["direction"] == RESTORE) & (frame["estimated_on"].astype(str) == EVERY)]
    units = ("margin", "accuracy", "loss") if shares else ("margin (nats)", "accuracy", "loss (nats)")
    titles = {f"{name.split()[0]}_{what}": name for name in units}
    drawn = exact[exact["component"].isin(list(kinds)) & exact["metric"].isin(titles)]["value"]
    return exact, titles, (min(-0.25, drawn.min() - 0.1), max(1.25, drawn.max() + 0.1)) if shares else None


def _line(
    exact: pd.DataFrame,
    metric: str,
    kind: str,
    label: str,
    colour: str,
    dash: str,
    *,
    band: bool = True,
    points: bool = False,
) -> charts.Line:
    """Return one kind of component over the blocks."""
    rows = exact[(exact["metric"] == metric) & (exact["component"] == kind)].sort_values("layer")
    x, y, low, high = (rows[name].tolist() for name in ("layer", "value", "low", "high"))
    return charts.Line(label, x, y, colour, dash, low if band else None, high if band else None, points=points)


def causes(frame: pd.DataFrame, *, width: float = style.PAGE_WIDTH) -> Figure:
    """Draw the causes on the questions that did not choose them: restored in the pruned model, and corrupted.

    As shares of the drop, or in nats if the drop is not significant on some of these questions.
    """
    named = named_causes(frame)
    with_shares = frame[(frame["metric"] == main_metric(frame)) & frame["position"].notna()]["estimated_on"]
    shares = set(named["estimated_on"]) <= set(with_shares.astype(str))
    metric = main_metric(frame, "recovery" if shares else "restored")
    exact = frame[(frame["metric"] == metric) & frame["direction"].notna()].astype({"estimated_on": object})
    keys = ["component", "layer", "role"]
    exact = exact.assign(label=[_label(row) for row in exact[keys].to_dict("records")])
    panels: dict[str, list[charts.Effect]] = {"restored in the pruned model": [], "corrupted in the dense model": []}
    for row in named.to_dict("records"):
        on, label = row["estimated_on"], _label(row)
        here = exact[(exact["estimated_on"] == on) & (exact["label"] == label)].set_index("direction")
        if not {RESTORE, DAMAGE} <= set(here.index):
            continue
        shown = label if on == BOTH else f"{label} ({on} half)"
        colour = style.TWO_COLOURS[0 if row["component"] == "weights" else 1]
        for effects, one in zip(panels.values(), (here.loc[RESTORE], here.loc[DAMAGE]), strict=True):
            significant = bool(one["low"] > 0 or one["high"] < 0)
            value, low, high = (float(one[name]) for name in ("value", "low", "high"))
            effects.append(charts.Effect(shown, value, low, high, colour, significant))
    values = [effect.value for effects in panels.values() for effect in effects] or [0.0]
    lowest, highest = min(values), max(values)  # intervals may go beyond
    return charts.effect_panels(
        panels,
        title=f"Single components ({_title(frame)})",
        x_label="share of the drop" if shares else "nats",
        legend=("interval excludes zero (blue: weights; orange: activations)", "interval includes zero"),
        x_range=(min(-0.25, lowest - 0.1), max(1.0, highest + 0.1)),
        width=width,
    )


def _attributed(shares: bool) -> str:
    return f"attributed_{'recovery' if shares else 'restored'}"


def _label(row: Mapping[Any, Any]) -> str:
    layer = [] if pd.isna(row["layer"]) else [str(int(row["layer"]))]
    role = [] if pd.isna(row["role"]) else [str(row["role"]).removeprefix("head.")]
    place = ".".join([*layer, *role])
    return f"{row['component'].replace('_', ' ')} {place}".strip()


def _title(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    return f"{labels.category_label(str(first['category']))}, {language_name(str(first['language']))}"
