"""Which tables a study has for papers, with their captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from typing import Any

import pandas as pd

from probes import DENSE
from pruning.recipes import UNCALIBRATED

from ..frames import ALL, RECIPE_COLUMNS, Frames, labels, of_recipe, recipes_of
from ..metrics import mask_overlap
from ..metrics.contrasts import OTHERS
from .by_calibration import Look, language_table, set_table
from .catalogue import ALL_MODELS, section_of
from .cells import Cell, ReportTable, Row, Table, interval, number
from .effects import against_own, own_effects, own_task_effects
from .facts import ReportFacts, described_text, from_to
from .tables import dense_table

Recipe = Mapping[str, Any]
#: Name, title, caption, and what makes the table.
_Entry = tuple[str, str, str, Callable[[], Table]]

_PERPLEXITY = Look(2, "low")
_BITS = Look(3, "low", mean=True)
_ACCURACY = Look(1, "high", scale=100.0, mean=True)
_SNR = Look(2, "high", mean=True)
_ERROR = Look(3, "low", mean=True)


def study_tables(frames: Frames, facts: ReportFacts) -> Iterator[ReportTable]:
    """Yield every table that the frames have data for, in the order of the report; no two have the same name."""
    taken: dict[str, int] = {}
    for table in _tables(frames, facts):  # two categories may differ in signs that file names do not have
        taken[table.name] = taken.get(table.name, 0) + 1
        yield replace(table, name=f"{table.name}-{taken[table.name]}") if taken[table.name] > 1 else table


def _tables(frames: Frames, facts: ReportFacts) -> Iterator[ReportTable]:
    text = described_text(facts, labels.encoder_blocks(frames["signal"]))
    yield ReportTable(
        ALL_MODELS,
        "dense",
        "The dense model",
        f"Perplexity and bits per byte of UTF-8 text of {_model(facts)}, with 95 % bootstrap intervals over segments, "
        f"on {text}.",
        lambda: _dense(frames, facts),
    )
    for recipe in recipes_of(frames["perplexity"]):
        for name, title, caption, make in _of_recipe(frames, facts, recipe, text):
            yield ReportTable(section_of(recipe), f"{name}-{labels.recipe_slug(recipe)}", title, caption, make)


def _of_recipe(frames: Frames, facts: ReportFacts, recipe: Recipe, text: str) -> Iterator[_Entry]:
    what = f"{_model(facts)}, {labels.recipe_label(recipe)}"
    rows = of_recipe(frames["perplexity"], recipe)
    draws = rows.astype({"calibration": str}).groupby("calibration")["seed"].nunique()
    shared = mask_overlap.draws_share(of_recipe(frames["mask_overlap"], recipe))
    how = _how_to_read(draws, shared, [str(language) for language in rows["language"].unique()])
    calibrated = recipe["propagation"] != UNCALIBRATED
    by = f"by {'calibration set (rows) and ' * calibrated}evaluation language{' (columns)' * calibrated}"
    yield from _of_text(frames, recipe, f"{what}, {by}, on {text}. {how}".rstrip())
    yield from _of_tasks(frames["accuracy"], recipe, f"{what}, {by}. {how}".rstrip())
    if len(own := of_recipe(frames["mask_overlap"], recipe)):
        metric = "code_agreement" if labels.quantized(recipe) else "iou"
        if (own["metric"] == metric).any():
            yield _overlap(own, metric, what, draws)
    yield from _effects(frames, recipe, what, text)


def _of_text(frames: Frames, recipe: Recipe, place: str) -> Iterator[_Entry]:
    """Yield the tables of what was measured on held-out text."""
    perplexity, signal, subspaces = frames["perplexity"], frames["signal"], frames["subspaces"]
    yield (
        "perplexity",
        "Perplexity",
        f"Perplexity of {place} Perplexities are not comparable between languages.",
        lambda: _measured(perplexity, recipe, "perplexity", _PERPLEXITY),
    )
    yield (
        "bits-per-byte",
        "Bits per byte",
        f"Bits per byte of UTF-8 text of {place}",
        lambda: _measured(perplexity, recipe, "bits_per_byte", _BITS),
    )
    if len(of_recipe(signal, recipe)):
        yield (
            "snr",
            "SNR after the last block",
            "Signal-to-noise ratio (dB) of the residual stream after the last block, relative to the dense model: "
            f"{place}",
            lambda: _measured(_last(signal), recipe, "snr_db", _SNR),
        )
    for part in ("specific", "agnostic"):
        metric = f"{part}_error_centred"
        if (of_recipe(subspaces, recipe)["metric"] == metric).any():
            yield (
                f"{part}-error",
                f"Error of the language-{part} part",
                f"LSAR: squared error of the language-{part} part of segment means, relative to its own spread in the "
                f"dense model, median over layers, of {place}",
                partial(_error, subspaces, recipe, metric),
            )


def _of_tasks(accuracy: pd.DataFrame, recipe: Recipe, place: str) -> Iterator[_Entry]:
    """Yield the tables of accuracy: one a category of a task, and one a benchmark of the harness."""
    for benchmark, asked in benchmarks(accuracy[accuracy["part"] == ALL]):
        metric = "twin_accuracy" if (asked["metric"] == "twin_accuracy").any() else "accuracy"
        own = pooled(asked[asked["metric"] == metric])
        if not len(of_recipe(own, recipe)):
            continue
        sort = "Accuracy on minimal pairs" if metric == "twin_accuracy" else "Accuracy"
        items = from_to(own.loc[own["method"] == DENSE, "n"])
        chance = (
            " †: the dense model is not shown to be above chance there; nothing can be lost, and nothing is underlined."
            if own["at_chance"].any()
            else ""
        )
        yield (
            f"accuracy-{labels.slug('-'.join(benchmark))}",
            f"{sort}, {': '.join(benchmark)}",
            f"{sort} (%), {': '.join(benchmark)} ({items} items per language), of {place}{chance}",
            partial(_accuracy, own, recipe),
        )


def benchmarks(accuracy: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Yield the rows of each table of accuracy, and what to call it.

    A task in several languages has a table a category. The harness has a task a language instead (``xnli_sw``), and
    several may be one benchmark: tasks of one language go together by category, which is their benchmark's name.

    Parameters
    ----------
    accuracy
        Rows of whole categories.
    """
    rows = accuracy[accuracy["language"].notna()].astype(dict.fromkeys(("task", "category", "language"), str))
    languages = rows.groupby("task", sort=False)["language"].nunique()
    for task in languages.index[languages > 1]:
        own = rows[rows["task"] == task]
        for category in labels.categories_of(own):
            yield (task, category), own[own["category"] == category]
    single = rows[rows["task"].isin(languages.index[languages == 1])]
    for category in labels.categories_of(single):
        yield (category,), single[single["category"] == category]


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a model and language: the share of all items that are right, where a benchmark has several tasks.

    At chance only if all of the tasks are.
    """
    keys = [*RECIPE_COLUMNS[1:], "calibration", "seed", "language"]
    right = rows.assign(right=rows["value"] * rows["n"]).astype({"at_chance": bool})
    found = right.groupby(keys, observed=True, sort=False).agg({"right": "sum", "n": "sum", "at_chance": "all"})
    return found.assign(value=found["right"] / found["n"]).reset_index()


def _overlap(rows: pd.DataFrame, metric: str, what: str, draws: pd.Series) -> _Entry:
    chance = float(rows.loc[rows["metric"] == f"{metric}_chance", "value"].mean())
    name, said = {
        "iou": ("mask-overlap", "Intersection over union of the kept weights"),
        "code_agreement": ("code-agreement", "Share of equal codes"),
    }[metric]
    over, ceiling = "", "No set was drawn twice, so there is no ceiling."
    if (draws > 1).any():
        over = " and over pairs of draws (subscripts: standard deviations over these pairs, which share draws)"
        ceiling = f"Bold: two draws of one set, the ceiling ({labels.common_text(mask_overlap.draws_share(rows))})."
    return (
        name,
        said,
        f"{said} of two variants, by their calibration sets: {what}. Mean over layers and roles{over}. Chance: "
        f"{chance:.3f}. {ceiling}",
        lambda: set_table(rows[rows["metric"] == metric]),
    )


def _effects(frames: Frames, recipe: Recipe, what: str, text: str) -> Iterator[_Entry]:
    """Yield the tables of differences between a language's own calibration set and the others."""
    rows = of_recipe(frames["contrasts"], {**recipe, "metric": "log_perplexity"})
    tested = (
        "95 % intervals and p-values hold over segments and draws of the calibration text together"
        if rows["df"].notna().any()
        else "With one draw of each set there are neither intervals nor tests"
    )
    if (rows["other_calibration"] == OTHERS).any():
        yield (
            "own-language",
            "Own language against the others, perplexity",
            f"What calibrating on the evaluated language changes in its log perplexity (nat), beyond what the set "
            f"changes in the other languages: {what}, on {text}. Below zero, the own language helps. {tested}; p "
            "permutes whole calibration sets, so that with K sets none is below 1/K (all languages: 2/K!); corrected: "
            "Benjamini-Hochberg.",
            lambda: own_effects(rows[rows["other_calibration"] == OTHERS]),
        )
    pairs = rows[rows["other_calibration"] != OTHERS]
    own = {str(name) for name in pairs["language"].unique()} & {
        *map(str, pairs["calibration"]),
        *map(str, pairs["other_calibration"]),
    }
    if own:
        yield (
            "contrasts",
            "Each set against the language's own, perplexity",
            f"Log perplexity (nat) with each calibration set (rows) minus that with the evaluated language's own "
            f"(columns): {what}, on {text}. Above zero, the own language is better. {tested}; subscripts: half width "
            "of the interval; *: p < 0.05 (t-test, Benjamini-Hochberg correction). The CSV file has intervals and "
            "p-values.",
            lambda: against_own(pairs),
        )
    tasks = of_recipe(frames["task_contrasts"], {**recipe, "metric": "accuracy_drop", "part": ALL, "contrast": "own"})
    for task in tasks["task"].unique():
        of_task = tasks[tasks["task"] == task]
        yield (
            f"own-language-{labels.slug(str(task))}",
            f"Own language against the others, {task}",
            f"What models calibrated on the evaluated language lose more (above zero) or less (below zero) in accuracy "
            f"(points), relative to what they do in the other languages: {task}, {what}. 95 % intervals hold over "
            "templates and draws of the calibration text together; p permutes whole calibration sets; corrected: "
            "Benjamini-Hochberg. Languages in which the dense model is not shown to be above chance are left out.",
            partial(own_task_effects, of_task),
        )


def _model(facts: ReportFacts) -> str:
    """Return a model's name without the owner or the folder it lies in."""
    return PurePath(facts.model).name or facts.model


def _dense(frames: Frames, facts: ReportFacts) -> Table:
    found = {row["language"]: row for row in dense_table(frames["perplexity"], facts)}
    body: list[Row] = []
    numbers = []
    for row in (found[language] for language in labels.in_order(found)):
        perplexity, bits = row["perplexity"], row["bits"]
        numbers.append(
            {"language": row["language"]}
            | {"perplexity": perplexity["value"], "perplexity_low": perplexity["low"]}
            | {"perplexity_high": perplexity["high"], "bits_per_byte": bits["value"]}
            | {"bits_per_byte_low": bits["low"], "bits_per_byte_high": bits["high"], "tokens": row["tokens"]}
        )
        body.append(
            (
                Cell(row["language"]),
                number(perplexity["value"], decimals=2),
                interval(perplexity["low"], perplexity["high"], decimals=2),
                number(bits["value"], decimals=3),
                interval(bits["low"], bits["high"], decimals=3),
                Cell(str(row["tokens"])),
            )
        )
    head = ("language", "perplexity", "95 % interval", "bits per byte", "95 % interval", "tokens")
    return Table(pd.DataFrame(numbers), head, (tuple(body),))


def _measured(frame: pd.DataFrame, recipe: Recipe, metric: str, look: Look) -> Table:
    rows = frame[frame["metric"] == metric]
    dense = rows[rows["method"] == DENSE]
    before = dict(zip(dense["language"].astype(str), dense["value"], strict=True)) if len(dense) else None
    return language_table(of_recipe(rows, recipe), look, dense=before, uncalibrated=_uncalibrated(recipe))


def _accuracy(rows: pd.DataFrame, recipe: Recipe) -> Table:
    dense = rows[rows["method"] == DENSE].set_index("language")
    return language_table(
        of_recipe(rows, recipe),
        _ACCURACY,
        dense={str(name): float(value) for name, value in dense["value"].items()},
        at_chance=[str(name) for name, guessed in dense["at_chance"].items() if guessed],
        uncalibrated=_uncalibrated(recipe),
    )


def _last(signal: pd.DataFrame) -> pd.DataFrame:
    residual = signal[signal["role"] == "residual"]
    return residual[residual["layer"] == residual["layer"].max()]


def _error(subspaces: pd.DataFrame, recipe: Recipe, metric: str) -> Table:
    """Return the table of a part's error, median over layers."""
    keys = ["calibration", "seed", "language"]
    own = of_recipe(subspaces, {**recipe, "metric": metric})
    medians = own.groupby(keys, observed=True)["value"].median().reset_index()
    return language_table(medians, _ERROR, uncalibrated=_uncalibrated(recipe))


def _uncalibrated(recipe: Recipe) -> str:
    return labels.method_name(recipe["method"])


def _how_to_read(draws: pd.Series, shared: float, languages: list[str]) -> str:
    """Say what is the mean of what, and what is marked."""
    words = []
    if list(draws.index) != [UNCALIBRATED]:
        words.append(_drawn(draws))
        if shared:
            words.append(f"Draws share up to {shared:.0%} of their text, so that they vary less than independent ones.")
        if set(draws.index) & set(languages):
            words.append("Bold: calibrated on the evaluated language alone.")
        if len(draws) > 1:
            words.append("Underlined: best set of a column.")
    return " ".join(words)


def _drawn(draws: pd.Series) -> str:
    """Say how many draws of the calibration text means and standard deviations are over."""
    spread = "subscripts: standard deviations over draws"
    if draws.nunique() == 1:
        number_of = int(draws.iloc[0])
        return "One draw of each calibration set." if number_of == 1 else f"Means over {number_of} draws; {spread}."
    counts = [
        f"{', '.join(sorted(own.index, key=labels.calibration_rank))}: {n}"
        for n, own in sorted(draws.groupby(draws), key=lambda pair: pair[0])
    ]
    return f"Means over draws of the calibration text ({'; '.join(counts)}); {spread}, where there are several."
