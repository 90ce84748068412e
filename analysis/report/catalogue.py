"""Every figure of a study: its section in the report, its name, its caption, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pruning import CalibrationSet, Recipe
from pruning.recipes import UNCALIBRATED
from pruning.text.languages import named

from .. import plots
from ..frames import labels, of_recipe, recipes_of
from ..metrics import recovery
from ..metrics.contrasts import OTHERS

Frames = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class ReportFacts:
    """What the frames do not say.

    Attributes
    ----------
    model
        Its name.
    languages
        That were evaluated.
    sets, recipes
        Calibration sets and recipes of the variants.
    imported
        Name to source of each model that was pruned elsewhere.
    segments, fit_segments
        Held-out segments, and segments that subspaces were fitted on, of each language.
    rank
        Dimensions of the language-specific subspaces.
    heldout_tokens
        Tokens read of each language, special ones left out.
    blocks, neurons
        Of the model: blocks, and MLP neurons that were read in all.
    versions
        Of the libraries.
    """

    model: str
    languages: Sequence[str]
    sets: Sequence[CalibrationSet]
    recipes: Sequence[Recipe]
    imported: Mapping[str, str]
    segments: int
    fit_segments: int
    rank: int
    heldout_tokens: Mapping[str, int]
    blocks: int
    neurons: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the report.

    Attributes
    ----------
    section
        Heading under which it stands.
    name
        Of its files, without ending.
    caption
        What was measured, on how much text, and how to read it.
    draw
        Makes the figure.
    """

    section: str
    name: str
    caption: str
    draw: Callable[[], Figure]


ALL_MODELS = "All models"


def section_of(recipe: Mapping[str, Any]) -> str:
    """Return the heading of a recipe's section."""
    label = labels.recipe_label(recipe)
    return label[0].upper() + label[1:]


def study_figures(frames: Frames, facts: ReportFacts) -> Iterator[ReportFigure]:
    """Yield every figure that the frames have data for, in the order of the report."""
    text = _text(facts)
    yield ReportFigure(
        ALL_MODELS,
        "perplexity",
        f"Perplexity of every model in every language on {text}. Colour: how often it doubled over the dense model. "
        "Perplexities of different languages do not compare; bits per byte do.",
        lambda: plots.perplexity.all_models(frames["perplexity"]),
    )
    for recipe in recipes_of(frames["signal"]):
        for name, caption, draw in _of_recipe(frames, facts, recipe, text):
            yield ReportFigure(section_of(recipe), f"{name}-{labels.recipe_slug(recipe)}", caption, draw)


def _of_recipe(
    frames: Frames, facts: ReportFacts, recipe: Mapping[str, Any], text: str
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    def drawing(plot: Callable[..., Figure], frame: str, **more: Any) -> Callable[[], Figure]:
        return lambda: plot(frames[frame], recipe, **more)

    calibrated = recipe["propagation"] != UNCALIBRATED
    several = len(of_recipe(frames["mask_overlap"], recipe)) > 0
    if calibrated:
        yield (
            "perplexity-matrix",
            f"Perplexity by calibration set (rows) and evaluation language (columns) on {text}, with 95 % bootstrap "
            "intervals over segments. Colour: how often it doubled over the dense model.",
            drawing(plots.perplexity.matrix, "perplexity"),
        )
        yield (
            "bits-per-byte",
            "The same in bits per byte of UTF-8 text, which compare between languages.",
            drawing(plots.perplexity.matrix, "perplexity", metric="bits_per_byte"),
        )
    compared = of_recipe(frames["contrasts"], recipe)
    if (compared["other_calibration"] != OTHERS).any():
        yield (
            "contrasts",
            "What another calibration text changes in log perplexity: every set minus the evaluated language's own, "
            "the same segments paired, with 95 % bootstrap intervals; right of zero is worse. Grey: what another draw "
            "of the same text changes (none is drawn where no set has two seeds). Filled: the part beyond that margin "
            "has a permutation p < 0.05 after Benjamini and Hochberg's correction. SNR and the errors of both parts "
            "are compared likewise in the frame contrasts.",
            drawing(plots.contrasts.effects, "contrasts"),
        )
    asked = of_recipe(frames["accuracy"], recipe)
    for task in asked["task"].unique():
        metrics = set(asked.loc[asked["task"] == task, "metric"])
        metric = "twin_accuracy_change" if "twin_accuracy_change" in metrics else "accuracy_change"
        what = (
            "pairs of twins (two questions with the same choices and different answers) whose margins have a positive "
            "sum, so that what a model prefers whatever it is asked cancels"
            if metric.startswith("twin")
            else "questions answered right"
        )
        yield (
            f"questions-{labels.slug(str(task))}",
            f"Task {task}: share of {what}, after minus before pruning, each question compared with itself; all "
            "languages together. Bars: 95 % bootstrap intervals, a question drawn with its twin and translations.",
            drawing(plots.accuracy.categories, "accuracy", task=str(task), metric=metric),
        )
        if several:
            yield (
                f"questions-matrix-{labels.slug(str(task))}",
                f"The same share of {task} by calibration set and evaluation language; red: less than before pruning.",
                drawing(plots.accuracy.matrix, "accuracy", task=str(task), metric=metric),
            )
    yield (
        "signal",
        f"Signal-to-noise ratio of the residual stream after each block, pruned against dense model, on {text}; "
        "special tokens left out. Higher is better; at 0 dB the error is as large as the signal. Bands: 95 % "
        "bootstrap intervals over segments. Dotted: another seed of the same calibration set.",
        drawing(plots.signal.layers, "signal"),
    )
    if several:
        yield (
            "signal-matrix",
            "The same after the last block, by calibration set and evaluation language.",
            drawing(plots.signal.matrix, "signal"),
        )
    yield (
        "signal-roles",
        "The same for the output of each projection and the residual stream, mean over the languages.",
        drawing(plots.signal.roles, "signal"),
    )
    yield (
        "subspaces",
        "LSAR: squared error of the language-specific and of the language-agnostic part of segment means, each "
        "relative to its own spread around the dense model's mean over languages, so that the component common to "
        f"all text hides nothing. Subspaces of {facts.rank} dimensions, fitted on the dense model with "
        f"{facts.fit_segments} parallel segments a language; errors on {text}. Line: mean over "
        "calibration sets; band: lowest to highest. Errors relative to the whole signal, and per dimension, are in "
        "the frame.",
        drawing(plots.lsar.layers, "subspaces"),
    )
    if several:
        yield (
            "subspaces-matrix",
            "The same errors, median over layers, by calibration set and evaluation language. Rows that are alike mean "
            "that the calibration language does not matter to that part.",
            drawing(plots.lsar.matrix, "subspaces"),
        )
    yield (
        "subspaces-knowledge",
        "Proof of what the parts hold. Left: how well a logistic regression tells the language from each part, fitted "
        "on one half of the held-out segments and tested on the other. Middle: how often the nearest segment of "
        "another language is the translation (held-out segments that all languages share). Right: share of the "
        "variance between languages that a subspace of each rank takes in. Means over languages; bands: lowest to "
        "highest over calibration sets, right over layers.",
        drawing(plots.lsar.knowledge, "subspaces"),
    )
    if several:
        yield (
            "mask-overlap",
            "Intersection over union of the kept weights for every pair of calibration sets, mean over layers and "
            "roles; right: sets clustered by mask distance (average linkage).",
            drawing(plots.mask_overlap.heatmap, "mask_overlap"),
        )
        yield (
            "mask-overlap-roles",
            "The same by layer for each role: different sets (mean, lowest to highest), and the same set with another "
            "seed, the most that can be expected; dashed: independent masks.",
            drawing(plots.mask_overlap.roles, "mask_overlap"),
        )
        overlap = of_recipe(frames["mask_overlap"], recipe)
        if (overlap["metric"] == "correction_cosine").any():
            yield (
                "corrections",
                "What the method added to the weights that both of two variants keep: cosine of the corrections by "
                "layer for each role, 1 if they agree, 0 if they have nothing to do with each other.",
                drawing(plots.mask_overlap.roles, "mask_overlap", metric="correction_cosine"),
            )
    chosen = of_recipe(frames["neuron_selection"], recipe)
    if (chosen["metric"] == "kept_share").any():
        yield (
            "neurons-kept",
            f"LAPE: language-specific neurons, the 1 % of all {facts.neurons:,} MLP neurons with lowest entropy of "
            "firing over languages, counted for every language in which they fire above the 95 % quantile: share of "
            "the dense model's that are selected again in the pruned model. Below: share that the dense model itself "
            "selects again on the other half of the text, which is what so little text allows for, and what a draw at "
            f"random would give. Firing was counted on {text}.",
            drawing(plots.lape.kept, "neuron_selection"),
        )
    if facts.neurons:
        yield (
            "neurons-layers",
            "Where these neurons are: of the dense model's those kept and lost, those gained, and those of the dense "
            "model's that still fire above its threshold. Dashed: all of the dense model's.",
            drawing(plots.lape.layers, "language_neurons"),
        )
        yield (
            "neurons-entropy",
            "Distribution of LAPE over all neurons that fire, dense and pruned; right: its lowest twentieth, where "
            "language-specific neurons are.",
            drawing(plots.lape.entropy, "neuron_entropy"),
        )
        yield (
            "neurons-shift",
            "How much more or less often neurons fire after pruning, by how often they fired in the dense model; "
            "language-specific neurons of the dense model against all others. Lines: means over calibration sets; "
            "bands: lowest to highest.",
            drawing(plots.lape.shift, "neuron_shift"),
        )


def _text(facts: ReportFacts) -> str:
    tokens = facts.heldout_tokens.values()
    return (
        f"{facts.segments} held-out segments a language ({min(tokens)} to {max(tokens)} tokens) "
        "that neither calibration nor fitting has seen"
    )


def diagnosis_figures(
    frame: pd.DataFrame, *, section: str, name: str, variant: str, language: str, category: str
) -> Iterator[ReportFigure]:
    """Yield the figures of one diagnosis; none if nothing was lost.

    Parameters
    ----------
    frame
        Its frame ``recovery``.
    section
        Heading under which they stand.
    name
        Of the diagnosis, as part of file names.
    variant, language, category
        What was diagnosed.
    """
    if not len(recovery.importance(frame)):
        return
    what = f"{category} in {named(language)}, n = {int(frame['n'].max())}"
    yield ReportFigure(
        section,
        f"diagnosis-curves-{name}",
        f"What comes back when the dense model's residual stream is put into {variant} after one block "
        f"({what}): the whole stream, its language-specific part (LSAR, fitted on the dense model), the rest, and a "
        "random subspace of the specific one's size. 1 is all that was lost. Bands: 95 % bootstrap intervals over "
        "items, twins drawn together.",
        lambda: plots.recovery.curves(frame),
    )
    yield ReportFigure(
        section,
        f"diagnosis-map-{name}",
        f"Share of the loss that each role of each block brings back ({what}), in per cent, estimated from gradients "
        "(attribution): left with its own mask undone, right with the dense model's output in its place, which undoes "
        "what came in damaged too. Shares do not add up to 100.",
        lambda: plots.recovery.heatmap(frame),
    )
    yield ReportFigure(
        section,
        f"diagnosis-causes-{name}",
        f"The likeliest causes, put over exactly one at a time ({what}). Left: the dense model's put into the pruned "
        "model. Right: the pruned model's put into the dense one. Both as a share of the same loss, with 95 % "
        "bootstrap intervals over items.",
        lambda: plots.recovery.causes(frame),
    )
