"""What all charts share: a chart, its data as means over draws, and the filters that the menus set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from probes import DENSE
from pruning.recipes import UNCALIBRATED

from ...frames import labels, recipes_of
from ...plots.style import GREY, colour

#: What stands for "not filtered" in the menus, and for all languages together in the data.
EVERYTHING = "(all)"
RECIPE, CALIBRATION, LANGUAGE, LAYER, ROLE = "recipe", "calibration", "language", "block", "role"


@dataclass(frozen=True)
class Chart:
    """A chart that can be filtered.

    Attributes
    ----------
    name
        Of its data.
    title, note
        What it shows, and how to read it.
    frame
        Where its data come from.
    data
        One observation a row.
    filters
        Columns by which the menus of the page filter it.
    spec
        In Vega-Lite; the data are named, and every menu is a parameter.
    """

    name: str
    title: str
    note: str
    frame: str
    data: pd.DataFrame
    filters: Sequence[str]
    spec: Mapping[str, Any]


def pruned_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of pruned models with their recipe in words, and names instead of categories."""
    rows = frame[frame["method"] != DENSE].copy()
    rows[RECIPE] = ""
    for recipe in recipes_of(frame):
        own = np.logical_and.reduce([rows[column] == value for column, value in recipe.items()])
        rows.loc[own, RECIPE] = labels.recipe_label(recipe)
    rows[CALIBRATION] = rows["calibration"].astype(object).fillna("")
    rows.loc[rows[CALIBRATION] == UNCALIBRATED, CALIBRATION] = labels.set_label(UNCALIBRATED, 0)
    if "language" in rows:
        rows[LANGUAGE] = rows["language"].astype(object).where(rows["language"].notna(), EVERYTHING)
    if "layer" in rows:
        rows[LAYER] = rows["layer"].astype("Int64")
    if "role" in rows:
        rows[ROLE] = rows["role"].astype(object)
    order = {labels.recipe_label(recipe): n for n, recipe in enumerate(recipes_of(frame))}
    return rows.sort_values(RECIPE, key=lambda column: column.map(order), kind="stable")


def over_draws(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Average over draws; the interval of a single one is kept, of several there is their range."""
    kept = rows.reset_index(drop=True)
    if "low" not in kept:
        kept = kept.assign(low=np.nan, high=np.nan)
    groups = kept.groupby([*by], observed=True, sort=False)
    found = groups.agg(value=("value", "mean"), low=("low", "min"), high=("high", "max"), draws=("value", "size"))
    several = found["draws"] > 1
    found.loc[several, "low"] = groups["value"].min()[several]
    found.loc[several, "high"] = groups["value"].max()[several]
    return found.reset_index()


def of_metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    return frame[frame["metric"] == metric]


def filtered(name: str, data: pd.DataFrame, filters: Sequence[str]) -> alt.Chart:
    """Begin a chart: its data by name, a parameter for each menu, and the filters that these set."""
    chart = alt.Chart(alt.NamedData(name=name))
    first = {RECIPE: data[RECIPE].iloc[0]}
    chart = chart.add_params(*(alt.param(name=f"{column}_", value=first.get(column, EVERYTHING)) for column in filters))
    for column in filters:
        chart = chart.transform_filter(
            f"datum.{column} == {column}_"
            if column == RECIPE
            else f"{column}_ == '{EVERYTHING}' || datum.{column} == {column}_"
        )
    return chart


def specification(chart: Any, height: int | None = None) -> dict[str, Any]:
    """Return a chart's specification, as wide as the page lets it be."""
    fitted = alt.AutoSizeParams(type="fit-x", contains="padding")
    sized = chart.properties(width="container", autosize=fitted, **({"height": height} if height else {}))
    spec: dict[str, Any] = sized.to_dict(validate=True)
    spec.pop("config", None)  # the page has its own, for light and dark
    return spec


def colours(names: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[GREY if name == "no text" else colour(name) for name in names])


def sets_of(data: pd.DataFrame) -> list[str]:
    return sorted(data[CALIBRATION].unique(), key=labels.calibration_rank)


def tooltip(*fields: tuple[str, str]) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(field, title=title, format=".4~g") if ":Q" in field else alt.Tooltip(field, title=title)
        for field, title in fields
    ]


SPREAD = (("low:Q", "from"), ("high:Q", "to"), ("draws:Q", "draws"))


def matrix(
    base: alt.Chart, colour_by: str, title: str, scheme: Literal["oranges", "tealblues"], number_format: str, rows: int
) -> dict[str, Any]:
    """Return the specification of a matrix of so many rows: cells by colour, with ``value`` written into them."""
    light = alt.Scale(scheme=alt.SchemeParams(name=scheme, extent=[0, 0.6]))  # black numbers can be read on it
    cells = base.mark_rect().encode(color=alt.Color(f"{colour_by}:Q", title=title, scale=light))
    words = base.mark_text(fontSize=11, color="#000").encode(text=alt.Text("value:Q", format=number_format))
    return specification(cells + words, height=max(24 * rows, 80))
