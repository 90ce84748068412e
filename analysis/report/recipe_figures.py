"""The figures of one recipe: which there are, their captions, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from probes.lens import LENSES
from pruning.recipes import UNCALIBRATED

from .. import plots
from ..frames import ALL, Frames, labels, of_recipe
from ..metrics import mask_overlap
from ..metrics.contrasts import OTHERS
from ..metrics.firing import FEWEST_ROUTED
from ..stats.crossed import OWN_VARIANCE
from .facts import ReportFacts, described_text, from_to

#: Lens to the kind of its figures.
OF_LENSES = dict(zip(LENSES, ("lens", "lens-tuned"), strict=True))


@dataclass(frozen=True)
class Drawn:
    """A figure of one recipe.

    Attributes
    ----------
    kind
        What it shows; with the recipe (and the task) its name.
    caption, draw
        As of a :class:`analysis.report.ReportFigure`.
    task
        Of items, if it is about those of one task.
    """

    kind: str
    caption: str
    draw: Callable[..., Figure]
    task: str = ""


@dataclass(frozen=True)
class RecipeFigures:
    """The figures of one recipe, and what they have in common.

    Attributes
    ----------
    frames, known
        Frames and facts of the study; no other frames are touched than those that a group of figures shows, and no
        facts by the figures of masks.
    recipe
        One of :func:`analysis.frames.recipes_of`.
    """

    frames: Frames
    known: ReportFacts | None
    recipe: Mapping[str, Any]

    @property
    def facts(self) -> ReportFacts:
        """The facts of the study."""
        assert self.known is not None, "only figures of masks can do without"
        return self.known

    def of(self, group: str) -> Iterator[Drawn]:
        """Yield the figures of one group, a key of :data:`GROUPS`."""
        draw, _ = GROUPS[group]
        yield from draw(self)

    @cached_property
    def encoder(self) -> int:
        """Blocks of an encoder, which come first."""
        return labels.encoder_blocks(self.frames["signal"])

    @cached_property
    def text(self) -> str:
        """On which text models were evaluated."""
        return described_text(self.facts, self.encoder)

    @cached_property
    def several(self) -> bool:
        """Whether there are variants of several calibration sets to compare."""
        return len(of_recipe(self.frames["mask_overlap"], self.recipe)) > 0

    def drawing(self, plot: Callable[..., Figure], frame: str, **more: Any) -> Callable[..., Figure]:
        """Return what draws a frame's rows of this recipe; takes further settings of the plot, such as ``width``."""
        return lambda **settings: plot(self.frames[frame], self.recipe, **more, **settings)


def _perplexity(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield perplexity by calibration set and language."""
    if of.recipe["propagation"] != UNCALIBRATED:
        yield Drawn(
            "perplexity-matrix",
            f"Perplexity by calibration set (rows) and evaluation language (columns) on {of.text}, with 95 % bootstrap "
            "intervals over segments. Colour: log2 ratio to the dense model.",
            of.drawing(plots.perplexity.matrix, "perplexity"),
        )
        yield Drawn(
            "bits-per-byte",
            "The same in bits per byte of UTF-8 text, which are comparable between languages.",
            of.drawing(plots.perplexity.matrix, "perplexity", metric="bits_per_byte"),
        )


def _contrasts(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield the differences between calibration sets."""
    compared = of_recipe(of.frames["contrasts"], of.recipe)
    if (compared["other_calibration"] != OTHERS).any():
        yield Drawn(
            "contrasts",
            "Difference in log perplexity between each calibration set and the evaluated language's own; right of zero "
            "is worse. Intervals (95 %) hold over segments and draws of the calibration text together; with a single "
            f"draw there are none, and nothing is tested. {_few_draws(compared)}Filled markers: p < 0.05 (t-test, "
            "Benjamini-Hochberg correction). The frame contrasts holds the same for SNR, for the errors of both "
            "LSAR parts, and for the difference between these.",
            of.drawing(plots.contrasts.effects, "contrasts"),
        )


def _accuracy(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield the changes in accuracy on each task."""
    asked = of_recipe(of.frames["accuracy"], of.recipe)
    for task in asked["task"].unique():
        metrics = set(asked.loc[asked["task"] == task, "metric"])
        metric = "twin_accuracy_change" if "twin_accuracy_change" in metrics else "accuracy_change"
        what = (
            "accuracy on minimal pairs (two items with the same choices and opposite answers; a pair counts as correct "
            "if its two margins have a positive sum, so that a preference for one of the choices cancels)"
            if metric.startswith("twin")
            else "accuracy"
        )
        yield Drawn(
            "questions",
            f"Task {task}: change in {what} from the dense to the pruned model, all languages together. Bars: 95 % "
            "intervals at the effective number of items: items made after one template, and translations, are not "
            "independent.",
            of.drawing(plots.accuracy.categories, "accuracy", task=str(task), metric=metric),
            task=str(task),
        )
        if of.several:
            yield Drawn(
                "questions-matrix",
                f"The same change on {task} by calibration set and evaluation language; red: worse than dense. "
                "Grey: the dense model is not shown to be above chance, so that no change is given.",
                of.drawing(plots.accuracy.matrix, "accuracy", task=str(task), metric=metric),
                task=str(task),
            )


def _task_contrasts(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield the differences between what categories lose."""
    between = of_recipe(of.frames["task_contrasts"], {**of.recipe, "metric": "accuracy_drop", "part": ALL})
    for task in between["task"].unique():
        own = between[between["task"] == task]
        own = own[own["contrast"].isin(own.loc[~own["at_chance"].astype(bool), "contrast"])]
        if (own["contrast"] == "category").any():
            yield Drawn(
                "task-contrasts",
                f"Task {task}: drop in accuracy (minimal pairs, where there are any) of one category minus that of "
                "another, over all calibration sets; right of zero the first loses more. Intervals (95 %) hold over "
                "templates and draws of the calibration text together; with a single draw there are none, and nothing "
                f"is tested. {_few_draws(own)}Filled markers: p < 0.05 (t-test, Benjamini-Hochberg correction). Where "
                "the dense model is not shown to be above chance, no loss can be seen. Frame task_contrasts has the "
                "same for margins, single sets, pairs of sets, and kinds, grades and domains, and at equal perplexity.",
                of.drawing(plots.task_contrasts.effects, "task_contrasts", task=str(task)),
                task=str(task),
            )
        if (own["contrast"] == "own").any():
            yield Drawn(
                "task-contrasts-own",
                f"Task {task}: what models calibrated on the evaluated language lose less (left of zero) than those "
                "calibrated on others, relative to what they lose less in other languages; alone, and minus the same "
                "in another category. Intervals as before; filled: p < 0.05, permuting whole calibration sets "
                "(Benjamini-Hochberg correction).",
                of.drawing(plots.task_contrasts.effects, "task_contrasts", task=str(task), contrast="own"),
                task=str(task),
            )


def _signal(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield where the signal is lost."""
    yield Drawn(
        "signal",
        f"Signal-to-noise ratio of the pruned model's residual stream after each block, relative to the dense model, "
        f"on {of.text}; {_counted(of.facts)}. Higher is better; at 0 dB the error is as large as the signal. Bands: "
        "95 % bootstrap intervals over segments. Dotted: another seed of the same calibration set.",
        of.drawing(plots.signal.layers, "signal"),
    )
    if of.several:
        yield Drawn(
            "signal-matrix",
            "The same after the last block, by calibration set and evaluation language.",
            of.drawing(plots.signal.matrix, "signal"),
        )
    yield Drawn(
        "signal-roles",
        "The same for the output of each projection and for the residual stream, mean over languages.",
        of.drawing(plots.signal.roles, "signal"),
    )


def _subspaces(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield the errors of both LSAR parts, and what the agnostic part encodes."""
    yield Drawn(
        "subspaces",
        "LSAR: squared error of the language-specific and the language-agnostic part of segment means, each relative "
        "to its own spread around the dense model's mean over languages, so that the component shared by all text "
        f"does not mask the error. Subspaces of {of.facts.rank} dimensions, fitted on the dense model with "
        f"{of.facts.fit_segments} parallel segments per language; errors on {of.text}. Lines: means over calibration "
        "sets; bands: minimum to maximum. The frame subspaces also holds errors relative to the whole signal and per "
        "dimension.",
        of.drawing(plots.lsar.layers, "subspaces", encoder=of.encoder),
    )
    if of.several:
        yield Drawn(
            "subspaces-matrix",
            "The same errors, median over layers, by calibration set and evaluation language. Where rows are alike, "
            "the calibration language does not matter for that part.",
            of.drawing(plots.lsar.matrix, "subspaces"),
        )
    yield Drawn(
        "subspaces-knowledge",
        "What the agnostic part encodes. Left: how often the nearest segment in another language is the translation "
        "(held-out segments that all languages share). Right: share of the between-language variance that a subspace "
        "of each rank explains. Means over languages; bands: minimum to maximum over calibration sets (right: over "
        "layers).",
        of.drawing(plots.lsar.knowledge, "subspaces", encoder=of.encoder),
    )


def _geometry(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield whether language was rotated or lost."""
    if len(of_recipe(of.frames["geometry"], of.recipe)):
        yield Drawn(
            "geometry",
            "Rotated or lost? Overlap: mean cos² of the principal angles between the language-specific subspaces "
            "(LSAR) of dense and pruned model, each fitted on its own states; dotted and black: of a model with "
            "itself, the ceiling. Language found: accuracy of a linear discriminant in the part of a state inside or "
            "outside a subspace; outside, it is above chance even in the dense model, since subspaces are estimated. "
            "Where overlap falls but languages are found in the model's own subspace as before, they were rotated; "
            "where they are found less well and their means have come closer, lost. CKA (unbiased): within each "
            "language, mean over languages. Subspaces, discriminants and accuracies are of different segments among "
            f"{of.text}. Lines: means over calibration sets; bands: minimum to maximum. The frame geometry holds the "
            "intervals.",
            of.drawing(plots.geometry.layers, "geometry", encoder=of.encoder),
        )


def _mask_overlap(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield how alike variants are: their masks, or, of quantized ones, their codes."""
    if not of.several:
        return
    own = of_recipe(of.frames["mask_overlap"], of.recipe)
    ceiling = (
        f"the same set with another seed, which is the ceiling ({labels.common_text(mask_overlap.draws_share(own))})"
    )
    if labels.quantized(of.recipe):
        yield Drawn(
            "code-agreement",
            "Share of equal codes for every pair of calibration sets, mean over layers, roles and draws; diagonal: two "
            "draws of one set. Quantized models have no masks to compare. Right: hierarchical clustering by the share "
            "of codes that differ (average linkage).",
            of.drawing(plots.mask_overlap.heatmap, "mask_overlap", metric="code_agreement"),
        )
        yield Drawn(
            "code-agreement-roles",
            f"The same by layer for each role: different calibration sets (mean, minimum to maximum), and {ceiling}. "
            "Dashed: chance (independent codes with the same frequencies).",
            of.drawing(plots.mask_overlap.roles, "mask_overlap", metric="code_agreement"),
        )
        return
    yield Drawn(
        "mask-overlap",
        "Intersection over union of the kept weights for every pair of calibration sets, mean over layers, roles and "
        "draws; diagonal: two draws of one set. Right: hierarchical clustering by mask distance (average linkage).",
        of.drawing(plots.mask_overlap.heatmap, "mask_overlap"),
    )
    yield Drawn(
        "mask-overlap-roles",
        f"The same by layer for each role: different calibration sets (mean, minimum to maximum), and {ceiling}. "
        "Dashed: chance (independent masks).",
        of.drawing(plots.mask_overlap.roles, "mask_overlap"),
    )
    if (own["metric"] == "correction_cosine").any():
        yield Drawn(
            "corrections",
            "Weight updates: cosine similarity between the updates that two variants made to the weights they both "
            "keep, by layer for each role; 1: identical direction, 0: unrelated.",
            of.drawing(plots.mask_overlap.roles, "mask_overlap", metric="correction_cosine"),
        )


def _routing(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield the changes in which experts are used."""
    if len(of_recipe(of.frames["routing"], of.recipe)):
        yield Drawn(
            "routing",
            "The router's choices, mean over layers. Left: share of the top-k slots whose expert the "
            "dense model does not choose for the same token. Right: total variation distance between the shares of "
            "the experts before and after; 0 if every expert is used as often as before, whichever tokens use it. On "
            f"{of.text}.",
            of.drawing(plots.routing.matrix, "routing"),
        )
        yield Drawn(
            "routing-layers",
            "The same distance by layer. Bands: 95 % jackknife intervals over segments. The frame routing also holds "
            "each expert's share.",
            of.drawing(plots.routing.layers, "routing"),
        )


def _lenses(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield what models would predict after each block."""
    there = set(of_recipe(of.frames["lens"], of.recipe)["lens"])
    for lens, kind in OF_LENSES.items():
        if lens in there:
            yield from _of_lens(of, lens, kind)


def _of_lens(of: RecipeFigures, lens: str, kind: str) -> Iterator[Drawn]:
    tuned = lens == LENSES[1]
    translated = ", which translates states by an affine map for each block, fitted on the dense model" * tuned
    early = "" if tuned else ", large in early blocks, where states are not yet in the basis that the head reads"
    yield Drawn(
        kind,
        f"What the model would predict after each block, if no block followed ({lens} lens{translated}): KL divergence "
        f"from the dense model's final prediction. Black: the dense model's own{early}; what pruning did is the "
        f"difference from it. Bands: 95 % bootstrap intervals over segments. {sampled(of.frames)}",
        of.drawing(plots.lens.layers, "lens", lens=lens, encoder=of.encoder),
    )
    yield Drawn(
        f"{kind}-tokens",
        "Does it still think in the same language? Probability of tokens of the text's own language, and of the other "
        f"language with most in any block of the dense model, in the prediction after each block ({lens} lens). Solid: "
        "dense; dashed: pruned, mean and range over calibration sets. The frame lens holds the intervals.",
        of.drawing(plots.lens.tokens, "lens", lens=lens, encoder=of.encoder),
    )


def _lens_margins(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield after which blocks the right choices of items are ahead."""
    asked = of_recipe(of.frames["lens_margins"], of.recipe)
    for task in asked["task"].unique():
        for lens, kind in OF_LENSES.items():
            if lens in set(asked["lens"]):
                yield Drawn(
                    f"{kind}-margins",
                    f"Task {task}: share of minimal pairs (items, where there are no pairs) whose right choice is "
                    f"ahead of the wrong one after this block and all later ones, by the {lens} lens at the first "
                    "token at which choices differ; after the last block, the share that is right. Means over "
                    "languages; band: minimum to maximum over calibration sets. Intervals: frame lens_margins.",
                    of.drawing(plots.lens.margins, "lens_margins", task=str(task), lens=lens, encoder=of.encoder),
                    str(task),
                )


def sampled(frames: Frames) -> str:
    """Say at how many segments of text a lens was read."""
    segments = from_to(frames["lens"]["n"].dropna().astype(int).tolist())
    return f"Read at the same sampled positions in all models, in {segments} held-out segments per language."


def _neurons(of: RecipeFigures) -> Iterator[Drawn]:
    """Yield what happened to the language-specific neurons."""
    chosen = of_recipe(of.frames["neuron_selection"], of.recipe)
    if (chosen["metric"] == "kept_share").any():
        yield Drawn(
            "neurons-kept",
            "LAPE: share of the dense model's language-specific neurons that are selected again in the pruned model. "
            f"Language-specific are the 1 % of all {of.facts.neurons:,} MLP neurons whose firing has the lowest "
            "entropy over languages; each counts for every language in which it fires above the 95 % quantile. "
            f"{_experts(of.frames)}Bottom rows: the share that the dense model itself selects again on the other half "
            f"of the text, which is the ceiling, and chance. Firing counted on {of.text}.",
            of.drawing(plots.lape.kept, "neuron_selection"),
        )
    if len(of.frames["language_neurons"]):
        yield Drawn(
            "neurons-layers",
            "Language-specific neurons by layer: those of the dense model that are kept and lost, those gained, and "
            "those of the dense model that still fire above its threshold. Dashed: all of the dense model's.",
            of.drawing(plots.lape.layers, "language_neurons", encoder=of.encoder),
        )
        yield Drawn(
            "neurons-entropy",
            "Cumulative distribution of LAPE over all neurons that fire, dense and pruned. Right: the lowest 5 % of "
            "the dense model, where the language-specific neurons lie.",
            of.drawing(plots.lape.entropy, "neuron_entropy"),
        )
    if len(of_recipe(of.frames["neuron_shift"], of.recipe)):
        yield Drawn(
            "neurons-shift",
            "Change in firing probability after pruning, by firing probability in the dense model, for its "
            "language-specific neurons and for all others. Lines: means over calibration sets; bands: minimum to "
            "maximum.",
            of.drawing(plots.lape.shift, "neuron_shift"),
        )


def _experts(frames: Frames) -> str:
    """Say how firing is counted in experts, and which of them are left out."""
    if not len(frames["routing"]):
        return ""
    return (
        "The firing of an expert's neurons is counted among the tokens routed to it; experts that get fewer than "
        f"{FEWEST_ROUTED} tokens in some language are left out. "
    )


def _few_draws(rows: pd.DataFrame) -> str:
    """Say what is assumed where there are too few draws to know how much each set varies."""
    if not (rows["df"].notna() & (rows["draws"] < OWN_VARIANCE)).any():
        return ""
    return (
        "Some sets have fewer than three draws: the variance between draws is then pooled over all sets, which holds "
        "only if they vary alike. "
    )


def _counted(facts: ReportFacts) -> str:
    return f"first tokens (BOS, if there is one) {'left out' if facts.skip_first else 'included'}"


#: The figures of a recipe, in the order of the report: frame whose recipes have them to what yields them, their kinds.
GROUPS: dict[str, tuple[Callable[[RecipeFigures], Iterator[Drawn]], tuple[str, ...]]] = {
    "perplexity": (_perplexity, ("perplexity-matrix", "bits-per-byte")),
    "contrasts": (_contrasts, ("contrasts",)),
    "accuracy": (_accuracy, ("questions", "questions-matrix")),
    "task_contrasts": (_task_contrasts, ("task-contrasts", "task-contrasts-own")),
    "signal": (_signal, ("signal", "signal-matrix", "signal-roles")),
    "subspaces": (_subspaces, ("subspaces", "subspaces-matrix", "subspaces-knowledge")),
    "geometry": (_geometry, ("geometry",)),
    "mask_overlap": (
        _mask_overlap,
        ("mask-overlap", "mask-overlap-roles", "code-agreement", "code-agreement-roles", "corrections"),
    ),
    "routing": (_routing, ("routing", "routing-layers")),
    "lens": (_lenses, tuple(kind for lens in OF_LENSES.values() for kind in (lens, f"{lens}-tokens"))),
    "lens_margins": (_lens_margins, tuple(f"{kind}-margins" for kind in OF_LENSES.values())),
    "neuron_selection": (_neurons, ("neurons-kept", "neurons-layers", "neurons-entropy", "neurons-shift")),
}
