"""Every figure of a study: its section in the report, its name, its caption, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pruning import CalibrationSet, Recipe
from pruning.recipes import UNCALIBRATED
from pruning.text.languages import named

from .. import plots
from ..frames import ALL, labels, of_recipe, recipes_of
from ..metrics import mask_overlap, recovery
from ..metrics.contrasts import OTHERS
from ..metrics.firing import FEWEST_ROUTED
from ..metrics.recovery_frame import named_causes
from ..stats.crossed import OWN_VARIANCE

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
        Name of each model made elsewhere to its source, and what was found to be done to it.
    set_aside
        Name of every variant that could not be made to the reason.
    segments, fit_segments
        Held-out segments, and segments that subspaces were fitted on, of each language.
    rank
        Dimensions of the language-specific subspaces.
    skip_first
        Whether the first token of each segment does not count.
    heldout_tokens
        Tokens of each language that count.
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
    set_aside: Mapping[str, str]
    segments: int
    fit_segments: int
    rank: int
    skip_first: bool
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
    text = described_text(facts, labels.encoder_blocks(frames["signal"]))
    yield ReportFigure(
        ALL_MODELS,
        "perplexity",
        f"Perplexity of every model in every language on {text}. Colour: log2 ratio to the dense model. Perplexities "
        "are not comparable between languages; bits per byte are.",
        lambda: plots.perplexity.all_models(frames["perplexity"]),
    )
    if (frames["routing"]["metric"] == "language_distance").any():
        yield ReportFigure(
            ALL_MODELS,
            "routing-languages",
            "Distance between languages by the experts they use in the dense model: total variation distance between "
            "the experts' shares of the top-k slots, mean over layers; 0: every expert equally often, 1: no expert in "
            f"common. Estimated without the bias of sampling noise. On {text}.",
            lambda: plots.routing.languages(frames["routing"]),
        )
    for recipe in recipes_of(frames["signal"]):
        for name, caption, draw in _of_recipe(frames, facts, recipe, text):
            yield ReportFigure(section_of(recipe), f"{name}-{labels.recipe_slug(recipe)}", caption, draw)


def _of_recipe(
    frames: Frames, facts: ReportFacts, recipe: Mapping[str, Any], text: str
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    def drawing(plot: Callable[..., Figure], frame: str, **more: Any) -> Callable[[], Figure]:
        return lambda: plot(frames[frame], recipe, **more)

    encoder = labels.encoder_blocks(frames["signal"])
    calibrated = recipe["propagation"] != UNCALIBRATED
    several = len(of_recipe(frames["mask_overlap"], recipe)) > 0
    if calibrated:
        yield (
            "perplexity-matrix",
            f"Perplexity by calibration set (rows) and evaluation language (columns) on {text}, with 95 % bootstrap "
            "intervals over segments. Colour: log2 ratio to the dense model.",
            drawing(plots.perplexity.matrix, "perplexity"),
        )
        yield (
            "bits-per-byte",
            "The same in bits per byte of UTF-8 text, which are comparable between languages.",
            drawing(plots.perplexity.matrix, "perplexity", metric="bits_per_byte"),
        )
    compared = of_recipe(frames["contrasts"], recipe)
    if (compared["other_calibration"] != OTHERS).any():
        yield (
            "contrasts",
            "Difference in log perplexity between each calibration set and the evaluated language's own; right of zero "
            "is worse. Intervals (95 %) hold over segments and draws of the calibration text together; with a single "
            f"draw there are none, and nothing is tested. {_few_draws(compared)}Filled markers: p < 0.05 (t-test, "
            "Benjamini-Hochberg correction). The frame contrasts holds the same for SNR, for the errors of both "
            "LSAR parts, and for the difference between these.",
            drawing(plots.contrasts.effects, "contrasts"),
        )
    asked = of_recipe(frames["accuracy"], recipe)
    for task in asked["task"].unique():
        metrics = set(asked.loc[asked["task"] == task, "metric"])
        metric = "twin_accuracy_change" if "twin_accuracy_change" in metrics else "accuracy_change"
        what = (
            "accuracy on minimal pairs (two items with the same choices and opposite answers; a pair counts as correct "
            "if its two margins have a positive sum, so that a preference for one of the choices cancels)"
            if metric.startswith("twin")
            else "accuracy"
        )
        yield (
            f"questions-{labels.slug(str(task))}",
            f"Task {task}: change in {what} from the dense to the pruned model, all languages together. Bars: 95 % "
            "intervals at the effective number of items: items made after one template, and translations, are not "
            "independent.",
            drawing(plots.accuracy.categories, "accuracy", task=str(task), metric=metric),
        )
        if several:
            yield (
                f"questions-matrix-{labels.slug(str(task))}",
                f"The same change on {task} by calibration set and evaluation language; red: worse than dense. "
                "Where the dense model is not shown to be above chance, no change is given.",
                drawing(plots.accuracy.matrix, "accuracy", task=str(task), metric=metric),
            )
    between = of_recipe(frames["task_contrasts"], {**recipe, "metric": "accuracy_drop", "part": ALL})
    for task in between["task"].unique():
        own = between[between["task"] == task]
        own = own[own["contrast"].isin(own.loc[~own["at_chance"].astype(bool), "contrast"])]
        if (own["contrast"] == "category").any():
            yield (
                f"task-contrasts-{labels.slug(str(task))}",
                f"Task {task}: drop in accuracy (minimal pairs, where there are any) of one category minus that of "
                "another, over all calibration sets; right of zero the first loses more. Intervals (95 %) hold over "
                "templates and draws of the calibration text together; with a single draw there are none, and nothing "
                f"is tested. {_few_draws(own)}Filled markers: p < 0.05 (t-test, Benjamini-Hochberg correction). Where "
                "the dense model is not shown to be above chance, no loss can be seen. Frame task_contrasts has the "
                "same for margins, single sets, pairs of sets, and kinds, grades and domains, and at equal perplexity.",
                drawing(plots.task_contrasts.effects, "task_contrasts", task=str(task)),
            )
        if (own["contrast"] == "own").any():
            yield (
                f"task-contrasts-own-{labels.slug(str(task))}",
                f"Task {task}: what models calibrated on the evaluated language lose less (left of zero) than those "
                "calibrated on others, relative to what they lose less in other languages; alone, and minus the same "
                "in another category. Intervals as before; filled: p < 0.05, permuting whole calibration sets "
                "(Benjamini-Hochberg correction).",
                drawing(plots.task_contrasts.effects, "task_contrasts", task=str(task), contrast="own"),
            )
    yield (
        "signal",
        f"Signal-to-noise ratio of the pruned model's residual stream after each block, relative to the dense model, "
        f"on {text}; {_counted(facts)}. Higher is better; at 0 dB the error is as large as the signal. Bands: "
        "95 % bootstrap intervals over segments. Dotted: another seed of the same calibration set.",
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
        "The same for the output of each projection and for the residual stream, mean over languages.",
        drawing(plots.signal.roles, "signal"),
    )
    yield (
        "subspaces",
        "LSAR: squared error of the language-specific and the language-agnostic part of segment means, each relative "
        "to its own spread around the dense model's mean over languages, so that the component shared by all text "
        f"does not mask the error. Subspaces of {facts.rank} dimensions, fitted on the dense model with "
        f"{facts.fit_segments} parallel segments per language; errors on {text}. Lines: means over calibration sets; "
        "bands: minimum to maximum. The frame subspaces also holds errors relative to the whole signal and per "
        "dimension.",
        drawing(plots.lsar.layers, "subspaces", encoder=encoder),
    )
    if several:
        yield (
            "subspaces-matrix",
            "The same errors, median over layers, by calibration set and evaluation language. Where rows are alike, "
            "the calibration language does not matter for that part.",
            drawing(plots.lsar.matrix, "subspaces"),
        )
    yield (
        "subspaces-knowledge",
        "What the agnostic part encodes. Left: how often the nearest segment in another language is the translation "
        "(held-out segments that all languages share). Right: share of the between-language variance that a subspace "
        "of each rank explains. Means over languages; bands: minimum to maximum over calibration sets (right: over "
        "layers).",
        drawing(plots.lsar.knowledge, "subspaces", encoder=encoder),
    )
    if len(of_recipe(frames["geometry"], recipe)):
        yield (
            "geometry",
            "Rotated or lost? Overlap: mean cos² of the principal angles between the language-specific subspaces "
            "(LSAR) of dense and pruned model, each fitted on its own states; dotted and black: of a model with "
            "itself, the ceiling. Language found: accuracy of a linear discriminant in the part of a state inside or "
            "outside a subspace; outside, it is above chance even in the dense model, since subspaces are estimated. "
            "Where overlap falls but languages are found in the model's own subspace as before, they were rotated; "
            "where they are found less well and their means have come closer, lost. CKA (unbiased): within each "
            "language, mean over languages. Subspaces, discriminants and accuracies are of different segments among "
            f"{text}. Lines: means over calibration sets; bands: minimum to maximum. The frame geometry holds the "
            "intervals.",
            drawing(plots.geometry.layers, "geometry", encoder=encoder),
        )
    if several:
        yield from _overlap(frames["mask_overlap"], recipe, drawing)
    if len(of_recipe(frames["routing"], recipe)):
        yield (
            "routing",
            "The router's choices, mean over layers. Left: share of the top-k slots whose expert the "
            "dense model does not choose for the same token. Right: total variation distance between the shares of "
            "the experts before and after; 0 if every expert is used as often as before, whichever tokens use it. On "
            f"{text}.",
            drawing(plots.routing.matrix, "routing"),
        )
        yield (
            "routing-layers",
            "The same distance by layer. Bands: 95 % jackknife intervals over segments. The frame routing also holds "
            "each expert's share.",
            drawing(plots.routing.layers, "routing"),
        )
    chosen = of_recipe(frames["neuron_selection"], recipe)
    if (chosen["metric"] == "kept_share").any():
        yield (
            "neurons-kept",
            "LAPE: share of the dense model's language-specific neurons that are selected again in the pruned model. "
            f"Language-specific are the 1 % of all {facts.neurons:,} MLP neurons whose firing has the lowest entropy "
            "over languages; each counts for every language in which it fires above the 95 % quantile. "
            f"{_experts(frames)}Bottom rows: the share that the dense model itself selects again on the other half of "
            f"the text, which is the ceiling, and chance. Firing counted on {text}.",
            drawing(plots.lape.kept, "neuron_selection"),
        )
    if len(frames["language_neurons"]):
        yield (
            "neurons-layers",
            "Language-specific neurons by layer: those of the dense model that are kept and lost, those gained, and "
            "those of the dense model that still fire above its threshold. Dashed: all of the dense model's.",
            drawing(plots.lape.layers, "language_neurons", encoder=encoder),
        )
        yield (
            "neurons-entropy",
            "Cumulative distribution of LAPE over all neurons that fire, dense and pruned. Right: the lowest 5 % of "
            "the dense model, where the language-specific neurons lie.",
            drawing(plots.lape.entropy, "neuron_entropy"),
        )
    if len(of_recipe(frames["neuron_shift"], recipe)):
        yield (
            "neurons-shift",
            "Change in firing probability after pruning, by firing probability in the dense model, for its "
            "language-specific neurons and for all others. Lines: means over calibration sets; bands: minimum to "
            "maximum.",
            drawing(plots.lape.shift, "neuron_shift"),
        )


def _experts(frames: Frames) -> str:
    """Say how firing is counted in experts, and which of them are left out."""
    if not len(frames["routing"]):
        return ""
    return (
        "The firing of an expert's neurons is counted among the tokens routed to it; experts that get fewer than "
        f"{FEWEST_ROUTED} tokens in some language are left out. "
    )


def _overlap(
    frame: pd.DataFrame, recipe: Mapping[str, Any], drawing: Callable[..., Callable[[], Figure]]
) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Yield the figures on how alike variants of a recipe are: their masks, or, of quantized ones, their codes."""
    own = of_recipe(frame, recipe)
    ceiling = (
        f"the same set with another seed, which is the ceiling ({labels.common_text(mask_overlap.draws_share(own))})"
    )
    if labels.quantized(recipe):
        yield (
            "code-agreement",
            "Share of equal codes for every pair of calibration sets, mean over layers, roles and draws; diagonal: two "
            "draws of one set. Quantized models have no masks to compare. Right: hierarchical clustering by the share "
            "of codes that differ (average linkage).",
            drawing(plots.mask_overlap.heatmap, "mask_overlap", metric="code_agreement"),
        )
        yield (
            "code-agreement-roles",
            f"The same by layer for each role: different calibration sets (mean, minimum to maximum), and {ceiling}. "
            "Dashed: chance (independent codes with the same frequencies).",
            drawing(plots.mask_overlap.roles, "mask_overlap", metric="code_agreement"),
        )
        return
    yield (
        "mask-overlap",
        "Intersection over union of the kept weights for every pair of calibration sets, mean over layers, roles and "
        "draws; diagonal: two draws of one set. Right: hierarchical clustering by mask distance (average linkage).",
        drawing(plots.mask_overlap.heatmap, "mask_overlap"),
    )
    yield (
        "mask-overlap-roles",
        f"The same by layer for each role: different calibration sets (mean, minimum to maximum), and {ceiling}. "
        "Dashed: chance (independent masks).",
        drawing(plots.mask_overlap.roles, "mask_overlap"),
    )
    if (own["metric"] == "correction_cosine").any():
        yield (
            "corrections",
            "Weight updates: cosine similarity between the updates that two variants made to the weights they both "
            "keep, by layer for each role; 1: identical direction, 0: unrelated.",
            drawing(plots.mask_overlap.roles, "mask_overlap", metric="correction_cosine"),
        )


def _few_draws(rows: pd.DataFrame) -> str:
    """Say what is assumed where there are too few draws to know how much each set varies."""
    if not (rows["df"].notna() & (rows["draws"] < OWN_VARIANCE)).any():
        return ""
    return (
        "Some sets have fewer than three draws: the variance between draws is then pooled over all sets, which holds "
        "only if they vary alike. "
    )


def described_text(facts: ReportFacts, encoder: int) -> str:
    """Say on which text models were evaluated."""
    tokens = from_to(facts.heldout_tokens.values())
    halved = ", each read whole by the encoder; the decoder predicts its second half from the encoded first half"
    return (
        f"{facts.segments} held-out segments per language ({tokens} tokens), disjoint from the "
        f"calibration and fitting text{halved if encoder else ''}"
    )


def from_to(numbers: Iterable[int]) -> str:
    """Return the range of some numbers, in words.

    >>> from_to([312, 300]), from_to([8, 8])
    ('300 to 312', '8')
    """
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _counted(facts: ReportFacts) -> str:
    return f"first tokens (BOS, if there is one) {'left out' if facts.skip_first else 'included'}"


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
    asked = frame[frame["component"] == recovery.EVERYTHING]
    what = f"{category} in {named(language)}, n = {int(asked['n'].max())}"
    shares = plots.recovery.shares_known(frame)
    in_units = "in per cent of the drop" if shares else "in nats, since the drop is not significant"
    whole = "1: the whole drop is recovered." if shares else "In nats, since the drop is not significant."
    yield ReportFigure(
        section,
        f"diagnosis-curves-{name}",
        f"Recovery when the dense model's residual stream is patched into {variant} after one block ({what}): the "
        "whole stream, its language-specific part (LSAR, fitted on the dense model) and the language-agnostic rest, on "
        f"all questions. {whole} Bands: 95 % intervals over templates. Controls: 20 random "
        "subspaces with the specific part's rank and pruning error, their mean and range; patched exactly after the "
        "blocks where gradients give most effect to the specific part, or to what the block does to the agnostic part, "
        "and estimated from gradients after all.",
        lambda: plots.recovery.curves(frame),
    )
    yield ReportFigure(
        section,
        f"diagnosis-map-{name}",
        f"What each role of each block recovers ({what}), {in_units}, estimated from gradients "
        "(attribution). Left: restoring the weights of that projection only. Right: restoring its output, which also "
        "undoes the damage in its input. Values need not add up to the whole drop.",
        lambda: plots.recovery.heatmap(frame),
    )
    if not len(named_causes(frame)):
        return
    yield ReportFigure(
        section,
        f"diagnosis-causes-{name}",
        f"The most likely causes, patched exactly, one at a time ({what}), on the half of the questions that did not "
        "choose them, or averaged over both if both chose them. Left: restored from the dense model in the pruned one. "
        "Right: corrupted in the dense model with the pruned one's. Both as a share of the drop (in nats, if it is not "
        "significant on some of these questions), with 95 % intervals over templates.",
        lambda: plots.recovery.causes(frame),
    )
