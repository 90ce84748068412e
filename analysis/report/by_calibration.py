"""Tables by calibration set: a row a set, a column an evaluation language or another set; mean and SD over draws."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from probes import DENSE
from pruning.recipes import UNCALIBRATED

from ..frames import labels
from .cells import Cell, Table, number, with_best

#: The column of means over languages.
MEAN = "mean"
#: Follows the dense model's value where it is not shown to be above chance.
AT_CHANCE = "†"


@dataclass(frozen=True)
class Look:
    """How a metric is printed.

    Attributes
    ----------
    decimals
        Of numbers below 100.
    better
        Which end of the metric is; ``None`` if neither.
    scale
        What values are multiplied by: 100 for per cent.
    mean
        Whether there is a column of means over languages.
    """

    decimals: int
    better: Literal["low", "high"] | None
    scale: float = 1.0
    mean: bool = False


def over_draws(drawn: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series]:
    """Return mean, standard deviation and number of draws.

    Parameters
    ----------
    drawn
        Values by ``calibration`` and ``seed`` (index) and column.

    Returns
    -------
    mean, sd, draws
        By calibration set, in the order of figures; the standard deviation is of a sample (n − 1), nan for one draw.
    """
    grouped = drawn.groupby(level="calibration")
    draws = grouped.size()
    with np.errstate(invalid="ignore"):  # infinite perplexities have no standard deviation
        found = grouped.mean(), grouped.std(ddof=1), draws
    order = sorted(draws.index, key=labels.calibration_rank)
    mean, sd, draws = (part.loc[order] for part in found)
    return mean, sd, draws


def language_table(
    rows: pd.DataFrame,
    look: Look,
    *,
    dense: Mapping[str, float] | None = None,
    at_chance: Collection[str] | None = None,
    uncalibrated: str = "",
) -> Table:
    """Return a table with a row for every calibration set and a column for every language.

    Parameters
    ----------
    rows
        Columns ``calibration``, ``seed``, ``language``, ``value``; one row each.
    look
        How values are printed.
    dense
        The dense model's value in each language: the first row; ``None`` if it has none.
    at_chance
        Languages in which the dense model is not shown to be above chance; ``None`` if this does not apply.
    uncalibrated
        What to call the model, if it was made without calibration text.
    """
    values = rows.astype({"calibration": str, "language": str}).set_index(["calibration", "seed", "language"])["value"]
    drawn = values.unstack("language")
    languages = labels.in_order(drawn.columns)
    drawn = _with_mean(drawn[languages] * look.scale, look)
    mean, sd, draws = over_draws(drawn)
    names = [uncalibrated if name == UNCALIBRATED else name for name in mean.index]
    luck = set(at_chance or ())
    luck |= {MEAN} if luck.issuperset(languages) else set()
    guessed = [column in luck for column in mean.columns]
    cells = [
        tuple(
            replace(number(value, spread, decimals=look.decimals), own=name == language)
            for language, value, spread in zip(mean.columns, mean.loc[name], sd.loc[name], strict=True)
        )
        for name in mean.index
    ]
    cells = with_best(
        cells, [None if by_luck else _best(mean[column], look) for column, by_luck in zip(mean, guessed, strict=True)]
    )
    groups = [tuple((Cell(name), *row) for name, row in zip(names, cells, strict=True))]
    csv = _numbers(names, mean, sd, draws)
    csv.insert(2, "own", [name if name in languages else "" for name in mean.index])
    if dense is not None:
        before = _with_mean(pd.DataFrame([dict(dense)], columns=languages) * look.scale, look).iloc[0]
        first = (
            replace(number(value, decimals=look.decimals), mark=AT_CHANCE if by_luck else "")
            for value, by_luck in zip(before, guessed, strict=True)
        )
        groups.insert(0, ((Cell(DENSE), *first),))
        csv = pd.concat([pd.DataFrame([{"calibration": DENSE, "own": "", **before}]), csv]).reindex(columns=csv.columns)
    if at_chance is not None:
        csv.insert(
            3, "at_chance", [" ".join(sorted(at_chance)) if name == DENSE else "" for name in csv["calibration"]]
        )
    first_head = "model" if list(mean.index) == [UNCALIBRATED] else "calibrated on"
    return Table(csv.astype({"draws": "Int64"}), (first_head, *mean.columns), tuple(groups), over="evaluated in")


def set_table(rows: pd.DataFrame, decimals: int = 3) -> Table:
    """Return a table of the mean similarity of every pair of calibration sets, over layers, roles and pairs of draws.

    A set and itself: two of its draws, which is the ceiling for different sets; bold.

    Parameters
    ----------
    rows
        Of the frame ``mask_overlap``: one recipe and metric.
    decimals
        That are printed.
    """
    keys = ["calibration", "seed", "other_calibration", "other_seed"]
    pairs = rows.astype({"calibration": str, "other_calibration": str}).groupby(keys)["value"].mean()
    seeds: dict[str, set[int]] = {}
    found: dict[tuple[str, str], list[float]] = {}
    for (one, seed, other, other_seed), value in pairs.items():
        seeds.setdefault(one, set()).add(seed)
        seeds.setdefault(other, set()).add(other_seed)
        for place in {(one, other), (other, one)}:
            found.setdefault(place, []).append(value)
    names = sorted(seeds, key=labels.calibration_rank)
    mean, sd = (pd.DataFrame(np.nan, index=names, columns=names) for _ in range(2))
    for place, values in found.items():
        mean.loc[place] = np.mean(values)
        sd.loc[place] = np.std(values, ddof=1) if len(values) > 1 else np.nan
    body = tuple(
        (
            Cell(name),
            *(
                replace(number(mean.loc[name, other], sd.loc[name, other], decimals=decimals), own=name == other)
                for other in names
            ),
        )
        for name in names
    )
    draws = pd.Series({name: len(own) for name, own in seeds.items()})
    return Table(_numbers(names, mean, sd, draws.loc[names]), ("", *names), (body,))


def _with_mean(drawn: pd.DataFrame, look: Look) -> pd.DataFrame:
    """Return values by language with a column of their means, if there is to be one and there are several."""
    return drawn.assign(**{MEAN: drawn.mean(axis=1, skipna=False)}) if look.mean and drawn.shape[1] > 1 else drawn


def _best(column: pd.Series, look: Look) -> int | None:
    """Return the number of a column's best row; ``None`` where there is nothing to compare."""
    if look.better is None or column.notna().sum() < 2:
        return None
    return int((np.nanargmin if look.better == "low" else np.nanargmax)(column.to_numpy()))


def _numbers(names: Sequence[str], mean: pd.DataFrame, sd: pd.DataFrame, draws: pd.Series) -> pd.DataFrame:
    """Return what the CSV file holds: a row a set, and mean and standard deviation of every column."""
    columns = {"calibration": list(names), "draws": draws.to_numpy()}
    for column in mean.columns:
        columns |= {column: mean[column].to_numpy(), f"{column}_sd": sd[column].to_numpy()}
    return pd.DataFrame(columns)
