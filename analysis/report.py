"""One self-contained page: what was found in plain words, then every figure with what it measures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from probes import DENSE
from pruning.files import write_text
from pruning.languages import language_name

from . import figures
from .frames import FRAMES, calibrated_recipes, of_recipe
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
        Of the model: blocks, and MLP neurons a block.
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
        _Shown(name, caption, base64.b64encode((figure_folder / f"{name}.png").read_bytes()).decode())
        for name, caption in _captions(frames, facts)
    ]
    html = environment.get_template("report.html.j2").render(
        study=facts.study,
        facts=facts,
        findings=list(findings(frames)),
        dense=_dense_table(frames["perplexity"], facts),
        figures=shown,
        specs=FRAMES,
        language_name=language_name,
        sets=facts.study.calibration_sets(),
        recipes=facts.study.all_recipes(),
    )
    write_text(path, html)


def findings(frames: Frames) -> Iterator[str]:
    """Yield what the frames say, in plain sentences; every number is computed here from the frames."""
    perplexity = _metric(frames["perplexity"], "perplexity")
    dense = perplexity[perplexity["method"] == DENSE].set_index("language")["value"]
    yield (
        f"Before pruning the model predicts {language_name(dense.idxmin())} best (perplexity {dense.min():.1f}) "
        f"and {language_name(dense.idxmax())} worst ({dense.max():.1f})."
    )
    for sparsity in sorted(set(perplexity["sparsity"]) - {0.0}):
        rises = []
        for method, rows in perplexity[perplexity["sparsity"] == sparsity].groupby("method", observed=True):
            ratio = rows["value"].to_numpy() / dense.loc[rows["language"].astype(str)].to_numpy()
            rises.append(f"{np.exp(np.log(ratio).mean()):.2f} times with {method}")
        yield f"At sparsity {sparsity:g} perplexity rises to {' and '.join(rises)} (geometric mean over languages and calibration sets)."
    for recipe in calibrated_recipes(perplexity):
        yield from _calibration_findings(frames, recipe)


def _calibration_findings(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    name = figures.recipe_label(recipe)
    own, total = _own_language_best(of_recipe(_metric(frames["perplexity"], "perplexity"), recipe), lowest=True)
    residual = of_recipe(frames["signal"], {**recipe, "metric": "snr_db", "role": "residual"})
    last = residual[residual["layer"] == residual["layer"].max()]
    signal_own, signal_total = _own_language_best(last, lowest=False)
    if total:
        yield (
            f"{name}: among the models calibrated on a single language, the one calibrated on the evaluated language has the lowest perplexity in "
            f"{own} of {total} languages, and the clearest signal after the last block in {signal_own} of {signal_total}."
        )
    parts = of_recipe(frames["subspaces"], recipe)
    means = parts.groupby("metric", observed=True)["value"].median()
    specific, agnostic = means["specific_error_centred"], means["agnostic_error_centred"]
    less, more = sorted((specific, agnostic))
    kept_better = "language-agnostic" if agnostic < specific else "language-specific"
    yield (
        f"{name}: relative to its own spread the {kept_better} part of the hidden states is kept better "
        f"(median relative error {less:.3f} against {more:.3f} over layers, languages and calibration sets)."
    )
    overlap = of_recipe(frames["mask_overlap"], recipe)
    if len(overlap):
        iou, chance = _metric(overlap, "iou"), _metric(overlap, "iou_chance")["value"].mean()
        same = iou["calibration"].astype(str) == iou["other_calibration"].astype(str)
        ceiling = f"; the same language with another seed gives {iou['value'][same].mean():.3f}" if same.any() else ""
        by_role = iou[~same].groupby("role", observed=True)["value"].mean()
        yield (
            f"{name}: masks of different calibration sets overlap with IoU {iou['value'][~same].mean():.3f} on average "
            f"(independent masks: {chance:.3f}{ceiling}); the least stable role is {by_role.idxmin()} ({by_role.min():.3f}), "
            f"the most stable {by_role.idxmax()} ({by_role.max():.3f})."
        )
    sets = of_recipe(frames["language_neurons"], recipe).groupby("metric", observed=True)["value"].sum()
    before = sets["kept"] + sets["lost"]
    if before:
        yield (
            f"{name}: {sets['kept'] / before:.0%} of the dense model's language-specific neurons are still selected after pruning, "
            f"and {sets['still_firing'] / before:.0%} still fire above the dense model's threshold (over all languages and calibration sets)."
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


def _captions(frames: Frames, facts: ReportFacts) -> Iterator[tuple[str, str]]:
    segments, tokens = facts.study.evaluation.segments, facts.heldout_tokens
    text = (
        f"{segments} held-out segments a language ({min(tokens.values())}–{max(tokens.values())} tokens), "
        "none of them seen in calibration or fitting"
    )
    fit = facts.study.evaluation.fit_segments
    for sparsity in sorted(set(frames["perplexity"]["sparsity"]) - {0.0}):
        yield (
            f"perplexity-{sparsity:g}",
            f"Perplexity of every model in every language on {text}. Colour: how often perplexity doubled over the dense model. "
            "Intervals are in the frame perplexity; perplexities of different languages do not compare, bits per byte do.",
        )
    overlap = [_slug(recipe) for recipe in calibrated_recipes(frames["mask_overlap"])]
    for recipe in calibrated_recipes(frames["signal"]):
        name = _slug(recipe)
        yield (
            f"signal-{name}",
            f"Signal-to-noise ratio of the residual stream after each block, dense against pruned model, on {text}; special tokens left out. "
            "Bands: 95 % bootstrap intervals over segments. Higher is better; at 0 dB the error is as large as the signal. "
            "Dotted: another seed of the same calibration set.",
        )
        yield (
            f"signal-roles-{name}",
            "The same for the output of each projection and the residual stream, mean over the languages.",
        )
        yield (
            f"subspaces-{name}",
            f"LSAR: relative error of the language-specific and of the language-agnostic part of segment means, each relative to its own "
            f"spread around the language's mean. Subspaces of {_rank(facts)} dimensions, fitted on the dense model with {fit} parallel segments a language; "
            f"errors on {text}. Line: mean over calibration sets; band: lowest to highest. Errors relative to the whole signal are in the frame.",
        )
        if name in overlap:
            yield (
                f"mask-overlap-{name}",
                "Intersection over union of the kept weights. Top: every pair of calibration sets, mean over layers and roles. Bottom: by layer, "
                "for each role; blue: pairs of different languages (mean, lowest, highest), red: same language with another seed, "
                "which is the most that can be expected; dashed: independent masks.",
            )
        yield (
            f"language-neurons-{name}",
            f"LAPE: language-specific neurons, the 1 % of all {facts.blocks * facts.neurons:,} MLP neurons with the lowest entropy of firing over languages, "
            f"counted for every language in which they fire above the 95 % quantile. Left: dense model. Right: share still selected in the pruned model. "
            f"Firing was counted on {text}: with so few tokens rare neurons are uncertain.",
        )


def _rank(facts: ReportFacts) -> int:
    return facts.study.evaluation.rank or len(facts.study.languages) - 1


def _slug(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['method']}-{recipe['sparsity']:g}-{recipe['pattern']}-{recipe['propagation']}"


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
