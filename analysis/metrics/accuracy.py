"""Accuracy on items and minimal pairs, each model paired with the dense one item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from probes import DENSE
from probes.items import Item
from probes.scoring import ChoiceScores

from ..frames import ALL, VARIANT_COLUMNS, tidy
from ..stats.intervals import share_difference_interval, share_interval, unit_interval

#: What items are told apart by within a category; a part is called ``grade 2``, say.
PARTS = ("kind", "grade", "domain")
#: Of the interval that must lie above chance for the dense model to be called able; see :func:`at_chance`.
CHANCE_LEVEL = 0.998
_PLACE = ("language", "task", "category")


def item_frame(
    scores: Mapping[tuple[str, str], ChoiceScores],
    items: Mapping[str, Sequence[Item]],
    columns: Mapping[str, Mapping[str, Any]],
    task: str,
) -> pd.DataFrame:
    """Return the frame ``items``: the scores of every item in every model.

    Parameters
    ----------
    scores
        ``(variant, language)`` to the scores of that language's items, in their order.
    items
        Language to items.
    columns
        Variant to the columns that describe it.
    task
        What to call them together.
    """
    rows = []
    for (variant, language), found in scores.items():
        asked = items[language]
        place = {**columns[variant], "language": language, "task": task}
        names: dict[str, list[Any]] = {"item": [item.id for item in asked]}
        names |= {name: [getattr(item, name) for item in asked] for name in ("twin", "category", "template", "grade")}
        names |= {name: [getattr(item, name) or None for item in asked] for name in ("kind", "domain")}
        for metric, values in (("margin", found.margin), ("correct", found.correct)):
            rows.append({**place, **names, "metric": [metric] * len(asked), "value": values})
        for choice in range(found.values.shape[1]):
            there = np.isfinite(found.values[:, choice])
            own = {name: list(compress(values, there)) for name, values in names.items()}
            rows.append(
                {
                    **place,
                    **own,
                    "choice": choice,
                    "metric": ["log_likelihood"] * int(there.sum()),
                    "value": found.values[there, choice],
                }
            )
    return tidy("items", rows)


def analyze(items: pd.DataFrame) -> pd.DataFrame:
    """Return the frame ``accuracy``: by task, category and language, and over all languages together (no language).

    Models are compared with the dense one on the same items. Items made after one template are not independent, so
    intervals are over templates; over all languages, templates of one name go together as translations. The rows with
    ``part`` = ``"all"`` are of the whole category; others of one kind, grade or domain, where a category has several.
    ``at_chance`` marks cells in which the dense model does not do better than guessing: nothing can be lost there.

    Parameters
    ----------
    items
        As from :func:`item_frame` or :func:`analysis.study.harness.evaluate`, the dense model among them.
    """
    if not len(items):
        return tidy("accuracy", [])
    twins = by_twin(items)
    several = twins.groupby(["task", "category"])["language"].transform("nunique") > 1
    rows = []
    for over, shown in (((*_PLACE,), twins), (("task", "category"), twins[several])):
        for part, own in parts_of(shown):
            for place, group in own.groupby([*VARIANT_COLUMNS, *over], sort=False):
                described = dict(zip([*VARIANT_COLUMNS, *over], place, strict=True))
                rows.append({**described, "part": part, **_estimates(described["method"] != DENSE, group)})
    return tidy("accuracy", rows)


def parts_of(twins: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield all rows of :func:`by_twin`, then those of every part of the categories that have several of its sort."""
    yield ALL, twins
    for name in PARTS:
        several = twins.groupby(["task", "category"])[name].transform("nunique") > 1
        for value, own in twins[several].groupby(name):
            yield f"{name} {value:.0f}" if name == "grade" else f"{name} {value}", own


def at_chance(dense: pd.DataFrame) -> bool:
    """Whether the dense model may be guessing: a strict interval of its accuracy includes chance.

    On minimal pairs where there are any, else on items. The interval is at :data:`CHANCE_LEVEL`, not at 95 %: a study
    asks this of dozens of cells, and what looks able by luck falls back to chance whatever pruning does.

    Parameters
    ----------
    dense
        Rows of :func:`by_twin` of one cell and one model; only their columns of the dense model are used.
    """
    right, asked = ("dense_twin_accuracy", "pairs") if dense["pairs"].sum() else ("dense_accuracy", "items")
    column = _sums(dense, asked)
    chance = 0.5 if asked == "pairs" else column("guessed").sum() / column(asked).sum()
    _, low, _ = share_interval(column(right), column(asked), CHANCE_LEVEL)
    return bool(not low > chance)


def _sums(twins: pd.DataFrame, counted: str) -> Callable[[str], Float[np.ndarray, " templates"]]:
    """Return what sums a column over each template, in the rows in which something is counted.

    The same as pandas' ``groupby``, which takes ten times as long on as few rows as a cell has.
    """
    there = twins[counted].to_numpy() > 0
    unit, names = pd.factorize(twins["template"].to_numpy()[there])
    return lambda name: np.bincount(unit, twins[name].to_numpy(np.float64)[there], len(names))


#: Each metric's sum, and the number that it is divided by.
_MEASURED = {"accuracy": "items", "twin_accuracy": "pairs", "margin": "items"}


def by_twin(items: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every model, language and minimal pair (or single item), beside the dense model's.

    Returns
    -------
    DataFrame
        Columns ``items`` and ``pairs`` (1 if there are two items with margins); sums over the items ``accuracy`` and
        ``margin``, and ``twin_accuracy``, each also with ``dense_`` in front; how many items became right and wrong,
        ``gained`` and ``lost``; and how many a guess gets right, ``guessed``.
    """
    place = [*_PLACE, "twin"]
    words = [*VARIANT_COLUMNS, *place, "item", "metric", "template", "kind", "domain"]
    shown = items[items["metric"].isin(["correct", "margin"])].astype(dict.fromkeys(words, object))
    values = shown.pivot_table(index=[*VARIANT_COLUMNS, *place, "item"], columns="metric", values="value", sort=False)
    if "margin" not in values:
        values["margin"] = np.nan
    values = values.reset_index().rename(columns={"correct": "accuracy"})
    is_dense = values["method"] == DENSE
    dense = values[is_dense].set_index([*place, "item"])[["accuracy", "margin"]].add_prefix("dense_")
    values = values.join(dense, on=[*place, "item"])
    change = values["accuracy"] - values["dense_accuracy"]
    values["gained"], values["lost"] = change.clip(lower=0), (-change).clip(lower=0)
    choices = items[(items["metric"] == "log_likelihood") & (items["method"] == DENSE)].astype({"item": object})
    number = choices.groupby([*_PLACE, "item"], observed=True).size()
    values["guessed"] = (1 / number).reindex(pd.MultiIndex.from_frame(values[[*_PLACE, "item"]])).fillna(0).to_numpy()
    by_twin = values.groupby([*VARIANT_COLUMNS, *place], sort=False)
    sums = by_twin[["accuracy", "dense_accuracy", "gained", "lost", "guessed"]].sum()
    # a sum of nothing stays empty: items without margins have none over all languages either
    sums[["margin", "dense_margin"]] = by_twin[["margin", "dense_margin"]].sum(min_count=1)
    sums["items"] = by_twin.size()
    sums["pairs"] = ((sums["items"] > 1) & by_twin["margin"].count().gt(1)).astype(int)
    for model in ("", "dense_"):
        sums[f"{model}twin_accuracy"] = ((sums[f"{model}margin"] > 0) & (sums["pairs"] > 0)).astype(int)
    change = sums["twin_accuracy"] - sums["dense_twin_accuracy"]
    sums["twin_gained"], sums["twin_lost"] = change.clip(lower=0), (-change).clip(lower=0)
    about = shown.drop_duplicates(place).set_index(place)[["template", *PARTS]]
    sums = sums.reset_index().join(about, on=place)
    return sums.assign(template=sums["template"].where(sums["template"].notna(), sums["twin"]))


def _estimates(pruned: bool, twins: pd.DataFrame) -> dict[str, Any]:
    """Return the metrics of one model and cell, beside the dense model's where it is pruned."""
    found: dict[str, tuple[float, float, float]] = {}
    for name, counted in _MEASURED.items():
        own = twins[name].to_numpy(np.float64)[twins[counted].to_numpy() > 0]
        if not len(own) or np.isnan(own).any():
            continue
        column = _sums(twins, counted)
        asked = column(counted)
        if name == "margin":
            found[name] = _mean(column(name), asked)
            if pruned:
                found["margin_change"] = _mean(column(name) - column("dense_margin"), asked)
            continue
        found[name] = share_interval(column(name), asked)
        if pruned:
            of = "twin_" if name == "twin_accuracy" else ""
            found[f"{name}_change"] = share_difference_interval(column(f"{of}gained"), column(f"{of}lost"), asked)
    value, low, high = zip(*found.values(), strict=True)
    estimates = {"value": value, "low": low, "high": high}
    return {
        "metric": list(found),
        **{name: np.array(values) for name, values in estimates.items()},
        "n": int(twins["items"].sum()),
        "at_chance": at_chance(twins),
    }


def _mean(total: np.ndarray, number: np.ndarray) -> tuple[float, float, float]:
    """Return a mean over items with its interval over templates; without width if no template differs."""
    data = np.stack([total, number], axis=1)

    def mean(weights: np.ndarray) -> np.ndarray:
        sums = weights @ data
        return sums[..., :1] / sums[..., 1:]

    value, low, high = (float(part[0]) for part in unit_interval(mean, len(data)))
    if len(data) > 1 and np.ptp(total / number) <= 1e-12:
        return value, value, value
    return value, low, high
