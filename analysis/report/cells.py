"""Tables as they are printed: cells of rounded numbers and text, which the page and LaTeX dress each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

#: What is printed where there is no number.
NOTHING = "–"
#: From here on numbers are printed as a power of ten.
LARGE = 10_000.0


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes
    ----------
    text
        A label or a rounded number.
    sub
        Subscript: the standard deviation, or the half width of an interval.
    power
        Of ten, by which text and subscript are multiplied.
    own
        Whether it is of the evaluated language's own calibration set: bold.
    best
        Whether it is the best of its column: underlined.
    mark
        What follows it, such as the reference to a note.
    """

    text: str
    sub: str = ""
    power: int | None = None
    own: bool = False
    best: bool = False
    mark: str = ""


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes
    ----------
    numbers
        What its CSV file holds: the same unrounded, and what was left out for want of room.
    head
        Heading of every column.
    groups
        Groups of rows, with a rule between them.
    over
        Heading over all columns but the first.
    labels
        How many columns, the first ones, have labels.
    """

    numbers: pd.DataFrame
    head: tuple[str, ...]
    groups: tuple[tuple[Row, ...], ...]
    over: str = ""
    labels: int = 1


@dataclass(frozen=True)
class ReportTable:
    """One table of the report, which is also written for papers.

    Attributes
    ----------
    section
        Heading under which it stands.
    name
        Of its files, without ending.
    title
        What it has, in a few words.
    caption
        What was measured, on how much text, and how to read it.
    make
        Makes the table.
    """

    section: str
    name: str
    title: str
    caption: str
    make: Callable[[], Table]


def number(value: float, spread: float = np.nan, *, decimals: int, signed: bool = False) -> Cell:
    """Return a number as it is printed: with fewer decimals from 100 on, as a power of ten from :data:`LARGE` on.

    Parameters
    ----------
    value
        May be infinite, or nan if there is none.
    spread
        Standard deviation or half width, printed with the same decimals; nan if there is none.
    decimals
        Of numbers below 100.
    signed
        Whether positive numbers have a sign.

    Examples
    --------
    >>> number(23.456, 0.789, decimals=2)
    Cell(text='23.46', sub='0.79', power=None, own=False, best=False, mark='')
    >>> [number(value, decimals=2).text for value in (123.45, -0.001, float("inf"), float("nan"))]
    ['123.5', '0.00', '∞', '–']
    >>> number(123456.0, 6000.0, decimals=2)
    Cell(text='1.23', sub='0.06', power=5, own=False, best=False, mark='')
    """
    if np.isnan(value):
        return Cell(NOTHING)
    if np.isinf(value):
        return Cell("∞" if value > 0 else "−∞")
    power = None
    if abs(value) >= LARGE:
        power = int(f"{value:.2e}".partition("e")[2])
        value, spread, decimals = value / 10.0**power, spread / 10.0**power, 2
    elif abs(value) >= 100:
        decimals = min(decimals, 1)
    text = f"{value:{'+' if signed else ''}z.{decimals}f}".replace("-", "−")
    return Cell(text, f"{spread:.{decimals}f}" if np.isfinite(spread) else "", power)


def interval(low: float, high: float, *, decimals: int) -> Cell:
    """Return a 95 % interval as it is printed.

    >>> interval(-0.1234, 0.2, decimals=3).text
    '[−0.123, +0.200]'
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        return Cell(NOTHING)
    ends = (number(end, decimals=decimals, signed=low < 0).text for end in (low, high))
    return Cell(f"[{', '.join(ends)}]")


def p_value(value: float) -> Cell:
    """Return a p-value as it is printed.

    >>> [p_value(p).text for p in (0.04321, 0.0004, float("nan"))]
    ['0.043', '<0.001', '–']
    """
    if np.isnan(value):
        return Cell(NOTHING)
    return Cell("<0.001" if value < 0.001 else f"{value:.3f}")


def with_best(rows: Sequence[Row], best: Sequence[int | None]) -> list[Row]:
    """Underline the best cell of every column, and others that are printed alike; none where all are.

    Parameters
    ----------
    rows
        The rows that are compared.
    best
        Number of the best row, for every column; ``None`` where there is none.
    """
    found = [list(row) for row in rows]
    for column, winner in enumerate(best):
        printed = [(row[column].text, row[column].power) for row in rows]
        if winner is None or len(set(printed)) < 2:
            continue
        for row, own in zip(found, printed, strict=True):
            row[column] = replace(row[column], best=own == printed[winner])
    return [tuple(row) for row in found]
