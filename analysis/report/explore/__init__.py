"""The charts of the report that can be filtered and hovered over: their data, and their Vega-Lite specifications.

Data are means over draws of a calibration set. Where there is a single draw they have its interval over segments or
templates, where there are several the range of the draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ...frames import Frames, labels
from .answers import accuracy
from .chart import CALIBRATION, EVERYTHING, LANGUAGE, LAYER, RECIPE, ROLE, Chart
from .diagnosis import recovery
from .sets import contrasts, masks, neurons
from .text import perplexity, signal, subspaces

#: Rows of a chart's data; of more, as many calibration sets are left out as it takes.
MOST_ROWS = 150_000

__all__ = ["CALIBRATION", "EVERYTHING", "LANGUAGE", "LAYER", "RECIPE", "ROLE", "Chart", "charts", "columns_of", "menus"]


def charts(frames: Frames, diagnoses: Mapping[str, tuple[str, pd.DataFrame]] | None = None) -> Iterator[Chart]:
    """Yield every chart that the frames, and those of the diagnoses, have data for."""
    makers = (perplexity, signal, subspaces, masks, accuracy, contrasts, neurons)
    for chart in (recovery(diagnoses or {}), *(make(frames) for make in makers)):
        if chart is not None and len(chart.data):
            yield _for_a_page(chart)


def _for_a_page(chart: Chart) -> Chart:
    """Leave out calibration sets, the last first, while there are more rows than a page should hold."""
    data, left_out = chart.data, []
    while len(data) > MOST_ROWS and CALIBRATION in data and data[CALIBRATION].nunique() > 1:
        left_out.append(max(data[CALIBRATION].unique(), key=labels.calibration_rank))
        data = data[data[CALIBRATION] != left_out[-1]]
    said = f" Not in this chart, which would be too large: {', '.join(reversed(left_out))}." if left_out else ""
    return replace(chart, data=data, note=chart.note + said)


def menus(shown: Sequence[Chart]) -> dict[str, list[str]]:
    """Return what each menu of the page offers, in order; menus that no chart is filtered by are left out."""
    found: dict[str, list[str]] = {}
    for name in (RECIPE, CALIBRATION, LANGUAGE, LAYER, ROLE):
        there = [chart.data[name] for chart in shown if name in chart.filters]
        values = list(dict.fromkeys(value for column in there for value in column.unique()))
        if name == CALIBRATION:
            values.sort(key=labels.calibration_rank)
        if name in (LANGUAGE, LAYER):
            values.sort()
        first = [] if name == RECIPE else [EVERYTHING]
        own = [str(value) for value in values if value != EVERYTHING]
        if own:
            found[name] = [*first, *own]
    return found


def columns_of(data: pd.DataFrame) -> dict[str, Any]:
    """Return data by column, as short as JSON can be: names by number, values with four digits, None for nan.

    >>> columns_of(pd.DataFrame({"language": ["sw", "en", "sw"], "value": [0.123456, 2.0, float("nan")]}))
    {'language': {'names': ['sw', 'en'], 'codes': [0, 1, 0]}, 'value': [0.1235, 2, None]}
    """
    found: dict[str, Any] = {}
    for name, column in data.items():
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            found[str(name)] = [_rounded(value) for value in column.to_numpy(float, na_value=np.nan).tolist()]
        else:
            codes, names = pd.factorize(column)
            found[str(name)] = {"names": names.tolist(), "codes": codes.tolist()}
    return found


def _rounded(value: float) -> float | int | None:
    if not np.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short
