"""How models, calibration sets, languages and numbers are named and ordered in figures and reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from probes import DENSE
from probes.items import CATEGORIES
from pruning.allocation import UNIFORM
from pruning.patterns import is_structure
from pruning.recipes import EVERYWHERE, UNCALIBRATED
from pruning.text.languages import language_name
from pruning.variants.store import CHANGED, QUANTIZED, UNKNOWN

from .schema import ALL, TEXT

#: The pattern of quantized models: bits of a code, and inputs that share a scale.
_GRID = re.compile(r"(\d)bit-(?:g(\d+)|row)")


def language_title(tag: str) -> str:
    """Return what figures write above the panel of a language."""
    return f"{language_name(tag)} ({tag})"


def in_order(languages: Iterable[str]) -> list[str]:
    """Return languages in the order that all figures use: alphabetical by tag."""
    return sorted(map(str, languages))


def calibration_rank(name: str) -> tuple[int, str]:
    """Sort key of calibration sets: uncalibrated, single languages, mixes, all."""
    if name == UNCALIBRATED:
        return 0, name
    if name == "all":
        return 3, name
    return (2, name) if "+" in name else (1, name)


def sets_of(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the calibration sets of some rows with their seeds, in the order that all figures use."""
    pairs = {(str(c), int(s)) for c, s in zip(rows["calibration"], rows["seed"], strict=True)}
    return sorted(pairs, key=lambda pair: (calibration_rank(pair[0]), pair[1]))


def set_label(calibration: str, seed: int) -> str:
    """Return how figures call a calibration set; the first seed goes without saying."""
    if calibration == UNCALIBRATED:
        return "no text"
    return str(calibration) if seed == 0 else f"{calibration} (seed {seed})"


def variant_rank(row: pd.Series) -> tuple[Any, ...]:
    """Sort key of models: the dense one, then by recipe, calibration set and seed."""
    recipe = [
        str(row["method"]),
        float(row["sparsity"]),
        *(str(row[name]) for name in ("pattern", "allocation", "scope", "propagation")),
        float(row["item_share"]),
    ]
    return row["method"] != DENSE, *recipe, calibration_rank(str(row["calibration"])), int(row["seed"])


#: How papers write the names of methods and of what follows them.
_METHOD_NAMES = {
    "admm": "ADMM",
    "awq": "AWQ",
    "block-influence": "block influence",
    "dsnot": "DSnoT",
    "flap": "FLAP",
    "gblm": "GBLM",
    "gptq": "GPTQ",
    "grasp": "GraSP",
    "m-wanda": "M-Wanda",
    "ria": "RIA",
    "rtn": "RTN",
    "snip": "SNIP",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
    "wanda-sp": "Wanda-sp",
}
_STEP = re.compile(r"(^|\+)([\w-]+)(?![^(]*\))")


def method_name(label: object) -> str:
    """Return how figures call a method; `label` is that of a frame, with what follows and non-default parameters.

    >>> method_name("ria(power=1)+swaps+admm(rounds=5)"), method_name("mine")
    ('RIA(power=1)+swaps+ADMM(rounds=5)', 'mine')
    """
    return _STEP.sub(lambda step: step[1] + _METHOD_NAMES.get(step[2], step[2]), str(label))


def variant_labels(frame: pd.DataFrame) -> list[str]:
    """Return how figures call the model of every row: as short as tells them apart."""
    calibrated = frame[frame["method"] != DENSE]
    several = {
        column: (calibrated.groupby("method", observed=True)[column].nunique() > 1).any()
        for column in ("pattern", "allocation", "scope", "propagation", "item_share")
    }
    labels = []
    for row in frame.to_dict("records"):
        if row["method"] == DENSE:
            labels.append(DENSE)
            continue
        grid = _GRID.fullmatch(str(row["pattern"]))
        words = [method_name(row["method"])]
        words += [f"{grid[1]} bits"] if grid else [] if maskless(row) else [f"{row['sparsity']:g}"]
        words += [_grouped(grid) if grid else _pattern_words(row["pattern"])] if several["pattern"] else []
        words += [f"{row['allocation']} allocation"] if several["allocation"] else []
        words += [f"in {row['scope']}"] if several["scope"] and row["scope"] != EVERYWHERE else []
        words += [f"{row['propagation']} propagation"] if several["propagation"] else []
        if row["calibration"] != UNCALIBRATED:
            words += ["·", set_label(row["calibration"], row["seed"])]
            words += [f"with {percent(row['item_share'])} items"] if several["item_share"] and row["item_share"] else []
        labels.append(" ".join(words))
    return labels


def recipe_label(recipe: Mapping[str, Any]) -> str:
    """Return a recipe in a few words; without a sparsity it is a series of recipes."""
    grid = _GRID.fullmatch(str(recipe["pattern"]))
    words = [method_name(recipe["method"])]
    if grid:
        words += [f"{grid[1]} bits", _grouped(grid)]
    else:
        words += [] if _no_sparsity(recipe) else [f"sparsity {recipe['sparsity']:g}"]
        words.append(_pattern_words(recipe["pattern"]))
    words += [f"{recipe['allocation']} allocation"] if recipe["allocation"] not in (UNIFORM, UNKNOWN) else []
    words += [f"in {recipe['scope']}"] if recipe["scope"] != EVERYWHERE else []
    words += ["dense propagation"] if recipe["propagation"] == "dense" else []
    words += [f"calibrated on {percent(recipe['item_share'])} items"] if recipe.get("item_share") else []
    return ", ".join(words)


def apart(names: Sequence[str]) -> dict[str, str]:
    """Return names of recipes without the words that all of them share.

    >>> apart(["Wanda, sparsity 0.5, per row", "RIA(power=1), sparsity 0.5, per row"])
    {'Wanda, sparsity 0.5, per row': 'Wanda', 'RIA(power=1), sparsity 0.5, per row': 'RIA(power=1)'}
    """
    words = {name: re.split(r", (?![^(]*\))", name) for name in names}
    shared = set.intersection(*(set(of) for of in words.values())) if len(words) > 1 else set()
    return {name: ", ".join(word for word in of if word not in shared) or name for name, of in words.items()}


def recipe_slug(recipe: Mapping[str, Any]) -> str:
    """Return a recipe's part of a figure's file name."""
    sparsity = [] if _no_sparsity(recipe) else [f"{recipe['sparsity']:g}"]
    words = [str(recipe["method"]), *sparsity, str(recipe["pattern"]).replace(":", "of")]
    words += [str(recipe["allocation"])] if recipe["allocation"] not in (UNIFORM, UNKNOWN) else []
    words += [str(recipe["scope"])] if recipe["scope"] != EVERYWHERE else []
    words.append(str(recipe["propagation"]))
    words += [f"items={recipe['item_share']:g}"] if recipe.get("item_share") else []
    return slug("-".join(words))


def slug(text: str) -> str:
    """Return text as part of a file's name."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def quantized(recipe: Mapping[str, Any]) -> bool:
    """Whether models were quantized, here or elsewhere."""
    return str(recipe["pattern"]) == QUANTIZED or _GRID.fullmatch(str(recipe["pattern"])) is not None


def maskless(recipe: Mapping[str, Any]) -> bool:
    """Whether models have no masks: they were quantized, or all their weights were changed elsewhere."""
    return str(recipe["pattern"]) == CHANGED or quantized(recipe)


def _no_sparsity(recipe: Mapping[str, Any]) -> bool:
    return maskless(recipe) or "sparsity" not in recipe


def _grouped(grid: re.Match[str]) -> str:
    return f"groups of {grid[2]}" if grid[2] else "one scale per row"


def _pattern_words(pattern: object) -> str:
    elsewhere = {UNKNOWN: "pruned elsewhere", CHANGED: "changed elsewhere", QUANTIZED: "quantized elsewhere"}
    if str(pattern) in elsewhere:
        return elsewhere[str(pattern)]
    if is_structure(str(pattern)):
        return f"whole {str(pattern).replace('+', ' and ')}"
    return str(pattern) if ":" in str(pattern) else f"per {pattern}"


def three_digits(value: float) -> str:
    """Return a number as short as it can be read.

    >>> three_digits(23.456), three_digits(1234.5), three_digits(98765.0)
    ('23.5', '1234', '99k')
    """
    if value < 100:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k"


def short(value: float) -> str:
    """Return a factor with as many digits as can be read at a glance.

    >>> short(1.234), short(123.4), short(1.2e29)
    ('1.23', '123', '1.2e+29')
    """
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.0f}" if value < 1e5 else f"{value:.2g}"


def percent(share: float) -> str:
    """Return a share as short as it can be read.

    >>> percent(0.5), percent(0.125), percent(1.0)
    ('50%', '12.5%', '100%')
    """
    return f"{100 * share:.3g}%"


def common_text(share: float) -> str:
    """Return how much text draws of one calibration set have in common, in words.

    >>> common_text(0.0), common_text(0.234)
    ('draws share no text', 'draws share up to 23% of their text, which lifts it')
    """
    return f"draws share up to {share:.0%} of their text, which lifts it" if share else "draws share no text"


def encoder_blocks(frame: pd.DataFrame) -> int:
    """Return how many of a model's blocks are an encoder's: those before the first with cross-attention.

    Parameters
    ----------
    frame
        One with layers and roles of the whole model, such as ``signal``.
    """
    crossing = frame.loc[frame["role"].astype(str).str.startswith("cross_"), "layer"]
    return int(crossing.min()) if len(crossing) else 0


def layer_label(name: str, encoder: int) -> str:
    """Return the label of an axis of blocks, which are numbered through both stacks of an encoder-decoder.

    >>> layer_label("layer", 0), layer_label("layer", 12)
    ('layer', 'layer (encoder: 0-11, decoder: from 12)')
    """
    return f"{name} (encoder: 0-{encoder - 1}, decoder: from {encoder})" if encoder else name


def categories_of(frame: pd.DataFrame) -> list[str]:
    """Return the categories of a frame, the bundled ones in their own order, others after them."""
    there = list(dict.fromkeys(frame["category"].dropna().astype(str)))
    return [c for c in CATEGORIES if c in there] + sorted(c for c in there if c not in CATEGORIES)


def category_label(category: str) -> str:
    """Return how figures and reports call the category of a diagnosis."""
    return {TEXT: "the text", ALL: "all items"}.get(category, category)
