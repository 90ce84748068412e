"""Choosing variants, rows and figures by what they are: ``method="wanda"``, ``calibration=["en", "sw"]``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from pruning import Variant
from pruning.errors import StudyError, did_you_mean, shortened, unknown

from ..frames import RECIPE_COLUMNS, VARIANT_COLUMNS

#: What a variant can be chosen by.
OF_VARIANTS = ("id", *VARIANT_COLUMNS)


def matches(described: Mapping[str, Any], what: Mapping[str, Any]) -> bool:
    """Whether something has all the values asked for.

    Parameters
    ----------
    described
        Its columns.
    what
        Column to a value, or to a list of values, any of which will do.

    >>> matches({"method": "wanda", "seed": 0}, {"method": ["wanda", "ria"]})
    True
    """
    return all(any(_equal(described[column], value) for value in options(wanted)) for column, wanted in what.items())


def options(wanted: Any) -> list[Any]:
    """Return the values that were asked for.

    >>> options("sw"), options(["en", "sw"])
    (['sw'], ['en', 'sw'])
    """
    return list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]


def of_variant(variant: Variant, what: Iterable[str] = VARIANT_COLUMNS) -> dict[str, Any]:
    """Return what a variant can be chosen by; its masks are counted only if that is necessary to know it."""
    if variant.record.recipe is None or "bits" in what:
        return {"id": variant.id, **variant.columns()}
    return {"id": variant.id, **variant.record.columns(math.nan, math.nan)}


def check_known(
    what: Mapping[str, Any], described: Iterable[Mapping[str, Any]], kind: str, names: Iterable[str]
) -> None:
    """Check that what was asked for exists, value by value.

    Parameters
    ----------
    what
        As of :func:`matches`.
    described
        The columns of all there are.
    kind
        What they are called, in the plural.
    names
        Names of their columns.

    Raises
    ------
    StudyError
        If a column is unknown, or nothing has a value; the message says what there is.
    """
    there, names = list(described), list(names)
    for column, wanted in what.items():
        if column not in names:
            raise StudyError(f"{kind} are not chosen by {column}; {did_you_mean(column, names)}")
        known = list(dict.fromkeys(one[column] for one in there))
        for value in options(wanted):
            if not any(_equal(one, value) for one in known):
                said = did_you_mean(str(value), [_written(one) for one in known]) if known else "there are none"
                raise StudyError(f"no {kind} have {column} {_quoted(value)}; {said}")


def the_one(found: list[dict[str, Any]], what: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the only one found.

    Parameters
    ----------
    found
        The columns of what was found, its id among them.
    what
        What was asked for.
    kind
        What they are called, in the plural.

    Raises
    ------
    StudyError
        If there is none, or there are several; the message lists them, and what tells them apart.
    """
    if len(found) == 1:
        return found[0]
    asked = ", ".join(f"{column}={value!r}" for column, value in what.items())
    if not found:
        raise StudyError(f"no {kind} match {asked}" if asked else f"there are no {kind}")
    names = [str(one["id"]) for one in found]
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    apart = [
        f"{column}={' or '.join(map(_quoted, values))}"
        for column in found[0]
        if column != "id" and len(values := list(dict.fromkeys(one[column] for one in found))) > 1 and _known(values)
    ]
    say = f"say which: {'; '.join(apart[:_APART])}" if apart else f"say which: id={_quoted(names[0])}, for example"
    raise StudyError(f"{len(found)} {kind} match{f' {asked}' if asked else ''}: {listed}; {say}")


def rows(frame: pd.DataFrame, name: str, what: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of a frame that have all the values asked for.

    Parameters
    ----------
    frame, name
        A frame, and what it is called.
    what
        As of :func:`matches`.

    Raises
    ------
    StudyError
        If a column is unknown, or no row has a value.
    """
    for column, wanted in what.items():
        if column not in frame.columns:
            raise StudyError(
                f'frame "{name}" has no {unknown("column", column, frame.columns).removeprefix("unknown ")}'
            )
        values = frame[column].dropna().unique().tolist()
        there = [value for value in values if any(_equal(value, one) for one in options(wanted))]
        for one in options(wanted):
            if not any(_equal(value, one) for value in values):
                said = did_you_mean(str(one), map(_written, values)) if values else "it has no rows"
                raise StudyError(f'frame "{name}" has no rows with {column} {_quoted(one)}; {said}')
        frame = frame[frame[column].isin(there)]
    return frame


#: How many are listed in a message, and how many columns that tell them apart.
_LISTED, _APART = 8, 3
#: What figures are chosen by.
OF_FIGURES = (*RECIPE_COLUMNS[1:], "task")


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, float) and isinstance(wanted, int | float) and not isinstance(wanted, bool):
        return math.isclose(value, wanted, abs_tol=1e-9)
    return bool(value == wanted)


def _known(values: Iterable[Any]) -> bool:
    return not any(isinstance(value, float) and math.isnan(value) for value in values)


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(value: Any) -> str:
    return f'"{shortened(value)}"' if isinstance(value, str) else _written(value)
