"""Tables of differences between a language's own calibration set and the others, with intervals and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ..frames import labels
from ..metrics.contrasts import SIGNIFICANT
from .cells import NOTHING, Cell, Row, Table, interval, number, p_value

#: What goes into the CSV file of every comparison.
_TESTED = ["value", "low", "high", "draws", "n", "df", "p_value", "p_adjusted"]
#: What a row over all languages together is called.
ALL_LANGUAGES = "all"
_SIGNIFICANT = "*"


def own_effects(rows: pd.DataFrame) -> Table:
    """Return what calibrating on a language changes there beyond what it changes elsewhere, a row a language.

    Parameters
    ----------
    rows
        Of the frame ``contrasts``: own sets against all others, one recipe and metric.
    """
    ordered = _by_language(rows)
    numbers = ordered[["language", *_TESTED]].reset_index(drop=True)
    head = ("language", "difference", "95 % interval", "p", "p, corrected", "draws")
    cells = [(Cell(row["language"]), *_effect(row, 3)) for row in ordered.to_dict("records")]
    return Table(numbers, head, _groups(ordered, cells))


def own_task_effects(rows: pd.DataFrame) -> Table:
    """Return the same for drops in accuracy, a group of rows a category.

    Parameters
    ----------
    rows
        Of the frame ``task_contrasts``: contrast ``own``, one recipe, task and metric, whole categories.
    """
    points = rows.assign(**{name: 100 * rows[name] for name in ("value", "low", "high")})
    parts = [_by_language(points[points["category"] == category]) for category in labels.categories_of(points)]
    groups = tuple(
        tuple((Cell(row["category"]), Cell(row["language"]), *_effect(row, 1)) for row in part.to_dict("records"))
        for part in parts
    )
    numbers = pd.concat(parts)[["category", "language", *_TESTED]].reset_index(drop=True)
    head = ("category", "language", "difference", "95 % interval", "p", "p, corrected", "draws")
    return Table(numbers, head, groups, labels=2)


def against_own(pairs: pd.DataFrame) -> Table:
    """Return each set minus the evaluated language's own, a row a set and a column a language.

    Parameters
    ----------
    pairs
        Of the frame ``contrasts``: pairs of sets, one recipe and metric.
    """
    words = ["language", "calibration", "other_calibration"]
    rows = pairs.astype(dict.fromkeys(words, str))
    one, other, language = (rows[name] for name in ("calibration", "other_calibration", "language"))
    rows = rows[(one == language) | (other == language)]
    sign = np.where(rows["calibration"] == rows["language"], -1, 1)
    ends = np.sort(sign[:, None] * rows[["low", "high"]].to_numpy(), axis=1)
    rows = rows.assign(
        calibration=rows["calibration"].where(sign > 0, rows["other_calibration"]),
        value=sign * rows["value"],
        low=ends[:, 0],
        high=ends[:, 1],
    )
    languages = labels.in_order(rows["language"].unique())
    sets = sorted({*rows["calibration"], *languages}, key=labels.calibration_rank)
    rank = {name: place for place, name in enumerate(sets)}
    rows = rows.iloc[np.lexsort((rows["calibration"].map(rank), rows["language"]))]
    found = {(row["calibration"], row["language"]): row for row in rows.to_dict("records")}
    body = tuple((Cell(name), *(_against(found.get((name, language))) for language in languages)) for name in sets)
    numbers = rows[["language", "calibration", *_TESTED]].reset_index(drop=True)
    return Table(numbers, ("calibrated on", *languages), (body,), over="evaluated in")


def _against(row: Mapping[Any, Any] | None) -> Cell:
    """Return one difference; nothing for the own set itself."""
    if row is None:
        return Cell(NOTHING)
    cell = number(row["value"], (row["high"] - row["low"]) / 2, decimals=3, signed=True)
    return replace(cell, mark=_SIGNIFICANT if row["p_adjusted"] < SIGNIFICANT else "")


def _by_language(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows in the order of languages, with the one over all languages last."""
    named = rows.assign(language=rows["language"].astype(object).where(rows["language"].notna(), ALL_LANGUAGES))
    place = {name: i for i, name in enumerate(labels.in_order(set(named["language"]) - {ALL_LANGUAGES}))}
    return named.iloc[np.argsort([place.get(name, len(place)) for name in named["language"]], kind="stable")]


def _groups(rows: pd.DataFrame, cells: Sequence[Row]) -> tuple[tuple[Row, ...], ...]:
    """Set the row over all languages apart."""
    apart = (rows["language"] == ALL_LANGUAGES).to_list()
    groups = (tuple(row for row, over_all in zip(cells, apart, strict=True) if over_all == last) for last in (0, 1))
    return tuple(group for group in groups if group)


def _effect(row: Mapping[Any, Any], decimals: int) -> Row:
    return (
        number(row["value"], decimals=decimals, signed=True),
        interval(row["low"], row["high"], decimals=decimals),
        p_value(row["p_value"]),
        p_value(row["p_adjusted"]),
        Cell(str(row["draws"])),
    )
