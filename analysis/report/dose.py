"""At which sparsity capabilities break, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ..frames import TEXT, labels, of_recipe, series_of


def breaking_points(frame: pd.DataFrame) -> Iterator[str]:
    """Say of every series of sparsities at which of them each category breaks.

    Parameters
    ----------
    frame
        The frame ``dose``.
    """
    for series in series_of(frame):
        rows = of_recipe(frame, series)
        rows = rows[rows["language"].notna()]
        listed = [_category(category, rows[rows["category"] == category]) for category in labels.categories_of(rows)]
        yield (
            f"With {labels.recipe_label(series)} (medians over languages, calibration sets and draws; in brackets the "
            f"lowest and highest), {'; '.join(listed)}."
        )


def _category(category: str, rows: pd.DataFrame) -> str:
    value = rows["value"].to_numpy()
    what = "perplexity has doubled" if category == TEXT else f"{category} is half way to chance"
    middle, low, high = np.quantile(value, [0.5, 0, 1], method="inverted_cdf")
    if not np.isfinite(middle):
        return f"{what} at none of the sparsities tried in {int(np.isinf(value).sum())} of {len(value)} cases"
    end = f"{high:.2f}" if np.isfinite(high) else "beyond the highest tried"
    return f"{what} at sparsity {middle:.2f} [{low:.2f}, {end}]"
