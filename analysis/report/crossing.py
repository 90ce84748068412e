"""What states of other languages do to the answers of a diagnosis's items, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from probes import DENSE
from pruning.text.languages import language_name

from ..frames import labels

#: Share of the way to the twin's answer up to which blocks are counted.
_MOST = 0.75


def crossing_findings(frame: pd.DataFrame) -> list[str]:
    """Say from which block on the states of a twin in another language bring most of its answer.

    Parameters
    ----------
    frame
        The frame ``crossing`` of one diagnosis.
    """
    frame = frame.astype(dict.fromkeys(("method", "source_language", "metric", "language"), object))
    return [sentence for _, model in _models(frame) for sentence in _of_model(model)]


def _models(frame: pd.DataFrame) -> Iterator[tuple[bool, pd.DataFrame]]:
    for dense in (True, False):
        rows = frame[(frame["method"] == DENSE) == dense]
        if len(rows):
            yield dense, rows


def _of_model(rows: pd.DataFrame) -> Iterator[str]:
    first = rows.iloc[0]
    name = "dense" if first["method"] == DENSE else "pruned"
    where = f"{labels.category_label(str(first['category']))} in {language_name(str(first['language']))}"
    if not (rows["metric"] == "twin_share").any():
        swing = rows[rows["metric"] == "swing"].iloc[0]
        yield (
            f"In the {name} model asking an item's twin instead moves the margin by {swing['value']:.2f} nats "
            f"{_interval(swing, 1, 2)} ({where}, n = {swing['n']:.0f}): too little to say which states carry it."
        )
        return
    for source in labels.in_order(rows["source_language"].unique()):
        own = rows[rows["source_language"] == source]
        twin = own[own["metric"] == "twin_share"].sort_values("layer")
        control = own[own["metric"] == "control_share"].set_index("layer")
        reached = twin[twin["low"].fillna(twin["value"]) > _MOST]
        shown = (reached if len(reached) else twin.sort_values("value", ascending=False)).iloc[0]
        how = "the first after which" if len(reached) else "where it does so most, and after no block does"
        lies = "lies" if len(reached) else "lie"
        beside = control.loc[shown["layer"]]
        yield (
            f"In the {name} model ({where}, n = {shown['n']:.0f}), the state at the last token of the twin asked in "
            f"{language_name(str(source))} moves the margin {100 * shown['value']:.0f} % {_interval(shown, 100, 0)} of "
            f"the way to the twin's answer after block {shown['layer']:.0f}, {how} the interval {lies} above "
            f"{100 * _MOST:.0f} % (50 % is as good as no answer); that of an unrelated item "
            f"{100 * beside['value']:.0f} % {_interval(beside, 100, 0)}."
        )


def _interval(row: pd.Series, factor: int, digits: int) -> str:
    if pd.isna(row["low"]):
        return "(no interval)"
    return f"[{factor * row['low']:.{digits}f}, {factor * row['high']:.{digits}f}]"
