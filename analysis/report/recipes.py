"""What one recipe keeps more than another, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..frames import RECIPE_COLUMNS, TEXT, labels
from ..metrics.contrasts import SIGNIFICANT
from ..metrics.recipe_contrasts import with_reference


def recipes_compared(frame: pd.DataFrame) -> Iterator[str]:
    """Say of every recipe how it differs from the reference, over all calibration sets and languages.

    Parameters
    ----------
    frame
        The frame ``recipe_contrasts``.
    """
    rows, reference = with_reference(frame)
    rows = rows[rows["calibration"].isna() & rows["metric"].isin(["log_perplexity", "accuracy"])]
    languages = rows["language"].nunique()
    rows = rows[rows["language"].isna()] if languages > 1 else rows
    if not len(rows):
        return
    where = "all languages and calibration sets" if languages > 1 else "all calibration sets"
    if rows["df"].isna().all():
        yield (
            f"Whether a recipe keeps more than {reference} cannot be tested: no calibration set was drawn with a "
            "second seed. Give calibration.seeds two values to find out."
        )
        return
    for recipe, own in rows.groupby(list(RECIPE_COLUMNS), observed=True, sort=False):
        name = labels.recipe_label(dict(zip(RECIPE_COLUMNS, recipe, strict=True)))
        tested = own[own["p_adjusted"].notna()].to_dict("records")
        sure = [_difference(row) for row in tested if row["p_adjusted"] < SIGNIFICANT]
        rest = [_what(row) for row in tested if not row["p_adjusted"] < SIGNIFICANT]
        said = "; ".join(sure)
        if rest:
            said += f"{', ' if said else ''}{'no' if not sure else 'and no'} significant difference in {_listed(rest)}"
        yield f"{name[0].upper()}{name[1:]}, against {reference} ({where}): {said}."


def _what(row: Mapping[Any, Any]) -> str:
    return "perplexity" if row["category"] == TEXT else f"{row['category']} ({row['task']})"


def _difference(row: Mapping[Any, Any]) -> str:
    if row["category"] == TEXT:
        value, low, high = (np.exp(row[name]) for name in ("value", "low", "high"))
        return f"perplexity times {value:.2f} [{low:.2f}, {high:.2f}]"
    value, low, high = (100 * row[name] for name in ("value", "low", "high"))
    return f"{_what(row)} {value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
