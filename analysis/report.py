"""One self-contained page: what was found in plain words, then every figure with what it measures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from probes import DENSE
from pruning.files import write_text
from pruning.languages import language_name

from . import figures
from .frames import FRAMES, of_recipe, recipes_of
from .study import Study

Frames = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class ReportFacts:
    """What the frames do not say.

    Attributes
    ----------
    study
        As resolved.
    heldout_tokens
        Tokens read of each language, special ones left out.
    blocks, neurons
        Of the model: blocks, and MLP neurons that were read in all.
    versions
        Of the libraries.
    """

    study: Study
    heldout_tokens: Mapping[str, int]
    blocks: int
    neurons: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class _Shown:
    section: str
    name: str
    caption: str
    image: str


def write_report(path: Path, frames: Frames, figure_folder: Path, facts: ReportFacts) -> None:
    """Write ``report.html``: no other file and no network is needed to read it."""
    environment = Environment(
        loader=PackageLoader("analysis", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["digits"] = figures.three_digits
    shown = [
        _Shown(section, name, caption, base64.b64encode((figure_folder / f"{name}.png").read_bytes()).decode())
        for section, name, caption in _captions(frames, facts)
    ]
    html = environment.get_template("report.html.j2").render(
        study=facts.study,
        facts=facts,
        findings=list(findings(frames)),
        dense=_dense_table(frames["perplexity"], facts),
        sections=[(section, list(group)) for section, group in groupby(shown, key=lambda figure: figure.section)],
        specs=FRAMES,
        language_name=language_name,
        sets=facts.study.calibration_sets(),
        recipes=facts.study.all_recipes(),
    )
    write_text(path, html)


def findings(frames: Frames) -> Iterator[tuple[str, list[str]]]:
    """Yield what the frames say of all models and of each recipe, in plain sentences computed from the frames."""
    perplexity = _metric(frames["perplexity"], "perplexity")
    dense = perplexity[perplexity["method"] == DENSE].set_index("language")["value"]
    best, worst = str(dense.idxmin()), str(dense.idxmax())
    before = (
        f"Before pruning the model predicts {language_name(best)} best (perplexity {dense.min():.1f}) "
        f"and {language_name(worst)} worst ({dense.max():.1f})."
    )
    factors = []
    for recipe in recipes_of(perplexity):
        rows = of_recipe(perplexity, recipe)
        ratio = rows["value"].to_numpy() / dense.loc[rows["language"].astype(str)].to_numpy()
        factors.append(f"{np.exp(np.log(ratio).mean()):.2f} ({figures.recipe_label(recipe)})")
    after = (
        f"Pruning multiplies perplexity by {', '.join(factors)}: geometric means over languages and calibration sets."
    )
    yield "All models", [before, after]
    for recipe in recipes_of(perplexity):
        yield figures.recipe_label(recipe).capitalize(), list(_recipe_findings(frames, recipe))


def _recipe_findings(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    own, total = _own_language_best(of_recipe(_metric(frames["perplexity"], "perplexity"), recipe), lowest=True)
    residual = of_recipe(frames["signal"], {**recipe, "metric": "snr_db", "role": "residual"})
    last = residual[residual["layer"] == residual["layer"].max()]
    signal_own, _ = _own_language_best(last, lowest=False)
    if total:
        yield (
            f"Of the models calibrated on one language, the one calibrated on the evaluated language has the lowest "
            f"perplexity in {own} of {total} languages, and the clearest signal after the last block in "
            f"{signal_own} of {total}."
        )
    errors = of_recipe(frames["subspaces"], recipe).groupby("metric", observed=True)["value"].median()
    specific, agnostic = errors["specific_error_centred"], errors["agnostic_error_centred"]
    yield (
        f"Relative to its own spread the language-{'agnostic' if agnostic < specific else 'specific'} part of the "
        f"hidden states is kept better: median squared error {specific:.2g} (specific) and {agnostic:.2g} (agnostic) "
        "over layers, languages and calibration sets."
    )
    overlap = of_recipe(frames["mask_overlap"], recipe)
    if len(overlap):
        iou, chance = _metric(overlap, "iou"), _metric(overlap, "iou_chance")["value"].mean()
        same = (iou["calibration"].astype(str) == iou["other_calibration"].astype(str)).to_numpy()
        if same.any():
            yield (
                f"Masks of the same calibration set drawn with another seed overlap with a mean IoU of "
                f"{iou['value'][same].mean():.3f} (independent masks {chance:.3f})."
            )
        if not same.all():
            by_role = iou[~same].groupby("role", observed=True)["value"].mean()
            yield (
                f"Masks of different calibration sets overlap with a mean IoU of {iou['value'][~same].mean():.3f} "
                f"(independent masks {chance:.3f}); the least stable role is {by_role.idxmin()} "
                f"({by_role.min():.3f}), the most stable {by_role.idxmax()} ({by_role.max():.3f})."
            )
    sets = of_recipe(frames["language_neurons"], recipe).groupby("metric", observed=True)["value"].sum()
    before = sets.get("kept", 0) + sets.get("lost", 0)
    if before:
        yield (
            f"{sets['kept'] / before:.0%} of the dense model's language-specific neurons are selected again after "
            f"pruning, and {sets['still_firing'] / before:.0%} still fire above the dense model's threshold."
        )


def _own_language_best(rows: pd.DataFrame, *, lowest: bool) -> tuple[int, int]:
    """Count languages whose own calibration gives the best value among single-language calibration sets of seed 0."""
    languages = set(rows["language"].astype(str))
    single = rows[rows["calibration"].astype(str).isin(languages) & (rows["seed"] == 0)]
    table = single.pivot_table(index="calibration", columns="language", values="value", observed=True)
    if len(table) < 2:
        return 0, 0
    best = table.idxmin() if lowest else table.idxmax()
    own = [lang for lang in table.columns if lang in table.index]
    return sum(best[lang] == lang for lang in own), len(own)


def _captions(frames: Frames, facts: ReportFacts) -> Iterator[tuple[str, str, str]]:
    """Yield section and name of every figure with a caption that says what was measured on how much text."""
    tokens = facts.heldout_tokens.values()
    text = (
        f"{facts.study.evaluation.segments} held-out segments a language ({min(tokens)} to {max(tokens)} tokens) "
        "that neither calibration nor fitting has seen"
    )
    yield (
        "All models",
        "perplexity",
        f"Perplexity of every model in every language on {text}. Colour: how often it doubled over the dense model. "
        "Intervals are in the frame. Perplexities of different languages do not compare; bits per byte do.",
    )
    overlap = [figures.recipe_slug(recipe) for recipe in recipes_of(frames["mask_overlap"])]
    for recipe in recipes_of(frames["signal"]):
        name, section = figures.recipe_slug(recipe), figures.recipe_label(recipe).capitalize()
        yield (
            section,
            f"signal-{name}",
            f"Signal-to-noise ratio of the residual stream after each block, pruned against dense model, on {text}; "
            "special tokens left out. Higher is better; at 0 dB the error is as large as the signal. Bands: 95 % "
            "bootstrap intervals over segments. Dotted: another seed of the same calibration set.",
        )
        yield (
            section,
            f"signal-roles-{name}",
            "The same for the output of each projection and the residual stream, mean over the languages.",
        )
        yield (
            section,
            f"subspaces-{name}",
            "LSAR: squared error of the language-specific and of the language-agnostic part of segment means, each "
            "relative to its own spread around the dense model's mean over languages, so that the component common to "
            f"all text hides nothing. Subspaces of {_rank(facts)} dimensions, fitted on the dense model with "
            f"{facts.study.evaluation.fit_segments} parallel segments a language; errors on {text}. Line: mean over "
            "calibration sets; band: lowest to highest. Errors relative to the whole signal are in the frame.",
        )
        if name in overlap:
            yield (
                section,
                f"mask-overlap-{name}",
                "Intersection over union of the kept weights. Top: every pair of calibration sets, mean over layers "
                "and roles. Bottom: by layer for each role; blue: different sets (mean, lowest, "
                "highest), red: the same set with another seed, the most that can be expected; dashed: independent "
                "masks.",
            )
        if facts.neurons:
            yield (
                section,
                f"language-neurons-{name}",
                f"LAPE: language-specific neurons, the 1 % of all {facts.neurons:,} MLP neurons with lowest entropy "
                "of firing over languages, counted for every language in which they fire above the 95 % quantile. "
                "Left: dense model. Right: share of them selected again in the pruned model. Firing was counted "
                f"on {text}; with so little text rare neurons are uncertain.",
            )


def _rank(facts: ReportFacts) -> int:
    return facts.study.evaluation.rank or len(facts.study.languages) - 1


def _metric(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    return frame[frame["metric"] == metric]


def _dense_table(frame: pd.DataFrame, facts: ReportFacts) -> list[dict[str, Any]]:
    dense = frame[frame["method"] == DENSE]
    rows = []
    for language in facts.study.languages:
        own = dense[dense["language"] == language].set_index("metric")
        rows.append(
            {
                "language": language,
                "perplexity": own.loc["perplexity"].to_dict(),
                "bits": own.loc["bits_per_byte"].to_dict(),
                "tokens": facts.heldout_tokens[language],
            }
        )
    return rows
