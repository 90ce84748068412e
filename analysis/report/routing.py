"""What the frame ``routing`` says, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from probes import DENSE
from pruning.text.languages import language_name

from ..frames import Frames, of_recipe


def routing_of_dense(frame: pd.DataFrame) -> Iterator[str]:
    """Yield which languages use different experts in the dense model."""
    rows = frame[(frame["method"] == DENSE) & (frame["metric"] == "language_distance") & frame["layer"].isna()]
    if not len(rows):
        return
    apart = rows.sort_values("value", kind="stable")
    nearest, farthest = apart.iloc[0], apart.iloc[-1]
    if len(apart) == 1:
        which, over, most = _pair(farthest), "layers", ""
    else:
        which, over = "two languages", "pairs and layers"
        most = (
            f": least for {_pair(nearest)} ({nearest['value']:.2f}), most for {_pair(farthest)} "
            f"({farthest['value']:.2f})"
        )
    yield (
        f"In the dense model, the shares of the experts in {which} are {apart['value'].mean():.2f} apart in total "
        f"variation (mean over {over}){most}."
    )


def routing_of_recipe(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield how much pruning changes the router's choices, and where the shares of experts shift most."""
    rows = of_recipe(frames["routing"], recipe)
    if not len(rows):
        return
    means = rows[rows["layer"].isna()].astype({"metric": str}).groupby("metric")["value"].mean()
    shifts = rows[(rows["metric"] == "shift") & rows["layer"].notna()]
    by_language = shifts.groupby("language", observed=True)["value"].mean()
    by_layer = shifts.groupby("layer", observed=True)["value"].mean()
    most = f", most in {language_name(str(by_language.idxmax()))} ({by_language.max():.2f})" * (len(by_language) > 1)
    where = f" and in block {int(by_layer.idxmax())} ({by_layer.max():.2f})" * (len(by_layer) > 1)
    yield (
        f"The router sends {means['moved']:.0%} of its top-k slots to experts that the dense model does not choose for "
        f"the same token; the shares of the experts shift by {means['shift']:.2f} in total variation{most}{where}."
    )


def _pair(row: pd.Series) -> str:
    return f"{language_name(str(row['language']))} and {language_name(str(row['other_language']))}"
